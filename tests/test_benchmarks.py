"""lm-eval on the tiny model, offline: the numbers are those of a direct call, and nobody is asked over the network."""

import json
import os
import socket
import sys

import pytest
from test_compare import make_adapter

from instructlite import PPORecipe, evaluate
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base

pytest.importorskip("lm_eval", reason="pip install 'instructlite[bench]'")

from instructlite.evaluation import benchmarks
from instructlite.evaluation.benchmarks import add_to_report, benchmark, shipped_tasks
from instructlite.evaluation.prompt_sets import multiple_choice
from instructlite.evaluation.report import Report

TASK = "truthfulqa_small_mc1"
LOCAL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{[best_answer] + incorrect_answers}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory):
    """SFT, and what PPO made of it."""
    directory = tmp_path_factory.mktemp("adapters")
    base = load_base(tiny_path, dtype="float32", chat_template="chatml")
    sft, reward = make_adapter(base, directory / "sft", 1), make_adapter(base, directory / "reward", 3, reward=True)
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "response_length": 4, "learning_rate": 1e-2}
    return {"sft": sft, "ppo": PPORecipe(model=sft, reward=reward, data=[{"prompt": "Hi"}] * 4, training=training).run(directory / "ppo")}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No way out, and data sets' copies in a directory of the test; what was tried all the same."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture
def directory(tmp_path):
    """A task of one's own: the first questions of the shipped set, without lm-eval's long opening."""
    (tmp_path / "short.jsonl").write_text("\n".join(json.dumps(row) for row in multiple_choice()[:10]))
    (tmp_path / "short.yaml").write_text(LOCAL.format(name="short", file=tmp_path / "short.jsonl"))
    return tmp_path


def direct(tiny_path, adapter, directory):
    """lm-eval as its own users call it: base and adapter by their paths."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(tiny_path), "tokenizer": str(adapter.path), "peft": str(adapter.path), "dtype": "float32"}
    return simple_evaluate(
        "hf", arguments, tasks=["short", shipped_tasks()[TASK]], limit=10, batch_size=4, device="cpu",
        task_manager=TaskManager(include_defaults=False, include_path=str(directory)),
    )["results"]  # fmt: skip


def test_the_numbers_are_those_of_a_direct_call_of_lm_eval_with_the_adapter_of_a_ppo_run(
    tiny_path, adapters, directory, offline, monkeypatch
):
    with monkeypatch.context() as online:  # so that whoever would ask the Hub does
        online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        online.setattr("datasets.config.HF_HUB_OFFLINE", False)
        rows = benchmark(["base", adapters["sft"], adapters["ppo"]], ["short", TASK], task_directory=directory, limit=10, batch_size=4)
    assert not offline
    assert [(row["candidate"], row["task"], row["metric"], row["n"]) for row in rows] == [
        (name, task, "acc", 10) for name in ("base", "sft", "ppo") for task in ("short", TASK)
    ]
    measured = direct(tiny_path, adapters["ppo"], directory)
    for row in rows[-2:]:
        assert row["value"] == measured[row["task"]]["acc,none"]
        assert row["standard_error"] == pytest.approx(measured[row["task"]]["acc_stderr,none"])
    assert len({row["value"] for row in rows if row["task"] == "short"}) > 1, "the adapters make no difference: nothing is shown"
    assert rows[0]["how"].startswith("lm-eval 0.4") and rows[0]["how"].endswith("first 10") and rows[0]["better"] == "higher"


def test_the_shipped_task_asks_our_questions_with_the_true_answer_first():
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load([shipped_tasks()[TASK]])["tasks"][TASK]
    questions = list(task.validation_docs())
    assert len(questions) == len(multiple_choice())
    assert task.doc_to_text(questions[0]).endswith(f"\n\nQ: {questions[0]['question']}\nA:")
    assert task.doc_to_choice(questions[0]) == [questions[0]["best_answer"], *questions[0]["incorrect_answers"]]


def test_ones_own_task_directory_needs_no_list_of_lm_evals_tasks(adapters, directory):
    told = []
    options = {"task_directory": directory, "chat_template": True, "few_shot": 0, "limit": 2}
    rows = benchmark([adapters["ppo"]], ["short"], done=told.append, **options)
    assert [(row["task"], row["n"]) for row in rows] == [("short", 2)] and told == [rows]
    assert rows[0]["how"].endswith("0-shot, chat template, first 2")


def test_a_task_whose_data_the_hub_would_have_is_one_line(adapters, directory):
    path = directory / "short.yaml"
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(InstructLiteError, match=r"^benchmark: a task's data cannot be had .*truthfulqa_small_mc1"):
        benchmark([adapters["ppo"]], ["short"], task_directory=directory)


def test_code_is_run_only_with_leave(adapters, directory):
    with (directory / "short.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(InstructLiteError, match=r"without a sandbox; allow it with --run-code"):
        benchmark([adapters["ppo"]], ["short"], task_directory=directory, limit=1)
    assert len(benchmark([adapters["ppo"]], ["short"], task_directory=directory, limit=1, run_code=True)) == 1
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_rows_take_the_place_of_earlier_ones_in_a_report(adapters, tmp_path):
    reward = adapters["sft"].path.parent / "reward"
    evaluate([adapters["sft"], adapters["ppo"]], [{"prompt": "Hi"}], reward, samples=1, max_new_tokens=2, output_dir=tmp_path)
    answers = (tmp_path / "answers.jsonl").read_text()
    row = {"candidate": "ppo", "task": "t", "metric": "acc", "better": "higher", "value": 0.5, "standard_error": 0.1, "n": 9, "how": "so"}
    add_to_report(tmp_path, [row, {**row, "task": "u"}])
    add_to_report(tmp_path, [{**row, "value": 0.75}])
    assert [(row["task"], row["value"]) for row in Report.load(tmp_path).benchmarks] == [("u", 0.5), ("t", 0.75)]
    assert (tmp_path / "answers.jsonl").read_text() == answers
    (tmp_path / "answers.jsonl").unlink()
    with pytest.raises(InstructLiteError, match=r"answers.jsonl: is missing"):
        add_to_report(tmp_path, [row])


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
