"""Two processes (gloo, CPU) give the numbers of one process with the same global batch: T-17 of the PPO design.

The processes are forks of a server that has imported everything once, and each test looks at one run from several sides.
What is sampled depends on the process by design, so here every prompt has an answer of its own, whoever answers it.
"""

import io
import json
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from processes import in_two_processes
from test_ppo_trainer import PTX, config, digest, roles, share_of_vowels

from instructlite.cli import main
from instructlite.data.records import write_records
from instructlite.errors import InstructLiteError
from instructlite.models.base import load_base
from instructlite.models.manifest import Adapter
from instructlite.models.sampling import generate
from instructlite.training import rollout
from instructlite.training.ppo_config import PPOConfig
from instructlite.training.ppo_trainer import PPOTrainer

EVAL = [{"prompt": "a question " * n} for n in range(1, 6)]
SHAPE = {1: dict(per_device_train_batch_size=16), 2: dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)}
STOPS = [2, *range(40, 60)]  # so many that the answers have different lengths


def answer_by_prompt(model, prompts, role, sampling, *, stop_ids, seed, batch_size):
    """`generate`, but what is drawn depends on the prompt alone, not on its batch and process."""
    return [generate(model, [ids], role, sampling, stop_ids=stop_ids, seed=sum(ids), batch_size=1)[0] for ids in prompts]


def vowels(prompts, completions, **kwargs) -> list[float | None]:
    """None now and then, and two things to log, one of them by a single process."""
    kwargs["log_metric"]("length", len(completions[0]))
    if os.environ.get("RANK") == "1":
        kwargs["log_metric"]("of_the_second", 3.0)
    return [None if len(text) % 4 == 0 else sum(letter in "aeiou" for letter in text) for text in completions]


def trainer_of(base: str, out: str, processes: int, **changes) -> PPOTrainer:
    torch.set_num_threads(1)
    rollout.generate = answer_by_prompt
    model = roles(load_base(base, dtype="float32", chat_template="chatml"), top_layers=2)
    options = dict(
        num_mini_batches=1, num_ppo_epochs=3, max_steps=9, kl_controller="adaptive", target=0.1, horizon=50, ptx_coef=0.1, ema_decay=0.9,
        save_strategy="steps", save_steps=4, target_kl=TARGET_KL, learning_rate=1e-3, score_normalization="running", stop_token_ids=STOPS,
        gradient_checkpointing=processes > 1, adam_epsilon=1e-6,
    )  # fmt: skip
    args = config(Path(out), **(options | SHAPE[processes] | changes))
    trainer = PPOTrainer(
        model, args, train_dataset=[{"prompt": "why " * (n % 7) + "x" * n} for n in range(1, 49)], eval_dataset=EVAL, ptx_dataset=PTX,
        reward_model={"learnt": "reward", "vowels": vowels, "share": share_of_vowels},
    )  # fmt: skip
    trainer.health.say = lambda line: None
    return trainer


TARGET_KL = 0.015  # 1.5 times this is passed in the second step of the first cycle and not in the others


def train(base: str, out: str, processes: int, resume: bool = False) -> dict:
    """One training, and all that is compared of it."""
    trainer = trainer_of(base, out, processes)
    advantages, original = [], trainer._assign_advantages

    def remember(batch):
        metrics = original(batch)
        advantages.append(batch.advantages[batch.mask])
        return metrics

    trainer._assign_advantages = remember
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4" if resume else None)
    trainer._assign_advantages = original
    weights = {role: [p.detach() for p in trainer.unwrapped.role_parameters(role)] for role in ("policy", "value", "ema")}
    return {
        "weights": {role: torch.cat([p.flatten() for p in parameters]) for role, parameters in weights.items()},
        "sha256": digest([p for parameters in weights.values() for p in parameters]),
        "kl_coef": trainer.kl_coef,
        "scales": trainer.rewards.state(),
        "health": trainer.health.state(),
        "known": trainer.health.known.mean,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "advantages": advantages,
        "evaluation": trainer.evaluate(),
    }


