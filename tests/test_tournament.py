"""All candidates of a report against one another, by judges in memory."""

import json
import re

import pytest
from endpoints import FakeCompleter

from instructlite.data.generating.completer import Answer, Completions
from instructlite.errors import InstructLiteError
from instructlite.evaluation.judges import LanguageModelJudge
from instructlite.evaluation.tournament import tournament

QUALITY = {"base": 1, "sft": 2, "ppo": 3}


@pytest.fixture
def answers(tmp_path):
    """Ten prompts with two sampled answers and a greedy one each; every fifth prompt goes against the order of the candidates."""
    rows = []
    for number in range(10):
        given = [
            {
                "candidate": name,
                "decoding": decoding,
                "sample": sample,
                "text": f"{name} {'+' * (4 - good if number % 5 == 0 else good)} {sample}",
            }
            for name, good in QUALITY.items()
            for decoding, samples in (("sampled", 2), ("greedy", 1))
            for sample in range(samples)
        ]
        rows.append({"prompt": [{"role": "user", "content": f"q{number}"}], "answers": given})
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def judge(answer) -> LanguageModelJudge:
    return LanguageModelJudge.of(Completions(FakeCompleter(answer)))


def fair(prompt: str) -> str:
    a, b = (re.search(rf"\[Answer {name}\]\n(.*)\n", prompt)[1].count("+") for name in "AB")
    return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"


def test_the_table_orders_the_candidates_and_every_pair_has_its_rate(answers):
    found = tournament(answers, [judge(fair)])
    (table,) = found["judges"]
    assert [row["candidate"] for row in table["strengths"]] == ["ppo", "sft", "base"]
    assert sum(row["strength"] for row in table["strengths"]) == pytest.approx(0)
    rates = {(pair["a"], pair["b"]): pair["rate"] for pair in table["pairs"]}
    assert rates == pytest.approx({("base", "sft"): 0.2, ("base", "ppo"): 0.2, ("sft", "ppo"): 0.2})
    assert {(pair["prompts"], pair["pairs"]) for pair in table["pairs"]} == {(10, 20)}
    assert found["agreement"] is None
    assert tournament(answers, [judge(fair)], decoding="greedy")["judges"][0]["pairs"][0]["pairs"] == 10


def test_judges_that_see_the_same_agree_and_one_that_sees_nothing_does_not(answers):
    same = tournament(answers, [judge(fair), judge(fair)])["agreement"]
    assert same["alpha"] == 1.0
    other = tournament(answers, [judge(fair), judge(lambda prompt: "[[A]]" if len(prompt) % 2 else "[[B]]")])["agreement"]
    assert other["alpha"] < 0.5


def test_a_judge_that_says_nothing_gives_no_table_and_no_losses(answers):
    (table,) = tournament(answers, [judge(lambda prompt: Answer(None, "HTTP 500"))])["judges"]
    assert table["strengths"] == []
    assert [pair["rate"] for pair in table["pairs"]] == [None, None, None]


def test_another_file_is_one_line(answers, tmp_path):
    with pytest.raises(InstructLiteError, match="no prompt has 'beam' answers of two candidates"):
        tournament(answers, [judge(fair)], decoding="beam")
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InstructLiteError, match=r"other.jsonl: is no answers.jsonl of a report"):
        tournament(tmp_path / "other.jsonl", [judge(fair)])
    with pytest.raises(InstructLiteError, match="cannot be read"):
        tournament(tmp_path / "none.jsonl", [judge(fair)])
