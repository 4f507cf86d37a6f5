"""The loop's wiring: what is split, what each stage is given, what is done again. The recipes are stand-ins that write no weights."""

import json
import os
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import yaml

from instructlite import pipeline
from instructlite.config import DataOptions, load_loop
from instructlite.data.records import read_records, write_records
from instructlite.errors import BadRecords, InstructLiteError
from instructlite.models.manifest import Adapter
from instructlite.pipeline import in_own_process, prepare_data, run_loop
from instructlite.training.work import locked


def opening(record: dict) -> str:
    return record["prompt"][0]["content"]


@pytest.fixture
def files(tmp_path):
    demonstrations = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]
    comparisons = [{"prompt": f"ask {i}" + " at length" * (i % 4 == 0), "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    comparisons += [{**row, "chosen": row["chosen"] + "!"} for row in comparisons[:5]]
    paths = SimpleNamespace(demonstrations=tmp_path / "d.jsonl", comparisons=tmp_path / "c.jsonl", rankings=tmp_path / "r.jsonl")
    write_records(paths.demonstrations, demonstrations)
    write_records(paths.comparisons, comparisons)
    write_records(paths.rankings, [{"prompt": f"rank {i}", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]} for i in range(6)])
    return paths


def options(files, **changes) -> DataOptions:
    return DataOptions(demonstrations=str(files.demonstrations), comparisons=str(files.comparisons), **changes)


def parts(directory) -> dict[str, list[dict]]:
    return {path.stem: read_records(path) for path in directory.glob("*.jsonl")}


def test_no_prompt_is_in_two_parts_and_none_is_lost(files, tmp_path):
    prepare_data(options(files, judge=12, heldout=0.2), tmp_path / "data")
    found = parts(tmp_path / "data")
    openings = [{opening(row) for row in found[name]} for name in ("reward", "judge", "heldout")]
    assert not openings[0] & openings[1] | openings[0] & openings[2] | openings[1] & openings[2]
    assert sum(len(found[name]) for name in ("reward", "judge", "heldout")) == 45
    assert len(set.union(*openings)) == 40
    assert abs(len(found["judge"]) - 12) <= 2, "rows of one prompt stay together"
    assert abs(len(found["heldout"]) - 9) <= 2
    assert not {opening(row) for row in found["demonstrations"]} & {opening(row) for row in found["heldout_demonstrations"]}
    assert (len(found["demonstrations"]), len(found["heldout_demonstrations"])) == (18, 2)


def test_ppo_gets_each_prompt_of_the_reward_part_once_and_evaluation_those_held_out(files, tmp_path):
    prepare_data(options(files), tmp_path / "data")
    found = parts(tmp_path / "data")
    assert len({opening(row) for row in found["prompts"]}) == len(found["prompts"])
    assert {opening(row) for row in found["prompts"]} == {opening(row) for row in found["reward"]}
    assert {opening(row) for row in found["heldout_prompts"]} == {opening(row) for row in found["heldout"]}


def test_limits_take_rows_away_and_data_json_counts_what_was_written(files, tmp_path):
    limits = {"demonstration_limit": 7, "comparison_limit": 11, "prompt_limit": 4, "prompt_characters": 6}
    prepare_data(options(files, **limits), tmp_path / "data")
    found = parts(tmp_path / "data")
    assert len(found["demonstrations"]) == 7
    assert 11 <= len(found["reward"]) <= 12
    assert len(found["prompts"]) == 4
    assert all(len(opening(row)) <= 6 for row in found["prompts"] + found["heldout_prompts"])
    written = json.loads((tmp_path / "data" / "data.json").read_text())
    assert {name: part["rows"] for name, part in written["files"].items()} == {name: len(rows) for name, rows in found.items()}


def test_rankings_are_trained_on_and_held_out_with_the_comparisons(files, tmp_path):
    prepare_data(options(files, rankings=str(files.rankings)), tmp_path / "data")
    found = parts(tmp_path / "data")
    rows = [row for name in ("reward", "judge", "heldout") for row in found[name]]
    assert sorted(len(row["responses"]) for row in rows) == [2] * 45 + [3] * 6


def test_comparisons_with_long_answers_go_to_the_judge(files, tmp_path):
    long = [{"prompt": f"long {i}", "chosen": "x" * 9, "rejected": "y"} for i in range(5)]
    rows = [json.loads(line) for line in files.comparisons.read_text().splitlines()]
    shared = {**rows[0], "rejected": "z" * 9}  # its prompt is in a part already
    write_records(files.comparisons, [*rows, *long, shared])
    prepare_data(options(files, answer_characters=8, judge=10, heldout=5), tmp_path / "data")
    found = parts(tmp_path / "data")
    assert {row["prompt"] for row in long} <= {opening(row) for row in found["judge"]}
    for name in ("reward", "heldout"):
        assert all(max(len(row["chosen"]), len(row["rejected"])) <= 8 for row in found[name])
        assert not {opening(row) for row in found[name]} & {opening(row) for row in found["judge"]}


def test_a_part_may_be_a_file_of_its_own(files, tmp_path):
    own = tmp_path / "own.jsonl"
    write_records(own, [{"prompt": "mine", "chosen": "a", "rejected": "b"}])
    prepare_data(options(files, judge=str(own), heldout=5), tmp_path / "data")
    found = parts(tmp_path / "data")
    assert [opening(row) for row in found["judge"]] == ["mine"]
    assert len(found["reward"]) == 45 - len(found["heldout"])


def test_faults_of_all_files_are_told_together(files, tmp_path):
    files.demonstrations.write_text('{"prompt": "q", "completion": ""}\n')
    files.comparisons.write_text('{"prompt": "q", "chosen": "a"}\n')
    with pytest.raises(BadRecords) as error:
        prepare_data(options(files), tmp_path / "data")
    assert re.search(r"d\.jsonl:1: .*\n.*c\.jsonl:1: ", str(error.value))
    assert not (tmp_path / "data").exists()


def test_parts_that_leave_nothing_are_refused(files, tmp_path):
    with pytest.raises(InstructLiteError, match=r"data.judge=40 \+ data.heldout=5 takes all 45 rows"):
        prepare_data(options(files, judge=40, heldout=5), tmp_path / "data")
    with pytest.raises(InstructLiteError, match="data.prompt_characters=2 leaves no prompts"):
        prepare_data(options(files, prompt_characters=2), tmp_path / "data")


@pytest.fixture
def stood_in(files, tmp_path, monkeypatch):
    """A loop whose recipes and evaluation only note what they were given; `calls` holds that, `fails` names stages that break."""
    state = SimpleNamespace(calls=[], resumed=[], fails=set(), run=tmp_path / "run", said=[])

    class Recipe:
        def __init__(self, **arguments):
            self.arguments = arguments

        @classmethod
        def check_training(cls, training):
            if "max_step" in training:
                raise InstructLiteError("training.max_step: no such option")

        def run(self, path, resume):
            state.resumed.append((path.name, resume))
            state.calls.append((path.name, self.arguments))
            if path.name in state.fails:
                raise KeyboardInterrupt
            path.mkdir(exist_ok=True)
            (path / "adapter_config.json").write_text("{}")
            made_from = {key: value.read_text() if str(value).endswith("jsonl") else str(value) for key, value in self.arguments.items()}
            (path / "instructlite.json").write_text(json.dumps(made_from))
            return SimpleNamespace(
                metrics={
                    "eval_accuracy": 0.7,
                    "eval_accuracy_low": 0.6,
                    "eval_accuracy_high": 0.8,
                    "eval_pairs": 9,
                    "eval_longer_wins": 0.5,
                    "eval_length_correlation": 0.25,
                }
            )

    def evaluate(candidates, **arguments):
        state.calls.append(("report", {"candidates": candidates, **arguments}))
        arguments["output_dir"].mkdir(exist_ok=True)
        (arguments["output_dir"] / "report.json").write_text("{}")
        return "the report"

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: m\nlora: {{top_layers: 3}}\nppo: {{training: {{max_steps: 96}}}}\n"
        f"data: {{demonstrations: {files.demonstrations}, comparisons: {files.comparisons}, judge: 10, heldout: 10}}\n"
    )

    def loop(*overrides):
        return load_loop(recipe, overrides)

    def go(*overrides, only=None, resume=False):
        state.calls.clear()
        state.resumed.clear()
        state.said.clear()
        result = run_loop(loop(*overrides), state.run, only=only, resume=resume, say=state.said.append)
        return result, [name for name, _ in state.calls]

    monkeypatch.setattr(pipeline, "recipe_class", lambda stage: Recipe)
    monkeypatch.setattr("instructlite.evaluation.compare.evaluate", evaluate)
    state.go, state.loop = go, loop
    return state


