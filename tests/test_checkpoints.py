"""Crash-safe checkpoints and exact resume: whatever kills a run, a whole checkpoint is there, and going on is as if nothing had been."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import peft.peft_model
import pytest
import torch
from safetensors.torch import load_file, save_file

from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.manifest import Adapter
from instructlite.training import sft
from instructlite.training.checkpoints import Checkpointing, checkpoints, fault, newest_verified, rotate, seal, step_of, sweep
from instructlite.training.dpo import DPORecipe
from instructlite.training.ppo import PPORecipe
from instructlite.training.reward import RewardRecipe
from instructlite.training.sft import SFTRecipe
from instructlite.training.work import publish

ROWS = [{"prompt": f"What is {i} + 1?", "completion": "It is" + "!" * (i % 5)} for i in range(18)]
PAIRS = [{"prompt": f"Say {i}", "chosen": str(i) * (1 + i % 4), "rejected": "?" * (1 + i % 3)} for i in range(18)]
# Dropout, an order of the data that is drawn anew each epoch, and logs that are not due when checkpoints are.
TRAINING = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 4, "save_steps": 1,
}  # fmt: skip
STEPS = 6
TIMES = ("seconds", "per_second", "runtime")


class Killed(BaseException):
    """Ends a run as a signal would: nothing catches it."""


@pytest.fixture
def kill_after(monkeypatch):
    """Have the training that comes next end right after this step."""
    original = Checkpointing._maybe_log_save_evaluate

    def at(step: int | None) -> None:
        def look(trainer, *args, **kwargs):
            original(trainer, *args, **kwargs)
            if trainer.state.global_step == step:
                raise Killed

        monkeypatch.setattr(Checkpointing, "_maybe_log_save_evaluate", look)

    return at


def tiny_sft(tiny_path, **changes) -> SFTRecipe:
    training = TRAINING | changes.pop("training", {})
    options = {"data": ROWS, "eval_data": ROWS[:5], "dtype": "float32", "chat_template": "chatml", "lora": Lora(r=4, alpha=8, dropout=0.2)}
    return SFTRecipe(model=str(tiny_path), training=training, **(options | changes))


def tiny_reward(tiny_path, **changes) -> RewardRecipe:
    options = {
        "data": PAIRS,
        "eval_data": PAIRS[:5],
        "dtype": "float32",
        "chat_template": "chatml",
        "lora": Lora(r=4, alpha=8, dropout=0.2),
    }
    return RewardRecipe(model=str(tiny_path), training=TRAINING, **(options | changes))


def tiny_dpo(tiny_path) -> DPORecipe:
    lora = Lora(r=4, alpha=8, dropout=0.2)
    options = {"data": PAIRS, "eval_data": PAIRS[:5], "dtype": "float32", "chat_template": "chatml", "lora": lora}
    return DPORecipe(model=str(tiny_path), training=TRAINING | {"disable_dropout": False}, **options)


def timeless(values: dict) -> dict:
    return {name: value for name, value in values.items() if not any(time in name for time in TIMES)}


def outcome(adapter: Adapter) -> tuple:
    """All that a run leaves behind, but for times."""
    lines = [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]
    return adapter.sha256, timeless(adapter.metrics), [timeless(line) for line in lines]


@pytest.mark.parametrize("build", [tiny_sft, tiny_reward, tiny_dpo])
def test_a_run_resumed_after_any_step_is_the_uninterrupted_run(build, tiny_path, tmp_path, kill_after):
    expected = outcome(build(tiny_path).run(tmp_path / "whole"))
    for step in (1, 3, 4, STEPS):  # 3 steps an epoch
        kill_after(step)
        with pytest.raises(Killed):
            build(tiny_path).run(tmp_path / "killed")
        kill_after(None)
        torch.manual_seed(step)  # whatever the process did before must not matter
        resumed = build(tiny_path).run(tmp_path / "killed", resume=True)
        assert outcome(resumed) == expected, f"resumed after step {step}"
        assert json.loads((resumed.path / "run.json").read_text())["resumed_after_step"] == step
        shutil.rmtree(resumed.path)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_run_killed_again_and_again_is_the_uninterrupted_run(tiny_path, tmp_path, kill_after):
    expected = outcome(tiny_sft(tiny_path).run(tmp_path / "whole"))
    for step in (1, 2, 4, 5):
        kill_after(step)
        with pytest.raises(Killed):
            tiny_sft(tiny_path).run(tmp_path / "killed", resume=True)
    kill_after(None)
    assert outcome(tiny_sft(tiny_path).run(tmp_path / "killed", resume=True)) == expected


def test_t12_ppo_goes_on_in_the_middle_of_a_cycle(tiny_path, tmp_path, kill_after):
    policy = tiny_sft(tiny_path, training={"max_steps": 2}).run(tmp_path / "sft")
    reward = tiny_reward(tiny_path).run(tmp_path / "reward")
    training = {"per_device_train_batch_size": 2, "num_mini_batches": 2, "num_ppo_epochs": 2, "max_steps": 8, "response_length": 6}
    ppo = PPORecipe(
        model=policy, reward=reward, data=[{"prompt": row["prompt"]} for row in ROWS],
        training=training | {"learning_rate": 1e-2, "save_steps": 1, "logging_steps": 3, "kl_controller": "adaptive"},
    )  # fmt: skip
    expected = outcome(ppo.run(tmp_path / "whole"))
    for step in (3, 4, 8):
        kill_after(step)
        with pytest.raises(Killed):
            ppo.run(tmp_path / "killed")
        kill_after(None)
        resumed = ppo.run(tmp_path / "killed", resume=True)
        sha256, metrics, lines = outcome(resumed)
        without_times = [{k: v for k, v in line.items() if "/time_" not in k and "per_s" not in k} for line in lines]
        assert (sha256, metrics) == expected[:2], f"resumed after step {step}"
        assert without_times == [{k: v for k, v in line.items() if "/time_" not in k and "per_s" not in k} for line in expected[2]]
        shutil.rmtree(resumed.path)


def test_the_best_checkpoint_is_that_of_the_whole_run_also_after_a_resume(tiny_path, tmp_path, kill_after):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the best is an early one
        "num_train_epochs": 4,
    }
    recipe = tiny_sft(tiny_path, training=best)
    expected = outcome(recipe.run(tmp_path / "whole"))
    losses = [line["eval_loss"] for line in expected[2] if "eval_loss" in line]
    assert losses.index(max(losses)) < 4 < len(losses), "the best is meant to be from before the kill, and not the last"
    kill_after(6)
    with pytest.raises(Killed):
        recipe.run(tmp_path / "killed")
    kill_after(None)
    shutil.move(tmp_path / "killed.partial", tmp_path / "moved.partial")  # paths in the checkpoint point nowhere now
    assert outcome(recipe.run(tmp_path / "moved", resume=True)) == expected


# --- one checkpoint ---------------------------------------------------------------------------------------------------------


def checkpoint(directory: Path, step: int, name: str | None = None) -> Path:
    staged = directory / ".staging" / "new"
    (staged / "deep").mkdir(parents=True)
    for file in ("a.txt", "deep/b.txt"):
        (staged / file).write_text(f"{file} after {step}")
    seal(staged, step)
    publish(staged, directory / (name or f"checkpoint-{step}"))
    sweep(directory)
    return directory / (name or f"checkpoint-{step}")


def test_the_step_in_the_manifest_decides_which_is_the_newest(tmp_path):
    paths = [checkpoint(tmp_path, step) for step in (100, 9, 20)]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))  # the clock was set back
    assert [step_of(path) for path in checkpoints(tmp_path)] == [9, 20, 100]
    assert newest_verified(tmp_path, pytest.fail) == paths[0]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["a.txt", "deep/b.txt", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, flip, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-3]),
               lambda file: file.write_text('{"foreign": "json"}'), lambda file: file.write_text("[1]")],
    ids=["gone", "flipped", "empty", "cut", "foreign", "list"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_with_one_line(tmp_path, file, damage):
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(bad / file)
    said = []
    if file == "manifest.json" and fault(bad) is None:
        pytest.skip("the flipped bit changed a space or the like")
    assert newest_verified(tmp_path, said.append) == good
    (line,) = said if step_of(bad) == 2 else said or ["nothing said of what nobody can date"]
    assert "\n" not in line


def test_what_is_damaged_is_named(tmp_path):
    bad = checkpoint(tmp_path, 2)
    (bad / "a.txt").unlink()
    assert fault(bad) == "a.txt is missing"
    (bad / "a.txt").write_text("other")
    assert fault(bad) == "a.txt is damaged (5 of 13 bytes, another sha256)"
    manifest = json.loads((bad / "manifest.json").read_text())
    (bad / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    assert fault(bad) == "its format is 2, this version reads 1"
    (bad / "manifest.json").unlink()
    assert "saving was interrupted" in fault(bad)


def test_rotation_keeps_the_latest_steps_and_what_it_is_told_to(tmp_path):
    paths = [checkpoint(tmp_path, step) for step in (1, 2, 3, 10)]
    (tmp_path / ".staging").mkdir()
    rotate(tmp_path, None, set())
    assert checkpoints(tmp_path) == paths
    rotate(tmp_path, 3, {paths[0]})
    assert checkpoints(tmp_path) == [paths[0], *paths[2:]]
    rotate(tmp_path, 1, {paths[2]})
    assert checkpoints(tmp_path) == [paths[2]], "also if a later one, perhaps damaged, has to go"


def test_a_publish_killed_between_its_renames_is_undone(tmp_path):
    checkpoint(tmp_path, 1)
    (tmp_path / ".staging" / "replaced").mkdir(parents=True)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".staging" / "replaced" / "checkpoint-1")
    sweep(tmp_path)
    assert newest_verified(tmp_path, pytest.fail) == tmp_path / "checkpoint-1"
    assert not (tmp_path / ".staging").exists()


# --- faults at every point of a save ---------------------------------------------------------------------------------------

POINTS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (torch, "save"),
    (Path, "write_text"),
    (peft.peft_model, "safe_save_file"),
]


class Faults:
    """Counts the writes, syncs, renames and removals, and does `action` in place of the n-th."""

    def __init__(self, monkeypatch, action, points=POINTS):
        self.count, self.n = 0, 0
        for home, name in points:
            monkeypatch.setattr(home, name, self._counted(getattr(home, name), action))

    def _counted(self, original, action):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.n:
                action()
            return original(*args, **kwargs)

        return call

    def at(self, n: int) -> None:
        self.count, self.n = 0, n


@pytest.fixture
def trainer(tiny_path, tmp_path, monkeypatch) -> sft.SFTTrainer:
    """One that has trained 2 steps and saved after each, keeping one checkpoint: the hardest case, for there is no other."""
    built = []

    class Kept(sft.SFTTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.args.output_dir = str(tmp_path / "saves")
            built.append(self)

    monkeypatch.setattr(sft, "SFTTrainer", Kept)
    tiny_sft(tiny_path, training={"max_steps": 2, "save_total_limit": 1}).run(tmp_path / "sft")
    assert [path.name for path in (tmp_path / "saves").iterdir() if path.is_dir()] == ["checkpoint-2"]
    return built[0]


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [2, 3], ids=["again", "next"])
def test_a_save_that_fails_at_any_point_leaves_a_whole_checkpoint(trainer, monkeypatch, step):
    saves = Path(trainer.args.output_dir)
    faults = Faults(monkeypatch, full_disk)
    for n in range(1, 200):
        trainer.state.global_step = step
        faults.at(n)
        try:
            trainer._save_checkpoint(trainer.model, None)
        except InstructLiteError as error:
            assert "the disk is full" in str(error)
            assert "\n" not in str(error)
        failed, faults.n = faults.count >= n, 0
        sweep(saves)  # what the next save or start does first, if it was the clearing away that failed
        whole = newest_verified(saves, lambda line: None)
        assert whole is not None, f"fault {n}"
        assert not (saves / ".staging").exists(), f"fault {n}"
        if not failed:
            break
        if step_of(whole) == step == 3:  # the fault came after the new one was published
            shutil.rmtree(saves)
            trainer.state.global_step = 2
            trainer._save_checkpoint(trainer.model, None)
    assert 20 < n < 199
    assert step_of(whole) == step
    assert [path.name for path in checkpoints(saves)] == [f"checkpoint-{step}"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(trainer, monkeypatch):
    saves = Path(trainer.args.output_dir)
    faults = Faults(monkeypatch, lambda: os._exit(9), [*POINTS, (shutil, "rmtree")])
    for n in range(1, 200):
        faults.at(n)
        child = os.fork()
        if child == 0:
            trainer._save_checkpoint(trainer.model, None)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        faults.n = 0
        sweep(saves)  # what the next start does first
        said = []
        assert newest_verified(saves, said.append) == saves / "checkpoint-2", f"killed at {n}"
        assert not said, f"killed at {n}: {said}"
        if code == 0:
            break
        assert code == 9
    assert 20 < n < 199


def test_a_full_disk_is_told_with_bytes_needed_and_free_whatever_the_library_calls_it(trainer, monkeypatch):
    size = sum(path.stat().st_size for path in (Path(trainer.args.output_dir) / "checkpoint-2").rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    for error in (OSError(errno.EDQUOT, "quota"), RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda *args, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(
                InstructLiteError, match="the disk is full: about ([0-9,]+) bytes are needed and ([0-9,]+) are free"
            ) as caught:
                trainer._save_checkpoint(trainer.model, None)
        assert f"{size:,}" in str(caught.value)
        assert "checkpoint-2 is whole" in str(caught.value)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(RuntimeError("a bug")))
        trainer._save_checkpoint(trainer.model, None)


def test_a_checkpoint_holds_no_pickled_arguments(trainer):
    files = {path.name for path in (Path(trainer.args.output_dir) / "checkpoint-2").iterdir()}
    assert "training_args.bin" not in files
    assert files >= {"manifest.json", "adapter_model.safetensors", "optimizer.pt", "running_0.json"}


class Code:
    """What a pickle can carry: a call, made when it is loaded."""

    def __init__(self, directory: Path):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(trainer, tmp_path, file):
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    torch.save({"state": Code(tmp_path / "ran")}, checkpoint / file)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, 2)
    trainer.args.max_steps = 3
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_that_is_named_is_refused(trainer):
    flip(Path(trainer.args.output_dir) / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(InstructLiteError, match=r"optimizer\.pt is damaged"):
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    with pytest.raises(InstructLiteError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


# --- a run ------------------------------------------------------------------------------------------------------------------


def killed(recipe, path, step, kill_after) -> None:
    kill_after(step)
    with pytest.raises(Killed):
        recipe.run(path)
    kill_after(None)


def test_a_damaged_newest_checkpoint_costs_one_step_and_nothing_else(tiny_path, tmp_path, kill_after, capsys):
    expected = outcome(tiny_sft(tiny_path).run(tmp_path / "whole"))
    killed(tiny_sft(tiny_path), tmp_path / "sft", 5, kill_after)
    flip(tmp_path / "sft.partial" / "trainer" / "checkpoint-5" / "adapter_model.safetensors")
    capsys.readouterr()
    assert outcome(tiny_sft(tiny_path).run(tmp_path / "sft", resume=True)) == expected
    said = capsys.readouterr().err
    assert "checkpoint-5 is passed over: adapter_model.safetensors is damaged" in said
    assert "going on after step 4" in said


def test_without_resume_a_run_starts_over_and_says_what_resume_would_have_done(tiny_path, tmp_path, kill_after, capsys):
    expected = outcome(tiny_sft(tiny_path).run(tmp_path / "whole"))
    killed(tiny_sft(tiny_path), tmp_path / "sft", 4, kill_after)
    adapter = tiny_sft(tiny_path).run(tmp_path / "sft")
    assert "starting over; --resume (resume=True) would have gone on after step 4" in capsys.readouterr().err
    assert outcome(adapter) == expected
    assert json.loads((adapter.path / "run.json").read_text())["resumed_after_step"] is None


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(tiny_path, tmp_path, capsys):
    tiny_sft(tiny_path).run(tmp_path / "sft", resume=True)
    assert "no checkpoint to go on from: starting from the beginning" in capsys.readouterr().err


def test_a_finished_run_is_kept_by_resume_if_it_was_made_from_the_same(tiny_path, tmp_path, capsys):
    tiny_sft(tiny_path).run(tmp_path / "sft")
    before = (tmp_path / "sft" / "run.json").read_bytes()
    assert tiny_sft(tiny_path).run(tmp_path / "sft", resume=True).sha256
    assert (tmp_path / "sft" / "run.json").read_bytes() == before
    assert "it is finished, and made from the same" in capsys.readouterr().err
    assert tiny_sft(tiny_path, seed=2).run(tmp_path / "sft", resume=True)
    assert (tmp_path / "sft" / "run.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_the_held_out_loss_from_before_training_is_measured_once(tiny_path, tmp_path, kill_after, monkeypatch):
    killed(tiny_sft(tiny_path), tmp_path / "sft", 2, kill_after)
    measured = []
    original = sft.held_out_metrics
    monkeypatch.setattr(sft, "held_out_metrics", lambda trainer, suffix="": measured.append(suffix) or original(trainer, suffix))
    assert "eval_loss_before" in tiny_sft(tiny_path).run(tmp_path / "sft", resume=True).metrics
    assert measured == [""]


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"seed": 3}, r"seed +0 +3"),
        ({"data": ROWS[1:]}, r"data\.demonstrations +[0-9a-f]{12}… +[0-9a-f]{12}…"),
        ({"lora": Lora(r=2, alpha=8, dropout=0.2)}, r"lora\.r +4 +2"),
        ({"training": {"learning_rate": 1e-3}}, r"training\.learning_rate +0\.01 +0\.001"),
        ({"training": {"max_steps": 5}}, r"training\.max_steps +- +5"),
        ({"chat_template": "plain"}, r"base\.template"),
    ],
)
def test_a_resume_from_something_else_is_refused_with_a_table(tiny_path, tmp_path, kill_after, changes, row):
    killed(tiny_sft(tiny_path), tmp_path / "sft", 2, kill_after)
    with pytest.raises(InstructLiteError, match=f"(?s)cannot be resumed.*\n  {row}"):
        tiny_sft(tiny_path, **changes).run(tmp_path / "sft", resume=True)
    assert newest_verified(tmp_path / "sft.partial" / "trainer", pytest.fail), "what was saved is still there"


def test_a_resume_with_another_base_or_parent_is_refused(tiny_path, tmp_path, kill_after):
    other = tmp_path / "other"
    shutil.copytree(tiny_path, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    killed(tiny_sft(tiny_path), tmp_path / "sft", 2, kill_after)
    with pytest.raises(InstructLiteError, match=r"base\.weights"):
        tiny_sft(other).run(tmp_path / "sft", resume=True)
    parents = [tiny_sft(tiny_path, seed=seed, training={"max_steps": 1}).run(tmp_path / str(seed)) for seed in (1, 2)]
    killed(tiny_reward(parents[0]), tmp_path / "reward", 2, kill_after)
    with pytest.raises(InstructLiteError, match=r"parents\.sft"):
        tiny_reward(parents[1]).run(tmp_path / "reward", resume=True)


def test_a_resume_may_save_and_log_at_other_times_and_read_the_data_elsewhere(tiny_path, tmp_path, kill_after):
    expected = tiny_sft(tiny_path).run(tmp_path / "whole").sha256
    killed(tiny_sft(tiny_path), tmp_path / "sft", 2, kill_after)
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    other = tiny_sft(tiny_path, data=tmp_path / "moved.jsonl", training={"logging_steps": 1, "save_steps": 3})
    assert other.run(tmp_path / "sft", resume=True).sha256 == expected


def test_a_checkpoint_of_another_recipe_is_refused(tiny_path, tmp_path, kill_after):
    killed(tiny_reward(tiny_path), tmp_path / "run", 2, kill_after)
    with pytest.raises(InstructLiteError, match=r"\n  recipe +reward +sft"):
        tiny_sft(tiny_path).run(tmp_path / "run", resume=True)


def test_saving_is_left_out_where_it_would_cost_more_than_a_hundredth_of_the_time(tiny_path, tmp_path, monkeypatch):
    saved = []
    original = Checkpointing._save_checkpoint
    monkeypatch.setattr(Checkpointing, "_save_checkpoint", lambda t, *args: saved.append(t.state.global_step) or original(t, *args))
    without = {name: value for name, value in TRAINING.items() if name != "save_steps"}
    SFTRecipe(model=str(tiny_path), data=ROWS, dtype="float32", chat_template="chatml", training=without).run(tmp_path / "sft")
    assert not saved, "it took no five seconds"
    monkeypatch.setattr("instructlite.training.recipe.SAVING_SHARE", 1e9)
    SFTRecipe(model=str(tiny_path), data=ROWS, dtype="float32", chat_template="chatml", training=without).run(tmp_path / "sft")
    assert saved == [1, 2, 3, 4, 5, 6]


# --- kill -9 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_t1_a_run_killed_at_random_moments_and_resumed_is_the_uninterrupted_run(tiny_path, tmp_path):
    start = time.perf_counter()
    expected = tiny_sft(tiny_path).run(tmp_path / "whole").sha256
    lasts, chance = time.perf_counter() - start, random.Random(0)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            tiny_sft(tiny_path).run(tmp_path / "killed", resume=True)
            os._exit(0)
        time.sleep(chance.uniform(0, lasts))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert tiny_sft(tiny_path).run(tmp_path / "killed", resume=True).sha256 == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
