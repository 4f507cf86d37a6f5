"""The predicted time is what was measured of the machine times the tokens that the stages really go through."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from instructlite.cli import app
from instructlite.config import load_loop
from instructlite.data.records import write_records
from instructlite.errors import InstructLiteError
from instructlite.models import sampling
from instructlite.planning import calibration
from instructlite.planning.bases import shapes_of
from instructlite.planning.calibration import Speed, keep, key_of, speed_of
from instructlite.planning.devices import Device
from instructlite.planning.lengths import lengths_of
from instructlite.planning.measuring import measure
from instructlite.planning.plan import notices, plan
from instructlite.planning.stages import asked_of
from instructlite.planning.timing import Part, durations, in_words, parts_in

BENCH = Path(__file__).parent.parent / "bench"
CPU = Device(False, 16e9)
NOTHING = Speed(**{field.name: 0.0 for field in fields(Speed)})


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("INSTRUCTLITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small(tiny_path, tmp_path_factory):
    """The tiny base and a few rows in place of the recipe's own."""
    here = tmp_path_factory.mktemp("data")
    rows = [{"prompt": "p" * (i % 9 + 1) + str(i), "completion": "c" * (3 * i % 50)} for i in range(40)]
    write_records(here / "d.jsonl", [row for row in rows if row["completion"]])
    write_records(here / "c.jsonl", [{"prompt": f"q{i}", "chosen": "a" * (i % 40 + 1), "rejected": "b" * (i % 7 + 1)} for i in range(60)])
    parts = ("data.heldout_demonstrations=8", "data.heldout=10", "data.judge=15", "evaluation.samples=2")
    return [
        f"model={tiny_path}",
        "lora.top_layers=1",
        f"data.demonstrations={here / 'd.jsonl'}",
        f"data.comparisons={here / 'c.jsonl'}",
        *parts,
    ]


def tiny(small, *overrides):
    return load_loop("smollm2-135m", [*small, *overrides], complete=False)


def seconds_of(loop, count=1, **speed):
    """By stage, where only this takes time: seconds are then tokens."""
    device, lengths = replace(CPU, count=count), lengths_of(loop)
    found = durations(loop, replace(NOTHING, **speed), device, shapes_of(loop.model), lengths)
    return {one.stage: one.seconds for one in found}


def test_batches_are_as_long_as_their_longest_sequence():
    part = Part([[3], [10], [4], [9, 2]], scale=2.0)
    assert (part.tokens, len(part), part.mean) == (56, 8, 28 / 5)
    assert part.padded(2) == 2 * (4 * 2 + 10 * 3) and part.padded(1) == 2 * (3 + 4 + 18 + 10)
    assert part.padded(2, limit=9) == 2 * (4 * 2 + 9 * 2), "the one with 10 tokens is left out"


def test_the_parts_are_the_rows_that_the_pipeline_writes(small, tmp_path):
    from instructlite.pipeline import prepare_data

    loop = tiny(small)
    prepare_data(loop.data, tmp_path / "data")
    parts, known = parts_in(loop, lengths_of(loop))
    rows = {name: entry["rows"] for name, entry in json.loads((tmp_path / "data" / "data.json").read_text())["files"].items()}
    assert known and {name: len(part) for name, part in parts.items()} == rows


@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (2, 0.5)])
def test_what_ppo_goes_through(small, count, share):
    """12 rollouts of 32 answers of at most 48 tokens; 2 epochs on each, for the policy and the value."""
    loop = tiny(small)
    parts, _ = parts_in(loop, lengths_of(loop))
    answer = min(48, parts["demonstrations"].answers / len(parts["demonstrations"]))
    width = parts["prompts"].mean + answer
    expected = {
        "sample": 12 * 32 * 48, "shared": 12 * 32 * width, "upper": 12 * 32 * width * 4, "learn": 12 * 32 * width * 4, "read": 0,
        "head": 12 * 32 * answer * 2, "head_learnt": 12 * 32 * answer * 2, "load": 1,
    }  # fmt: skip
    assert {name: seconds_of(loop, **{name: 1.0})["ppo"] for name in expected} == pytest.approx(expected)
    apart = tiny(small, "ppo.training.share_lower_layers=false", "ppo.watch_reward=judge")
    assert seconds_of(apart, shared=1.0)["ppo"] == pytest.approx(12 * 32 * width * (5 + 4))
    padded = tiny(small, "ppo.training.padding_free=false")
    assert seconds_of(padded, shared=1.0)["ppo"] == 12 * 32 * (max(map(max, parts["prompts"].rows)) + 48)
    episodes = tiny(small, "ppo.training.total_episodes=320")
    assert seconds_of(episodes, count, sample=1.0)["ppo"] == pytest.approx(share * 320 * 48)
    epochs = tiny(small, "ppo.training.max_steps=-1", "ppo.training.num_train_epochs=2")
    assert seconds_of(epochs, sample=1.0)["ppo"] == pytest.approx(2 * len(parts["prompts"]) * 48)
    texts = tiny(small, "ppo.ptx_data=demonstrations")
    assert seconds_of(texts, learn=1.0)["ppo"] == pytest.approx(expected["learn"] + 12 * 64 * min(512, parts["demonstrations"].mean))