ALL = ["sft", "reward", "judge", "ppo", "report"]


def test_another_tracker_is_no_reason_to_train_again(stood_in):
    stood_in.go()
    assert stood_in.go("report_to=tensorboard")[1] == []
    assert stood_in.go("report_to=tensorboard", "sft.training.learning_rate=1")[1][0] == "sft"


def test_stages_run_in_order_each_on_what_came_before(stood_in):
    result, ran = stood_in.go()
    run, given = stood_in.run, dict(stood_in.calls)
    assert ran == ALL
    assert [stage.stage for stage in result.stages] == ["data", *ALL]
    assert given["sft"]["model"] == "m"
    assert given["sft"]["data"] == run / "data" / "demonstrations.jsonl"
    assert given["reward"]["model"] == given["judge"]["model"] == given["ppo"]["model"] == run / "sft"
    assert given["reward"]["data"] == run / "data" / "reward.jsonl"
    assert given["judge"]["data"] == run / "data" / "judge.jsonl"
    assert given["reward"]["eval_data"] == given["judge"]["eval_data"] == run / "data" / "heldout.jsonl"
    assert given["ppo"]["reward"] == run / "reward"
    assert given["report"]["candidates"] == ["base", str(run / "sft"), str(run / "ppo")]
    assert given["report"]["judge"][0] == str(run / "judge"), "the judge that PPO did not see comes first"
    assert given["report"]["samples"] == 2
    assert given["ppo"]["training"]["max_steps"] == 96
    assert given["ppo"]["lora"].top_layers == 3
    assert result.report == "the report"
    assert (
        sum(
            "accuracy 0.70 [0.60, 0.80] on 9 held-out pairs (the longer answer wins in 0.50; margin and length correlate 0.25)" in line
            for line in stood_in.said
        )
        >= 2
    )
    assert all(stage.seconds >= 0 and stage.peak_rss_mb > 0 for stage in result.stages[1:])


