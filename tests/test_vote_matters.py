"""bench/vote_matters.py on a tiny model: votes for a planted property make the policy show it more often."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # programs, not a package

import vote_matters

from instructlite.config import load_loop
from instructlite.data.records import write_records
from instructlite.pipeline import run_loop

RECIPE = """
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 8, alpha: 16}}
data: {{demonstrations: {here}/d.jsonl, comparisons: {here}/c.jsonl, heldout_demonstrations: 8, judge: 8, heldout: 40, prompt_limit: 32}}
sft: {{training: {{per_device_train_batch_size: 8, max_steps: 8, learning_rate: 1e-3}}}}
reward: {{training: {{per_device_train_batch_size: 8, max_steps: 8, learning_rate: 5e-3}}}}
ppo:
  kl_coef: 0.02
  training:
    {{per_device_train_batch_size: 16, num_mini_batches: 2, num_ppo_epochs: 2, max_steps: 8, response_length: 8, learning_rate: 3e-3}}
evaluation: {{max_new_tokens: 8}}
round: {{max_new_tokens: 8}}
"""


@pytest.mark.slow
def test_sixty_votes_for_a_property_make_it_more_frequent(tiny_path, tmp_path, monkeypatch):
    write_records(tmp_path / "d.jsonl", [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(40)])
    write_records(tmp_path / "c.jsonl", [{"prompt": f"ask {n}", "chosen": f"{n} it is", "rejected": "?"} for n in range(200)])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_path, here=tmp_path))
    run = tmp_path / "run"
    run_loop(load_loop(tmp_path / "recipe.yaml"), run)
    monkeypatch.setitem(vote_matters.PROPERTIES, "vowel", lambda text: any(letter in "aeiou" for letter in text.lower()))
    monkeypatch.setitem(vote_matters.WORDS, "vowel", "has a vowel")
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = vote_matters.measured(run, tmp_path / "copy", ["round.prompt_limit=130"], 60, "vowel", 300, control=True)
    assert result["likes"]["votes"] == result["coin"]["votes"] == 60
    difference = result["likes"]["difference"]["round-1 - ppo"]
    assert difference["low"] > 0, json.dumps(result["likes"]["share"])
    assert result["difference_to_coin"]["low"] > 0, "more PPO alone would not have done it"
    assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "the run is not touched"