def test_what_sft_and_the_reward_model_go_through(small):
    loop = tiny(small)
    parts, _ = parts_in(loop, lengths_of(loop))
    sft, reward = parts["demonstrations"].padded(8, 1024), parts["reward"].padded(4, 256)
    held = parts["heldout"].padded(16, 256) + parts["demonstrations"].padded(16, 256)
    assert seconds_of(loop, train=1.0)["sft"] == sft and seconds_of(loop, train=1.0)["reward"] == reward
    assert seconds_of(loop, read=1.0)["reward"] == held and seconds_of(loop, lower=1.0)["reward"] == reward + held
    assert seconds_of(loop, read=1.0)["sft"] == 2 * parts["heldout_demonstrations"].padded(16, 1024), "before and after"
    twice = tiny(small, "sft.training.num_train_epochs=2", "sft.training.gradient_checkpointing=true", "reward.ensemble=3")
    assert seconds_of(twice, train=1.0)["sft"] == 2 * sft and seconds_of(twice, 2, train=1.0)["sft"] == sft
    again = seconds_of(twice, read=1.0)["sft"] - seconds_of(loop, read=1.0)["sft"]
    assert again == 2 * sft, "checkpointing computes everything once more"
    assert seconds_of(twice, train=1.0)["reward"] == 3 * reward and seconds_of(twice, train=1.0)["judge"] > 0
    steps = tiny(small, "sft.training.max_steps=10")
    assert seconds_of(steps, train=1.0)["sft"] == pytest.approx(sft * 10 * 8 / len(parts["demonstrations"]))
    sampled = tiny(small, "reward.policy_samples=0.5")
    assert seconds_of(sampled, sample=1.0)["reward"] == 0.5 * len(parts["reward"]) * 128


def test_more_candidates_take_longer_and_dpo_reads_with_its_reference(small):
    loop, more = tiny(small), tiny(small, "also.dpo=")
    assert seconds_of(loop, answer=1.0)["report"] == 10 * 3 * (2 + 1) * 48
    assert seconds_of(more, score=1.0)["report"] > seconds_of(loop, score=1.0)["report"] > 10 * 3 * 3 * 2
    assert seconds_of(more, answer=1.0)["report"] == 10 * 4 * (2 + 1) * 48
    named = tiny(small, "evaluation.candidates=[base, sft, best-of-4, ppo]", "evaluation.greedy=false")
    assert seconds_of(named, answer=1.0)["report"] == 10 * (3 + 4) * 2 * 48
    assert seconds_of(more, head=1.0)["dpo"] > parts_in(loop, lengths_of(loop))[0]["reward"].answers


def test_data_that_is_not_here_is_planned_by_the_thousand(small, tmp_path):
    loop = tiny(small, "data.demonstrations=org/talk", "sft.training.max_steps=-1", "evaluation.prompts=null")
    found = {
        one.stage: one for one in durations(loop, replace(NOTHING, train=1.0, sample=1.0), CPU, shapes_of(loop.model), lengths_of(loop))
    }
    assert {stage: one.known for stage, one in found.items()} == {
        "sft": False,
        "reward": False,
        "judge": False,
        "ppo": True,
        "report": False,
    }
    assert str(found["sft"]).endswith(" per 1,000 rows") and "per" not in str(found["ppo"])
    write_records(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "completion": "c" * 10} for i in range(3000)])
    here = tiny(small, f"data.demonstrations={tmp_path / 'd.jsonl'}", "data.demonstration_limit=null")
    parts, known = parts_in(here, lengths_of(here))
    assert known and len(parts["demonstrations"]) == 3000 - 8 and len(parts["demonstrations"].rows) < 2000


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (700, "12 min"), (5400, "1.5 h"), (40 * 3600, "1.7 d")]
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


# --- what is measured --------------------------------------------------------------------------------------------------------


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr("instructlite.planning.measuring.SECONDS", 0.0)