def test_the_judge_watches_ppo_where_that_is_asked_for(stood_in):
    stood_in.go()
    assert "watch_reward" not in dict(stood_in.calls)["ppo"]
    _, ran = stood_in.go("ppo.watch_reward=judge")
    assert ran == ["ppo", "report"] and dict(stood_in.calls)["ppo"]["watch_reward"] == stood_in.run / "judge"


def test_what_is_done_is_kept(stood_in):
    stood_in.go()
    result, ran = stood_in.go()
    assert ran == []
    assert [stage.stage for stage in result.stages if stage.skipped] == ALL
    assert sum("kept from before" in line for line in stood_in.said) == 5


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("ppo.kl_coef=0.2", ["ppo", "report"]),
        ("reward.training.max_steps=3", ["reward", "judge", "ppo", "report"]),
        ("judge.training.max_steps=3", ["judge", "report"]),
        ("lora.r=4", ALL),
        ("evaluation.samples=3", ["report"]),
        ("data.prompt_limit=5", ["ppo", "report"]),
        ("data.seed=1", ALL),
    ],
)
def test_a_change_redoes_the_stages_it_touches_and_those_after_them(stood_in, override, again):
    stood_in.go()
    assert stood_in.go(override)[1] == again


def test_a_stage_trained_anew_by_hand_redoes_what_came_from_it(stood_in):
    stood_in.go()
    (stood_in.run / "reward" / "instructlite.json").write_text('{"another": "adapter"}')
    assert stood_in.go()[1] == ["ppo", "report"]


def test_an_interrupted_stage_starts_over_and_the_finished_ones_do_not(stood_in):
    stood_in.fails = {"judge"}
    with pytest.raises(KeyboardInterrupt):
        stood_in.go()
    stood_in.fails = set()
    assert stood_in.go()[1] == ["judge", "ppo", "report"]


def test_resume_goes_to_the_stages_that_are_not_done(stood_in):
    stood_in.fails = {"judge"}
    with pytest.raises(KeyboardInterrupt):
        stood_in.go()
    assert stood_in.resumed == [("sft", False), ("reward", False), ("judge", False)]
    stood_in.fails = set()
    stood_in.go(resume=True)
    assert stood_in.resumed == [("judge", True), ("ppo", True)]


def test_a_second_loop_in_the_same_directory_is_refused(stood_in):
    stood_in.run.mkdir()
    with locked(stood_in.run), pytest.raises(InstructLiteError, match="is at work there"):
        stood_in.go()
    assert not list(stood_in.run.iterdir())


