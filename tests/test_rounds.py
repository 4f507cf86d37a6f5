"""Rounds on the tiny model: votes with a planted preference teach reward model and policy; whatever is interrupted goes on."""

import json
from pathlib import Path

import pytest

from instructlite import rounds
from instructlite.config import Lora, load_loop
from instructlite.data.records import read_records, write_records
from instructlite.errors import BadRecords, InstructLiteError
from instructlite.feedback.ballots import Ballot
from instructlite.feedback.store import Store
from instructlite.models.manifest import Adapter
from instructlite.pipeline import run_loop
from instructlite.rounds import Judge, run_round

WORDS = ("yes", "no", "maybe", "so", "well", "oh", "ah", "eh", "hm", "ha", "ho", "hi")
RECIPE = """
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8}}
data: {{demonstrations: {here}/d.jsonl, comparisons: {here}/c.jsonl, heldout_demonstrations: 2, judge: 3, heldout: 3}}
sft: {{training: {{per_device_train_batch_size: 4, max_steps: 2}}}}
reward: {{training: {{per_device_train_batch_size: 4, max_steps: 2, learning_rate: 1e-3}}}}
ppo:
  training: {{per_device_train_batch_size: 4, num_mini_batches: 1, num_ppo_epochs: 2, max_steps: 2, response_length: 6, learning_rate: 1e-3}}
evaluation: {{samples: 1, max_new_tokens: 6, greedy: false}}
round: {{answers: 3, max_new_tokens: 6}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_path) -> Path:
    """A run of the whole loop, of two steps a stage."""
    here = tmp_path_factory.mktemp("run")
    write_records(here / "d.jsonl", [{"prompt": f"say {word}", "completion": f"{word}!"} for word in WORDS])
    write_records(here / "c.jsonl", [{"prompt": f"ask {word}", "chosen": f"{word}!", "rejected": "?"} for word in WORDS])
    (here / "recipe.yaml").write_text(RECIPE.format(model=tiny_path, here=here))
    run_loop(load_loop(here / "recipe.yaml"), here / "run")
    return here / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    import shutil

    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def long_answers(prompts, completions, **rest):
    return [len(text) for text in completions]


def test_x(run):
    result = run_round(run, say=print)
    print(result)
    result = run_round(run, judge=Judge("tests.test_rounds:long_answers"), say=print)
    print(json.dumps(json.loads((run / "rounds/01/round.json").read_text()), indent=1))
    assert 0