def stop_together(base: str, out: str, processes: int, where: str) -> dict:
    """What each process says where something breaks in the second process only, in the second cycle."""
    trainer = trainer_of(base, out, processes, save_strategy="no", target_kl=None, kl_controller="fixed")
    second, original = os.environ["RANK"] == "1", trainer.rewards.score

    def score(batch):
        original(batch)
        if second and trainer.state.global_step > 0:
            if where == "reward":
                raise InstructLiteError("the reward of the second process is broken")
            batch.values[0, 0] = float("inf")

    trainer.rewards.score = score
    with pytest.raises(InstructLiteError) as error:
        trainer.train()
    return {"said": str(error.value), "step": trainer.state.global_step}


@pytest.fixture(scope="module")
def one(tiny_path, tmp_path_factory):
    before = rollout.generate
    yield train(str(tiny_path), str(tmp_path_factory.mktemp("one")), 1)
    rollout.generate = before


@pytest.fixture(scope="module")
def two(tiny_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return in_two_processes(train, tiny_path, out), out


def test_t17_two_processes_learn_what_one_with_the_same_global_batch_learns(one, two):
    (first, second), _ = two
    assert first["sha256"] == second["sha256"]
    for role, weights in one["weights"].items():
        assert (first["weights"][role] - weights).abs().max() < 1e-5, role
    assert (one["weights"]["policy"] - one["weights"]["ema"]).abs().max() > 1e-3, "it has learnt something"


def test_t17_advantages_are_whitened_over_all_processes(one, two):
    (first, second), _ = two
    for ours, theirs, whole in zip(first["advantages"], second["advantages"], one["advantages"], strict=True):
        both = torch.cat([ours, theirs])
        assert (both - whole).abs().max() < 1e-5
        assert abs(both.mean()) < 1e-6 and abs(both.std(unbiased=False) - 1) < 1e-4
        assert abs(ours.mean()) > 1e-3, "one process alone is not whitened"


def test_t17_kl_coefficient_scales_and_health_are_those_of_all_processes(one, two):
    (first, second), _ = two
    for name in ("kl_coef", "scales", "health"):
        assert first[name] == second[name], name
    assert first["kl_coef"] != 0.05
    assert first["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-6)
    for name, scale in one["scales"].items():
        assert first["scales"][name] == pytest.approx(scale, rel=1e-5, abs=1e-6)
    assert torch.allclose(first["known"], one["known"], atol=1e-5)
    assert first["health"]["said"].keys() == one["health"]["said"].keys()


# Of each process by itself: times, and how much of its own grid is padding.
OWN = ("rollout/time_generate", "rollout/time_score", "rollout/time_train", "rollout/tokens_per_s", "rollout/padding_fraction")


def test_t17_the_log_is_that_of_all_processes(one, two):
    (first, second), _ = two
    logged = [log for log in one["logs"] if "objective/score" in log]
    assert len(logged) == 3
    assert {"rewards/learnt/mean", "rewards/vowels/std", "ptx/loss", "policy/clip_frac", "watch/outlier_frac"} <= logged[1].keys()
    for ours, theirs, whole in zip(first["logs"], second["logs"], one["logs"], strict=True):
        assert ours == theirs
        for name in whole.keys() - {*OWN, "length"}:
            assert ours[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
        assert ours.keys() - whole.keys() <= {"of_the_second"}
    assert any("of_the_second" in log for log in first["logs"])


def test_t17_all_processes_skip_the_rest_of_a_cycle_or_none_does(one, two):
    (first, _), _ = two
    stopped = [log["step"] for log in first["logs"] if "policy/stopped_early" in log]
    assert stopped == [log["step"] for log in one["logs"] if "policy/stopped_early" in log]
    assert 0 < len(stopped) < 3


def test_evaluation_is_shared_out_and_gives_the_same_numbers(one, two):
    (first, second), _ = two
    for name in ("objective/score", "objective/kl", "objective/score_std", "rollout/length_mean", "rollout/unique_frac"):
        assert first["evaluation"][f"eval_{name}"] == second["evaluation"][f"eval_{name}"]
        assert first["evaluation"][f"eval_{name}"] == pytest.approx(one["evaluation"][f"eval_{name}"], abs=1e-5)


def test_two_processes_resume_bit_for_bit_in_the_middle_of_a_cycle(two, tiny_path):
    (first, _), out = two
    checkpoint = out / "checkpoint-4"
    assert (checkpoint / "rollout_1.safetensors").is_file() and json.loads((checkpoint / "ppo_state.json").read_text())["rollout"]
    again = in_two_processes(train, tiny_path, out, True)
    assert again[0]["sha256"] == first["sha256"] == again[1]["sha256"]
    assert again[0]["scales"] == first["scales"] and again[0]["kl_coef"] == first["kl_coef"]


@pytest.mark.parametrize(("where", "said"), [("reward", "the reward of the second process is broken"), ("values", "not finite")])
def test_what_breaks_in_one_process_stops_all_with_a_checkpoint(where, said, tiny_path, tmp_path):
    results = in_two_processes(stop_together, tiny_path, tmp_path, where)
    assert results[0] == results[1] and said in results[0]["said"]
    assert results[0]["step"] == 3 and (tmp_path / "checkpoint-3" / "ppo_state.json").is_file()


RECIPE = """\
model: {base}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8, top_layers: 1}}
data: {{demonstrations: {out}/d.jsonl, comparisons: {out}/c.jsonl, judge: 8, heldout: 8}}
sft: {{training: {{max_steps: 2, per_device_train_batch_size: 2, gradient_checkpointing: false}}}}
reward: {{training: {{max_steps: 2, per_device_train_batch_size: 2, gradient_checkpointing: false}}}}
ppo:
  ptx_data: demonstrations
  training: {{per_device_train_batch_size: 2, num_mini_batches: 2, num_ppo_epochs: 2, max_steps: 8, response_length: 6, save_steps: 1}}
evaluation: {{prompts: 3, samples: 1, max_new_tokens: 4, greedy: false}}
"""


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `instructlite ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(list(arguments))
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def loop_and_resumed_loop(base: str, out: str, processes: int) -> dict:
    torch.set_num_threads(1)
    recipe, run = f"{out}/recipe.yaml", f"{out}/run"
    whole = command("run", recipe, "--output", run)
    if whole[0]:
        return {"whole": whole}
    before = Adapter.load(f"{run}/ppo").sha256
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        shutil.rmtree(f"{run}/ppo")
    torch.distributed.barrier()
    original = PPOTrainer.training_step

    def interrupted(self, *arguments):
        if self.state.global_step == 5 and os.environ["RANK"] == "1":  # in the middle of the second cycle
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    PPOTrainer.training_step = interrupted
    stopped = command("run", recipe, "--output", run, "--only", "ppo")
    PPOTrainer.training_step = original
    resumed = command("run", recipe, "--output", run, "--resume")
    torch.distributed.barrier()
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "before": before, "after": Adapter.load(f"{run}/ppo").sha256}


def test_the_whole_loop_trains_in_two_processes_and_one_of_them_reports(tiny_path, tmp_path):
    write_records(tmp_path / "d.jsonl", [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)])
    rows = [{"prompt": f"ask {i}", "chosen": f"good {i}", "rejected": "bad" * (1 + i % 3)} for i in range(40)]
    write_records(tmp_path / "c.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(base=tiny_path, out=tmp_path))
    first, second = in_two_processes(loop_and_resumed_loop, tiny_path, tmp_path)
    assert [first["whole"][0], second["whole"][0]] == [0, 0], first["whole"][2] + second["whole"][2]
    assert "win rate of a" in first["whole"][1] and second["whole"][1:] == ("", "")
    run = tmp_path / "run"
    stages = ["data", "sft", "reward", "judge", "ppo", "report"]
    assert sorted(path.name for path in run.iterdir()) == sorted([*stages, "recipe.yaml", "stages.json"])
    ppo = Adapter.load(run / "ppo")
    assert ppo.metrics["episodes"] == 16 and json.loads((ppo.path / "run.json").read_text())["made_from"]["processes"] == 2
    # SIGTERM reaches one process only; all save the same step, and go on from it
    assert first["stopped"][0] == second["stopped"][0] == 143
    assert "after step 6" in first["stopped"][2] and "--resume" in first["stopped"][2] and second["stopped"][2] == ""
    assert first["resumed"][0] == second["resumed"][0] == 0 and "going on after step 6" in first["resumed"][2]
    assert first["after"] == first["before"]


@pytest.mark.parametrize(
    ("given", "environment"), [({"fsdp": True}, {}), ({"deepspeed": "zero.json"}, {}), ({}, {"ACCELERATE_USE_FSDP": "true"})]
)
def test_what_shards_the_model_is_refused_before_anything_is_loaded(given, environment, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InstructLiteError, match="plain DDP.*quantization=nf4"):
        PPOConfig(output_dir=str(tmp_path), **given)
