"""Votes for a planted property reach the policy: bench/vote_matters.py on a tiny model, and votes by keyboard in a real browser."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from browsing import Visit, served
from conftest import chromium
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # programs, not a package

import vote_matters

from instructlite import cli
from instructlite.config import load_loop
from instructlite.data.records import read_records, write_records
from instructlite.pipeline import run_loop
from instructlite.rounds import run_round

pytestmark = pytest.mark.slow  # three trainings and a round, and a browser

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


def has_vowel(text: str) -> bool:
    return any(letter in "aeiou" for letter in text.lower())


@pytest.fixture(scope="module")
def made(tiny_path, tmp_path_factory) -> Path:
    here = tmp_path_factory.mktemp("made")
    write_records(here / "d.jsonl", [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(40)])
    write_records(here / "c.jsonl", [{"prompt": f"ask {n}", "chosen": f"{n} it is", "rejected": "?"} for n in range(200)])
    (here / "recipe.yaml").write_text(RECIPE.format(model=tiny_path, here=here))
    run_loop(load_loop(here / "recipe.yaml"), here / "run")
    return here / "run"


def test_sixty_votes_for_a_property_make_it_more_frequent(made, tmp_path, monkeypatch):
    monkeypatch.setitem(vote_matters.PROPERTIES, "vowel", has_vowel)
    monkeypatch.setitem(vote_matters.WORDS, "vowel", "has a vowel")
    before = {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    result = vote_matters.measured(made, tmp_path / "copy", ["round.prompt_limit=130"], 60, "vowel", 300, control=True)
    assert result["likes"]["votes"] == result["coin"]["votes"] == 60
    difference = result["likes"]["difference"]["round-1 - ppo"]
    assert difference["low"] > 0, json.dumps(result["likes"]["share"])
    assert result["difference_to_coin"]["low"] > 0, "more PPO alone would not have done it"
    assert {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()} == before, "the run is not touched"


def voted_by_keyboard(run: Path, wanted: int) -> list[tuple[str, str]]:
    """What a Chromium shows of the run's round is voted on, by nothing but what stands on the page; (better, worse) of each vote."""
    decided = []
    with chromium() as browser, served(run, pages=["/arena"]) as server:
        here = Visit(browser, server)
        page, asked = here.open("arena"), ""
        while len(decided) < wanted:
            a, b = here.choosing(asked)
            key = "3" if has_vowel(a) == has_vowel(b) else "1" if has_vowel(a) else "2"
            page.keyboard.press(key)
            here.said("Saved")
            decided += {"1": [(a, b)], "2": [(b, a)], "3": []}[key]
            asked = page.locator("#asked").inner_text()
            page.keyboard.press("n")
        here.close()
    return decided


def letters(text: str) -> str:
    """What the store, a page and a reader of training data leave as it is."""
    return re.sub(r"[^a-zA-Z0-9]", "", text)


def test_votes_by_keyboard_reach_the_export_and_the_round(made, tmp_path):
    run, wanted = tmp_path / "run", 10
    shutil.copytree(made, run)
    waiting = run_round(run, ["round.prompt_limit=100", "round.answers=2"])
    assert waiting.report is None
    decided = voted_by_keyboard(run, wanted)
    pressed = sorted((letters(better), letters(worse)) for better, worse in decided)

    target = tmp_path / "comparisons.jsonl"
    done = CliRunner().invoke(cli.app, ["votes", "export", str(run), "--to", "comparisons", "--output", str(target)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert sorted((letters(row["chosen"]), letters(row["rejected"])) for row in rows) == pressed

    votes = run_round(run).votes
    finished = run_round(run, [f"round.votes={votes}", "evaluation.samples=1", "ppo.training.max_steps=2"])
    assert finished.report is not None and wanted <= finished.votes <= votes
    rankings = read_records(str(finished.directory / "data" / "votes.jsonl"))
    ordered = [[text for _, text in sorted(zip(row["ranks"], row["responses"], strict=True))] for row in rankings]
    assert sorted(tuple(map(letters, pair)) for pair in ordered) == pressed
    learnt = read_records(str(finished.directory / "data" / "reward.jsonl"))
    assert [row for row in learnt if row in rankings], "the reward model learns from them"
