"""The verbs: what they print, where, and with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from endpoints import stand_in

from instructlite import __version__, cli
from instructlite.config import load_loop, recipes
from instructlite.data.records import read_records
from instructlite.errors import InstructLiteError
from instructlite.feedback.ballots import Answer, Ballot, Candidate
from instructlite.feedback.store import Store
from instructlite.pipeline import LoopRun, StageRun


@pytest.fixture
def run_cli(capsys):
    def run(*arguments: str) -> SimpleNamespace:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def loops(monkeypatch):
    """Stands in for run_loop: notes what it was asked for and claims to have made a report."""
    seen = []

    def run_loop(loop, output, *, only, isolate, resume, say):
        assert isolate
        seen.append((loop, output, only))
        say("sft: training")
        return LoopRun(
            output, [StageRun("sft", output / "sft", False, 61.0, 1234.0), StageRun("ppo", output / "ppo", True, 5.0)], "the report"
        )

    monkeypatch.setattr("instructlite.pipeline.run_loop", run_loop)
    return seen


def test_version(run_cli):
    assert run_cli("--version").out == f"instructlite {__version__}\n"


def test_recipes_are_listed_and_printed_as_they_are(run_cli):
    listed = run_cli("recipes").out
    assert all(name in listed for name in recipes())
    assert run_cli("recipes", "smollm2-135m").out == recipes()["smollm2-135m"].read_text(encoding="utf-8")


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(run_cli):
    result = run_cli("run", "smollm2-135m", "ppo.kl_coeff=1")
    assert (result.code, result.out) == (2, "")
    assert result.err == "instructlite: 'ppo.kl_coeff=1': ppo.kl_coeff is not an option; did you mean 'kl_coef'?\n"


def test_debug_shows_the_traceback_wherever_it_stands():
    for arguments in (["--debug", "run", "nowhere"], ["run", "nowhere", "--debug"]):
        with pytest.raises(InstructLiteError, match="no recipe or file 'nowhere'"):
            cli.main(arguments)


def test_demo_runs_the_embedded_model_into_runs_demo(run_cli, loops):
    result = run_cli("demo")
    assert result.code == 0
    assert loops == [(load_loop("smollm2-135m"), Path("runs/demo"), None)]
    assert re.search(r"^\[\d+:\d\d\] sft: training$", result.out, re.MULTILINE)
    assert "the report" in result.out
    assert "1:01" in result.out
    assert "1,234 MB" in result.out
    assert "(before)" in result.out
    assert "runs/demo/recipe.yaml" in result.out


def test_run_lays_options_over_the_recipe(run_cli, loops, tmp_path):
    run_cli("run", "smollm2-135m", "ppo.kl_coef=0.1", "seed=4", "--output", tmp_path, "--only", "ppo")
    loop, output, only = loops[0]
    assert (loop.ppo["kl_coef"], loop.seed, output, only) == (0.1, 4, tmp_path, "ppo")
    run_cli("run", recipes()["smollm2-135m"])
    assert loops[1][1] == Path("runs/smollm2-135m")


def test_a_signal_ends_with_its_code_and_the_command_that_goes_on(run_cli, monkeypatch, tmp_path):
    resumed = []

    def run_loop(loop, output, *, resume, **options):
        resumed.append(resume)
        os.kill(os.getpid(), signal.SIGTERM if resume else signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr("instructlite.pipeline.run_loop", run_loop)
    result = run_cli("run", "smollm2-135m", "data.comparisons=my pairs.jsonl", "--output", tmp_path, "--debug")
    command = f"instructlite run smollm2-135m 'data.comparisons=my pairs.jsonl' --output {tmp_path} --resume"
    assert (result.code, result.err) == (130, f"go on with: {command}\n")
    result = run_cli("demo", "--resume", "--output", tmp_path)
    assert (result.code, result.err) == (143, f"go on with: instructlite demo --resume --output {tmp_path}\n")
    assert resumed == [False, True]
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    assert run_cli("evaluate", tmp_path).err == f"go on with: instructlite evaluate {tmp_path}\n"


def test_evaluate_of_a_run_writes_its_report_anew(run_cli, loops, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\n")
    run_cli("evaluate", tmp_path, "--samples", "5")
    loop, output, only = loops[0]
    assert (loop.model, loop.evaluation.samples, output, only) == ("m", 5, tmp_path, "report")


def test_evaluate_of_adapters_needs_prompts_a_judge_and_a_place(run_cli, monkeypatch, tmp_path):
    assert "--prompts FILE, --judge ADAPTER and --output DIRECTORY" in run_cli("evaluate", "base", "runs/x/ppo").err
    given = {}

    def evaluate(candidates, **arguments):
        given.update(arguments, candidates=candidates)
        return "a table"

    monkeypatch.setattr("instructlite.evaluation.compare.evaluate", evaluate)
    result = run_cli("evaluate", "base", "a", "--prompts", "p.jsonl", "--judge", "j", "--output", tmp_path)
    assert given == {
        "candidates": ["base", "a"],
        "data": Path("p.jsonl"),
        "judge": ["j"],
        "output_dir": tmp_path,
        "ratings": [],
        "side_effects": False,
    }
    assert result.out.startswith("a table\n")
    given.clear()
    more = ["--demonstrations", "d", "--reward", "r"]
    run_cli("evaluate", "few-shot:4", "a", "best-of-4", "--prompts", "p", "--judge", "j", "--output", tmp_path, *more)
    assert (given["demonstrations"], given["reward"]) == (Path("d"), "r")
    assert "--votes are about a run, and base is none" in run_cli("evaluate", "base", "a", "--full").err


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """A run directory, and what evaluate() is given for it."""
    (tmp_path / "recipe.yaml").write_text("model: m\nevaluation: {prompts: 3}\n")
    for name, role in (("sft", "policy"), ("dpo", "policy"), ("ppo", "policy"), ("judge", "reward"), ("reward", "reward")):
        (tmp_path / name).mkdir()
        hashes = dict.fromkeys(("fingerprint", "tokenizer_sha256", "template_sha256"), "f")
        manifest = {"role": role, "base": "m", "revision": None, "quantization": "none", "dtype": "float32", "format": 1, **hashes}
        (tmp_path / name / "instructlite.json").write_text(json.dumps(manifest))
    (tmp_path / "data").mkdir()
    for name in ("demonstrations", "heldout"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("{}\n")
    given = {}
    monkeypatch.setattr("instructlite.evaluation.compare.evaluate", lambda candidates, **rest: given.update(rest, candidates=candidates))
    return SimpleNamespace(run=tmp_path, given=given)


def test_evaluate_of_a_run_on_other_prompts_takes_the_rest_from_the_run(run_cli, evaluated):
    run, given = evaluated.run, evaluated.given
    run_cli("evaluate", run, "--prompts", "p.jsonl", "--output", run / "out")
    assert given["candidates"] == ["base", str(run / "sft"), str(run / "dpo"), str(run / "ppo")]
    assert given["judge"] == [str(run / "judge"), str(run / "reward")]
    assert (given["data"], given["output_dir"], given["prompts"]) == (Path("p.jsonl"), run / "out", 3)
    assert given["demonstrations"] == run / "data" / "demonstrations.jsonl" and given["comparisons"] == run / "data" / "heldout.jsonl"
    assert given["reward"] == run / "reward"


def test_candidates_of_a_run_are_named_by_its_stages(run_cli, evaluated):
    run, given = evaluated.run, evaluated.given
    run_cli("evaluate", run, "--candidates", "base, few-shot:2,sft,best-of-4:ppo,ppo", "--samples", "5")
    assert given["candidates"] == ["base", "few-shot:2", str(run / "sft"), "best-of-4:ppo", str(run / "ppo")]
    assert (given["samples"], given["data"], given["output_dir"]) == (5, run / "data" / "heldout_prompts.jsonl", run / "report")
    run_cli("evaluate", run, "--full")
    assert given["candidates"] == ["base", "few-shot:4", str(run / "sft"), "best-of-4", str(run / "dpo"), str(run / "ppo")]


def test_judges_of_a_run_are_stages_or_language_models(run_cli, evaluated, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    judged = ["--judge", "judge", "--judge", "llm:m@http://127.0.0.1:9/v1", "--rate", "likert", "--key-env", "MY_KEY"]
    run_cli("evaluate", evaluated.run, *judged)
    reward, model = evaluated.given["judge"]
    assert (reward, model.name) == (str(evaluated.run / "judge"), "m")
    assert model.completions.cache.path == evaluated.run / "report" / "verdicts.sqlite"
    assert evaluated.given["ratings"] == ["likert"]
    run_cli("evaluate", evaluated.run, *judged, "--max-requests", "7")
    assert evaluated.given["judge"][1].completions.budget.max_requests == 7


def test_blind_votes_of_a_run_are_counted_where_they_are_wanted(run_cli, evaluated):
    store = Store(evaluated.run)
    for temperature in (1.0, 0):
        answers = [
            Answer(Candidate(name, "m", name and "a" * 64), f"an answer {number}", {"temperature": temperature})
            for number, name in enumerate(("", "sft"))
        ]
        item = store.add_item([{"role": "user", "content": f"q at {temperature}"}], answers)
        store.record(item, store.voter().key, Ballot.tie())
    store.close()
    run_cli("evaluate", evaluated.run, "--votes")
    rows = evaluated.given["votes"]
    assert [(row["outcome"], row["decoding"], {row["a"], row["b"]}) for row in rows] == [
        (0.5, "sampled", {"a" * 64, ""}),
        (0.5, "greedy", {"a" * 64, ""}),
    ]


FAULTY = b"""\
{"prompt": "a", "chosen": "good", "rejected": "bad"}
{"prompt": "b", "chosen": "good", "rejec
{"prompt": "c", "chosen": "good", "rejcted": "bad"}
{"prompt": "d", "chosen": "", "rejected": "bad"}
{"prompt": "e", "chosen": "caf\xe9", "rejected": "bad"}
"""


def test_data_check_names_every_broken_line_without_torch_and_exits_2(tmp_path):
    comparisons, rankings = tmp_path / "c.jsonl", tmp_path / "r.jsonl"
    comparisons.write_bytes(FAULTY)
    rankings.write_text('{"prompt": "a", "responses": ["one"], "ranks": [0]}\n')
    code = (
        "import sys\nfrom instructlite.cli import main\n"
        f"try: main(['data', 'check', {str(comparisons)!r}, {str(rankings)!r}])\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == ""
    named = [line.split(": ")[0] for line in process.stdout.splitlines() if line.startswith((f"{comparisons}:", f"{rankings}:"))]
    assert named == [str(comparisons), *(f"{comparisons}:{line}" for line in (2, 3, 4, 5)), str(rankings), f"{rankings}:1"]


def test_data_check_of_a_good_file_exits_0(run_cli, tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a", "completion": "b"}\n')
    result = run_cli("data", "check", good)
    assert (result.code, result.out) == (0, f"{good}: 1 rows in = 1 kept + 0 rejected: demonstrations (prompt-completion), no problems\n")
    assert run_cli("data", "check", good, "--kind", "rankings").code == 2
    assert "no kind of record: demonstrations" in run_cli("data", "check", good, "--kind", "ranking").err


def test_faults_in_training_data_are_told_with_what_did_not_happen(run_cli, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": ""}\n')
    result = run_cli("run", "smollm2-135m", f"data.demonstrations={broken}", "--output", tmp_path / "run", "--only", "data")
    assert result.code == 2
    assert result.err.startswith(f"instructlite: the data has faults, nothing was trained:\n{broken}:1: ")


def test_data_generate_asks_an_endpoint_and_loads_no_torch(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "greet me"}\n')
    answers = {"What a critic said": "a better answer", "NONE": "It is rude."}
    reply = lambda prompt, before: next((said for key, said in answers.items() if key in prompt), "a first answer")  # noqa: E731
    with stand_in(reply) as server:
        given = ["data", "generate", "constitutional", "prompts.jsonl", "--model", "m", "--base-url", server.url, "--out", "out"]
        code = f"import sys\nfrom instructlite.cli import main\ntry: main({given})\nexcept SystemExit: assert 'torch' not in sys.modules"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "constitutional: 1 comparisons\n" in process.stdout, process.stderr
        assert "m: 3 asked, 0 kept from before, 45 tokens" in process.stdout
        assert process.stdout.endswith("Written: out\n")
        again = run_cli(*given, "--max-requests", "3")
        assert "m: 0 asked, 3 kept from before" in again.out
        refused = run_cli(*given, "--set", "revision=2")
    assert (refused.code, refused.err) == (2, "instructlite: 'revision' is no option of constitutional: revisions\n")
    assert len(server.asked) == 3
    assert len(read_records("out/comparisons.jsonl", "comparisons")) == 1


def test_benchmark_measures_the_policies_of_a_run_and_puts_the_numbers_into_its_report(run_cli, tmp_path, monkeypatch):
    row = {"candidate": "ppo", "task": "mmlu", "metric": "acc", "value": 0.25, "standard_error": 0.04, "n": 100}
    asked, written = [], []

    def benchmark(candidates, tasks, *, done, **options):
        asked.append((candidates, tasks, options["limit"], options["run_code"]))
        done([row])

    monkeypatch.setattr("instructlite.evaluation.benchmarks.benchmark", benchmark)
    monkeypatch.setattr("instructlite.evaluation.benchmarks.add_to_report", lambda *given: written.append(given))
    monkeypatch.setattr("instructlite.evaluation.runs.policies", lambda run: ["sft", "ppo"])
    (tmp_path / "recipe.yaml").touch()
    result = run_cli("benchmark", tmp_path, "--tasks", "mmlu, hellaswag", "--limit", 100)
    assert asked == [(["base", "sft", "ppo"], ["mmlu", "hellaswag"], 100, False)] and not written
    assert result.out == "ppo: mmlu, acc 0.250 ± 0.040 (n = 100)\n"
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").touch()
    assert "Written" in run_cli("benchmark", tmp_path).out
    assert written == [(tmp_path / "report", [row])]


@pytest.mark.parametrize(
    "arguments, wanted",
    [(["--side-effects"], True), (["--full"], True), (["--votes"], False), (["--toxicity", "mine:score"], "mine:score")],
)
def test_evaluate_measures_side_effects_where_they_are_asked_for(run_cli, tmp_path, monkeypatch, arguments, wanted):
    asked = []
    monkeypatch.setattr("instructlite.evaluation.runs.evaluate_run", lambda run, **options: asked.append(options["side_effects"]) or "")
    monkeypatch.setattr("instructlite.commands.evaluating._votes", lambda run: [])
    (tmp_path / "recipe.yaml").write_text(recipes()["smollm2-135m"].read_text(encoding="utf-8"), encoding="utf-8")
    result = run_cli("evaluate", tmp_path, *arguments)
    assert result.code == 0, result.err
    assert [getattr(options, "toxicity", options) for options in asked] == [wanted]