def test_everything_is_measured_and_the_model_samples_whole_answers(small, briefly, monkeypatch):
    drawn = []

    def counting(model, prompts, roles, chosen, **options):
        answers = sampling.generate(model, prompts, roles, chosen, **options)
        drawn.append((len(prompts), len(set(roles)), {len(answer) for answer in answers} == {chosen.max_new_tokens}))
        return answers

    def measured(*overrides):
        loop = tiny(small, *overrides)
        return measure(loop, asked_of("ppo", loop, CPU, shapes_of(loop.model), lengths_of(loop)))

    monkeypatch.setattr("instructlite.planning.measuring.generate", counting)
    before = torch.random.get_rng_state()
    speed = measured("evaluation.batch_size=5", "ppo.training.generation_batch_size=7")
    assert all(math.isfinite(value) and value > 0 for value in asdict(speed).values())
    assert drawn == [(7, 1, True), (7, 1, True), (5, 2, True), (5, 2, True)]
    assert torch.equal(torch.random.get_rng_state(), before)
    everywhere = measured("lora.top_layers=null", "ppo.training.padding_free=false")
    assert everywhere.lower == everywhere.shared == 0 and everywhere.read > 0


def test_what_was_measured_is_kept_for_the_same_machine_base_adapters_and_batches(small, monkeypatch):
    def key(*overrides):
        loop = tiny(small, *overrides)
        return key_of(loop, shapes_of(loop.model), lengths_of(loop), CPU)

    speed = replace(NOTHING, load=2.0)
    path = keep(key(), speed)
    keep("another", NOTHING)
    assert speed_of(key()) == speed == speed_of(key("ppo.training.learning_rate=1e-4", "sft.training.max_length=64"))
    for other in (
        "lora.r=8",
        "quantization=nf4",
        "dtype=float32",
        "ppo.training.num_mini_batches=2",
        "evaluation.batch_size=8",
        "ppo.training.padding_free=false",
    ):
        assert speed_of(key(other)) is None, other
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "device_name", lambda: "another machine")
        assert speed_of(key()) is None
    path.write_text(json.dumps({key(): {"forward": 1.0}}))
    assert speed_of(key()) is None, "of another version"
    path.write_text("{")
    assert speed_of(key()) is None
    keep(key(), speed)
    assert speed_of(key()) == speed


# --- the commands ------------------------------------------------------------------------------------------------------------


def test_plan_measures_once_and_says_the_time_from_then_on_without_torch(small, briefly):
    words = ["plan", "smollm2-135m", *small]
    before = CliRunner().invoke(app, words).output
    assert "Time: not calibrated: add --calibrate." in before
    measured = CliRunner().invoke(app, [*words, "--calibrate"])
    assert measured.exit_code == 0, measured.output
    code = f"""
import sys
from instructlite.cli import main
try: main({words!r})
except SystemExit as end: assert not end.code
assert not {{"torch", "transformers", "trl", "datasets"}} & set(sys.modules), "loaded torch"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.partition("Time: ")[2].splitlines()[0]
    assert said.startswith("about ") and "tokens a second" in said and "sft" in said and "report" in said
    assert said in measured.output
    assert "not calibrated" in CliRunner().invoke(app, [*words, "--gpu", "8GB"]).output, "it is another machine"


def test_this_machine_is_not_measured_for_another(capsys):
    with pytest.raises(InstructLiteError, match="--calibrate measures this machine"):
        CliRunner().invoke(app, ["plan", "smollm2-135m", "--gpu", "8GB", "--calibrate"], catch_exceptions=False)


def test_a_run_says_beforehand_how_long_it_will_take(small):
    loop = tiny(small)
    assert not [line for line in notices(loop) if line.startswith("time:")]
    planned = plan(loop, CPU)
    from instructlite.planning.devices import this_device

    keep(key_of(loop, shapes_of(loop.model), planned.lengths, this_device()), replace(NOTHING, load=60.0))
    (line,) = [line for line in notices(loop) if line.startswith("time:")]
    assert line == "time: about 5.0 min (sft 60 s, reward 60 s, judge 60 s, ppo 60 s, report 60 s) as measured on this machine"


def test_the_bench_compares_times(small, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import plan_vs_measured
    import yaml

    loop = tiny(small)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(loop.to_dict()))
    (tmp_path / "stages.json").write_text(json.dumps({"sft": {"seconds": 50.0}, "ppo": {"seconds": 80.0}}))
    with pytest.raises(InstructLiteError, match="--calibrate measures it"):
        plan_vs_measured.main([str(tmp_path), "--time"])
    from instructlite.planning.devices import this_device

    keep(key_of(loop, shapes_of(loop.model), lengths_of(loop), this_device()), replace(NOTHING, load=60.0))
    plan_vs_measured.main([str(tmp_path), "--time", "--json", str(tmp_path / "out.json")])
    assert [case["ratio"] for case in json.loads((tmp_path / "out.json").read_text())["cases"]] == [1.2, 0.75]
    assert "largest error 25 % of 2 cases" in capsys.readouterr().out
