"""Trackers: PPO's metrics really reach them, metrics.jsonl is there in any case, and nothing leaves this machine unasked."""

import json
import os
import socket
import subprocess
import sys

import pytest
from test_ppo_trainer import PROMPTS

from instructlite import PPORecipe
from instructlite.config import Lora, load_loop
from instructlite.errors import InstructLiteError
from instructlite.training.ppo_config import PPOConfig

TRAINING = {
    "per_device_train_batch_size": 2, "num_mini_batches": 1, "num_ppo_epochs": 2, "max_steps": 4, "response_length": 6, "logging_steps": 2,
}  # fmt: skip


def length(completions, **columns) -> list[float]:
    return [float(len(text)) for text in completions]


def ppo(tiny_path, **training) -> PPORecipe:
    return PPORecipe(
        model=str(tiny_path), reward=length, data=PROMPTS[:8], dtype="float32", chat_template="chatml", lora=Lora(r=2, alpha=4),
        training=TRAINING | training,
    )  # fmt: skip


def test_tensorboard_gets_every_number_of_ppo_and_the_events_stay_with_the_adapter(tiny_path, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ppo(tiny_path, report_to="tensorboard").run(tmp_path / "ppo")
    events = reading.EventAccumulator(str(tmp_path / "ppo" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["objective/score"] for line in lines if "objective/score" in line}
    assert list(scores) == [2, 4]
    assert {event.step: event.value for event in events.Scalars("train/objective/score")} == pytest.approx(scores)
    logged = {f"train/{name}" for line in lines for name in line if name.startswith(("objective/", "policy/", "value/", "rollout/"))}
    assert len(logged) > 20
    assert logged <= set(events.Tags()["scalars"])


def test_by_default_nothing_is_told_to_anybody_and_metrics_are_kept_here(tiny_path, tmp_path, monkeypatch):
    def connect(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    adapter = ppo(tiny_path).run(tmp_path / "ppo")
    assert (adapter.path / "metrics.jsonl").is_file()
    assert not (adapter.path / "tensorboard").exists()
    assert json.loads((adapter.path / "run.json").read_text())["config"]["training"]["report_to"] == "none"
    assert PPOConfig(output_dir=str(tmp_path / "own"), use_cpu=True).report_to == []


OFFLINE = """
import socket, sys
connect = socket.socket.connect
def here_only(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
    return connect(self, address)
socket.socket.connect = here_only
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_tracking import ppo
ppo(sys.argv[1], report_to="trackio").run(Path(sys.argv[2]) / "run" / "ppo")
"""


@pytest.mark.slow
def test_trackio_keeps_its_numbers_on_this_machine(tiny_path, tmp_path):
    pytest.importorskip("trackio")
    here = os.path.dirname(__file__)
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tiny_path), str(tmp_path), here], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "a connection to" not in process.stderr
    script = (
        "from trackio.sqlite_storage import SQLiteStorage as S; print([row.get('train/objective/score') for row in "
        "S.get_logs('instructlite', 'run/ppo')])"
    )
    read = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["objective/score"] for line in lines if "objective/score" in line]
    assert [score for score in json.loads(read.stdout.replace("None", "null")) if score is not None] == pytest.approx(scores), read.stderr


def test_one_word_tells_all_stages_and_a_section_may_say_otherwise(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\nreport_to: tensorboard\nreward: {training: {report_to: none}}\nppo: {training: {max_steps: 3}}\n")
    loop = load_loop(file)
    assert loop.options("sft")["training"] == {"report_to": "tensorboard"}
    assert loop.options("reward")["training"] == {"report_to": "none"}
    assert loop.options("ppo")["training"] == {"report_to": "tensorboard", "max_steps": 3}
    assert "training" not in load_loop(file, ["report_to=none"]).options("sft")


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_trained(tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr("instructlite.training.recipe.find_spec", lambda name: None)
    with pytest.raises(InstructLiteError, match=r"report_to=trackio.*instructlite\[track\]"):
        PPORecipe.check_training({"report_to": ["trackio"]})