def test_data_of_which_only_a_part_was_written_is_none(files, tmp_path, monkeypatch):
    prepare_data(options(files), tmp_path / "data")
    monkeypatch.setattr(pipeline, "write_records", lambda path, rows: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_data(options(files), tmp_path / "data")
    assert not (tmp_path / "data" / "data.json").exists()


def test_a_stage_interrupted_while_it_was_done_again_is_not_taken_for_done(stood_in):
    stood_in.go()
    stood_in.fails = {"ppo"}
    with pytest.raises(KeyboardInterrupt):
        stood_in.go(only="ppo")
    stood_in.fails = set()
    assert stood_in.go()[1][:1] == ["ppo"]


def test_only_runs_one_stage_even_if_it_is_done(stood_in):
    stood_in.go()
    assert stood_in.go(only="report")[1] == ["report"]
    assert stood_in.go(only="judge")[1] == ["judge"]


def test_only_says_which_stage_is_missing_before_it(stood_in):
    with pytest.raises(InstructLiteError, match="ppo needs .*sft, which is not there"):
        stood_in.go(only="ppo")
    with pytest.raises(InstructLiteError, match="--only pop: no such stage; stages: data, sft"):
        stood_in.go(only="pop")


def test_the_texts_of_ptx_are_data_of_the_run(stood_in, tmp_path):
    texts = tmp_path / "texts.jsonl"
    write_records(texts, [{"text": "once upon a time"}])
    result, _ = stood_in.go(f"ppo.ptx_data={texts}")
    assert dict(stood_in.calls)["ppo"]["ptx_data"] == stood_in.run / "data" / "ptx.jsonl"
    assert read_records(stood_in.run / "data" / "ptx.jsonl") == [{"text": "once upon a time"}]
    assert stood_in.go(f"ppo.ptx_data={texts}")[1] == []
    write_records(texts, [{"text": "and then"}])
    assert stood_in.go(f"ppo.ptx_data={texts}")[1] == ["ppo", "report"]
    stood_in.go("ppo.ptx_data=demonstrations")
    data = parts(stood_in.run / "data")
    assert data["ptx"] == data["demonstrations"]
    stood_in.go("ppo.ptx_data=starter")
    assert len(read_records(stood_in.run / "data" / "ptx.jsonl", "texts")) > 100
    assert "ptx_data" not in dict(stood_in.go()[0] and stood_in.calls)["ppo"]


def test_more_policies_are_trained_beside_ppo_and_compared_before_it(stood_in):
    stood_in.go()
    over = ("also.dpo=", "also.ppo-ptx.ptx_data=starter", "also.ppo-ptx.training.max_steps=3", "ppo.watch_reward=judge")
    _, ran = stood_in.go(*over)
    assert ran == ["ppo", "dpo", "ppo-ptx", "report"], "ppo because of its watch; what was there before it is kept"
    run, given = stood_in.run, dict(stood_in.calls)
    assert (given["dpo"]["model"], given["dpo"]["data"]) == (run / "sft", run / "data" / "reward.jsonl")
    assert given["dpo"]["eval_data"] == run / "data" / "heldout.jsonl"
    variant = given["ppo-ptx"]
    assert (variant["model"], variant["reward"], variant["watch_reward"]) == (run / "sft", run / "reward", run / "judge")
    assert (variant["training"], given["ppo"]["training"]) == ({"max_steps": 3}, {"max_steps": 96})
    assert variant["ptx_data"] == run / "data" / "ppo-ptx-texts.jsonl" and "ptx_data" not in given["ppo"]
    assert len(read_records(variant["ptx_data"], "texts")) > 100
    assert given["report"]["candidates"] == ["base", *(str(run / name) for name in ("sft", "dpo", "ppo-ptx", "ppo"))]
    assert stood_in.go(*over)[1] == []
    assert stood_in.go(*over, "dpo.training.beta=0.2")[1] == ["dpo", "report"]
    assert stood_in.go("ppo.watch_reward=judge")[1] == ["report"], "without them again"


def test_dpo_may_be_run_alone_and_stays_in_the_recipe(stood_in):
    stood_in.go()
    assert stood_in.go(only="dpo")[1] == ["dpo"]
    loop = load_loop(stood_in.run / "recipe.yaml")
    assert loop.also == {"dpo": None}
    run_loop(loop, stood_in.run)
    assert str(stood_in.run / "dpo") in dict(stood_in.calls)["report"]["candidates"]


def test_the_report_compares_whom_the_recipe_names(stood_in):
    stood_in.go("evaluation.candidates=[base, 'few-shot:3', sft, best-of-4]")
    given, run = dict(stood_in.calls)["report"], stood_in.run
    assert given["candidates"] == ["base", "few-shot:3", str(run / "sft"), "best-of-4"]
    assert (given["reward"], given["demonstrations"]) == (run / "reward", run / "data" / "demonstrations.jsonl")


def test_what_is_no_text_for_ptx_stops_before_the_first_stage(stood_in, files):
    with pytest.raises(InstructLiteError, match="ptx_data: texts or demonstrations are wanted, and one row has the keys prompt, chosen"):
        stood_in.go(f"ppo.ptx_data={files.comparisons}")
    assert not stood_in.calls


def test_a_fault_in_the_options_of_the_last_stage_stops_before_the_first(stood_in, monkeypatch):
    from instructlite.training.ppo import PPORecipe

    own = pipeline.recipe_class
    monkeypatch.setattr(pipeline, "recipe_class", lambda stage: PPORecipe if stage == "ppo" else own(stage))
    with pytest.raises(InstructLiteError, match="ptx_coef=0.2 without ptx_data"):
        stood_in.go("ppo.ptx_coef=0.2")
    assert not stood_in.calls


def test_a_misspelt_training_option_of_the_last_stage_stops_before_the_first(stood_in):
    with pytest.raises(InstructLiteError, match="max_step: no such option"):
        stood_in.go("ppo.training.max_step=3")
    assert not stood_in.calls
    assert not stood_in.run.exists()


def test_the_recipe_in_the_run_directory_is_the_one_that_ran(stood_in):
    stood_in.go("ppo.kl_coef=0.2")
    assert load_loop(stood_in.run / "recipe.yaml") == stood_in.loop("ppo.kl_coef=0.2")
    assert yaml.safe_load((stood_in.run / "recipe.yaml").read_text())["data"] == asdict(stood_in.loop().data)


TINY = """\
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8, top_layers: 1}}
data: {{demonstrations: {demonstrations}, comparisons: {comparisons}, judge: 8, heldout: 8, comparison_limit: 16}}
sft: {{training: {{max_steps: 1, gradient_checkpointing: false}}}}
reward: {{training: {{max_steps: 1, gradient_checkpointing: false}}}}
ppo: {{training: {{per_device_train_batch_size: 2, num_mini_batches: 2, num_ppo_epochs: 1, max_steps: 2, response_length: 4}}}}
evaluation: {{prompts: 3, samples: 1, max_new_tokens: 4, greedy: false}}
"""


def test_the_whole_loop_on_the_tiny_model(files, tmp_path, tiny_path):
    also = ["also.dpo.training={max_steps: 1, gradient_checkpointing: false}", "also.ppo-ptx.ptx_data=demonstrations"]
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(TINY.format(model=tiny_path, demonstrations=files.demonstrations, comparisons=files.comparisons))
    result = run_loop(load_loop(recipe, also), run)
    sft, reward, judge, ppo, dpo, ptx = (Adapter.load(run / stage) for stage in ("sft", "reward", "judge", "ppo", "dpo", "ppo-ptx"))
    assert [adapter.role for adapter in (sft, reward, judge, ppo, dpo, ptx)] == ["policy", "reward", "reward", *["policy"] * 3]
    assert reward.manifest.parents == judge.manifest.parents == {"sft": sft.sha256}
    assert ppo.manifest.parents == ptx.manifest.parents == {"sft": sft.sha256, "reward": reward.sha256}
    assert dpo.manifest.parents == {"sft": sft.sha256}
    assert len({ppo.sha256, ptx.sha256, dpo.sha256, sft.sha256}) == 4
    report = json.loads((run / "report" / "report.json").read_text())
    assert [candidate["name"] for candidate in report["candidates"]] == ["base", "sft", "dpo", "ppo-ptx", "ppo"]
    assert {rate["judge"] for rate in report["win_rates"]} == {"judge", "reward"}
    assert str(result.report)
    assert [stage.skipped for stage in run_loop(load_loop(recipe, also), run).stages] == [False, *[True] * 7]


def fail_as_users_do(path):
    raise InstructLiteError(f"{path}:3: field 'prompt': empty")


def test_a_stage_in_its_own_process_gives_its_result_its_memory_and_its_error():
    pid, peak = in_own_process(os.getpid)
    assert pid != os.getpid() and peak["peak_rss_mb"] > 0
    with pytest.raises(InstructLiteError, match="d.jsonl:3: field 'prompt': empty"):
        in_own_process(fail_as_users_do, "d.jsonl")
    with pytest.raises(InstructLiteError, match="ended with exit code 7"):
        in_own_process(os._exit, 7)
