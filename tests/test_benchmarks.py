"""lm-eval on the tiny model, offline: the numbers are those of a direct call, and nobody is asked over the network."""

import json
import os
import socket
import sys

import pytest
from test_compare import make_adapter

from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base

pytest.importorskip("lm_eval", reason="pip install 'instructlite[bench]'")

from instructlite.evaluation import benchmarks
from instructlite.evaluation.benchmarks import benchmark, shipped_tasks
from instructlite.evaluation.prompt_sets import multiple_choice

TASK = "truthfulqa_small_mc1"
LOCAL = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[right] + wrong}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    return {name: make_adapter(base, directory / name, seed) for seed, name in enumerate(("sft", "ppo"), 1)}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No way out, and data sets' copies in a directory of the test."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    def refuse(*arguments, **options):
        raise AssertionError(f"a connection was opened: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def direct(tiny_path, adapter, limit):
    """lm-eval as its own users call it: base and adapter by their paths."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(tiny_path), "tokenizer": str(adapter.path), "dtype": "float32", "device": "cpu"}
    return simple_evaluate(
        "hf", arguments | {"peft": str(adapter.path)}, tasks=[shipped_tasks()[TASK]], limit=limit, batch_size=4,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip


def test_the_numbers_are_those_of_a_direct_call_of_lm_eval_with_the_adapter(tiny_path, adapters):
    rows = benchmark(["base", adapters["sft"], adapters["ppo"]], [TASK], limit=12, batch_size=4)
    assert [(row["candidate"], row["task"], row["metric"], row["n"]) for row in rows] == [
        (name, TASK, "acc", 12) for name in ("base", "sft", "ppo")
    ]
    for row in rows[1:]:
        measured = direct(tiny_path, adapters[row["candidate"]], 12)["results"][TASK]
        assert row["value"] == measured["acc,none"] and row["standard_error"] == pytest.approx(measured["acc_stderr,none"])
    assert rows[0]["how"].startswith("lm-eval 0.4") and rows[0]["how"].endswith("first 12") and rows[0]["better"] == "higher"


def test_the_shipped_task_asks_our_questions_with_the_true_answer_first():
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([shipped_tasks()[TASK]])["tasks"][TASK]
    questions = list(task.validation_docs())
    assert len(questions) == len(multiple_choice())
    assert task.doc_to_text(questions[0]).endswith(f"\n\nQ: {questions[0]['question']}\nA:")
    assert task.doc_to_choice(questions[0]) == [questions[0]["best_answer"], *questions[0]["incorrect_answers"]]


def test_ones_own_task_directory_needs_no_list_of_lm_evals_tasks(adapters, tmp_path, monkeypatch):
    questions = [{"question": f"Capital of {place}?", "right": "yes", "wrong": ["no", "maybe"]} for place in ("Peru", "Chad")]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "capitals.yaml").write_text(LOCAL.format(file=tmp_path / "capitals.jsonl"))
    told = []
    rows = benchmark([adapters["ppo"]], ["capitals"], task_directory=tmp_path, chat_template=True, few_shot=0, done=told.append)
    assert [(row["task"], row["n"]) for row in rows] == [("capitals", 2)] and told == [rows]
    assert rows[0]["how"].endswith("0-shot, chat template")


def test_a_task_whose_data_the_hub_would_have_is_one_line(adapters, tmp_path):
    (tmp_path / "remote.yaml").write_text(LOCAL.format(file="x").replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(InstructLiteError, match=r"^benchmark: a task's data cannot be had .*truthfulqa_small_mc1"):
        benchmark([adapters["ppo"]], ["capitals"], task_directory=tmp_path)


def test_code_is_run_only_with_leave(adapters, tmp_path, monkeypatch):
    (tmp_path / "code.jsonl").write_text(json.dumps({"question": "q", "right": "a", "wrong": ["b"]}))
    (tmp_path / "code.yaml").write_text(LOCAL.format(file=tmp_path / "code.jsonl") + "unsafe_code: true\n")
    with pytest.raises(InstructLiteError, match=r"without a sandbox; allow it with --run-code"):
        benchmark([adapters["ppo"]], ["capitals"], task_directory=tmp_path)
    assert len(benchmark([adapters["ppo"]], ["capitals"], task_directory=tmp_path, run_code=True)) == 1
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_unknown_tasks_wrong_adapters_and_a_missing_package_are_one_line(adapters, tmp_path, monkeypatch, tiny_path):
    manager = benchmarks._manager
    monkeypatch.setattr(benchmarks, "_manager", lambda defaults, directory: manager(False, directory))  # lm-eval's own take seconds
    with pytest.raises(InstructLiteError, match=r"no task nonsense; local ones: truthfulqa_small_mc1"):
        benchmark([adapters["ppo"]], ["nonsense"])
    with pytest.raises(InstructLiteError, match="no directory with task files"):
        benchmark([adapters["ppo"]], [TASK], task_directory=tmp_path / "none")
    with pytest.raises(InstructLiteError, match="name the tasks"):
        benchmark([adapters["ppo"]], [])
    with pytest.raises(InstructLiteError, match="name an adapter"):
        benchmark(["base"], [TASK])
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    with pytest.raises(InstructLiteError, match="a reward adapter cannot answer"):
        benchmark([make_adapter(base, tmp_path / "judge", 3, reward=True)], [TASK])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InstructLiteError, match=r"^lm_eval is not installed: pip install 'instructlite\[bench\]'$"):
        benchmark([adapters["ppo"]], [TASK])
