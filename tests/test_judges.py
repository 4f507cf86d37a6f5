"""A language model that judges: asked in both orders, missing never a loss, and its own faults shown."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from endpoints import FakeCompleter, Reply, stand_in

from instructlite.data.generating import completer as module
from instructlite.data.generating.completer import Answer, Completions, Endpoint
from instructlite.data.generating.pairwise import Pair
from instructlite.evaluation.judges import Answered, LanguageModelJudge, preference


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def judge(answer) -> LanguageModelJudge:
    return LanguageModelJudge.of(Completions(FakeCompleter(answer)))


def places(prompt: str) -> tuple[str, str]:
    return tuple(re.search(rf"\[Answer {name}\]\n(.*)\n", prompt)[1] for name in "AB")


def better(prompt: str) -> str:
    """Fair: the answer with the more plus signs."""
    a, b = (text.count("+") for text in places(prompt))
    return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"


def judged(pairs, answer):
    return preference(pairs, judge(answer).compare(pairs))


PAIRS = [Pair(user(f"q{i}"), f"+ {i}", f"- {i}") for i in range(30)]


def test_a_fair_judge_is_the_same_from_both_sides():
    won, lost = judged(PAIRS, better), judged([Pair(pair.prompt, pair.b, pair.a) for pair in PAIRS], better)
    assert (won["rate"], lost["rate"]) == (1.0, 0.0)
    assert won["low"] == pytest.approx(1 - lost["high"]) == pytest.approx(0.886, abs=1e-3)
    assert not won["warnings"]
    assert won["consistent"] == 1.0


@pytest.mark.parametrize(("letter", "place", "bias"), [("A", "first", 1.0), ("B", "second", -1.0)])
def test_a_judge_that_always_names_one_place_yields_a_draw_and_a_warning(letter, place, bias):
    found = judged(PAIRS, lambda prompt: f"[[{letter}]]")
    assert (found["rate"], found["position_bias"], found["ties"]) == (0.5, bias, 30)
    assert f"in 30 of 30 pairs the judge took whichever answer stood {place}" in found["warnings"][0]


def test_a_judge_that_likes_length_is_exposed_by_the_length_controlled_rate():
    draw = random.Random(0)
    pairs = [Pair(user(f"q{i}"), "a" * draw.randint(60, 160), "b" * draw.randint(20, 120)) for i in range(150)]

    def longest(prompt: str) -> str:
        a, b = map(len, places(prompt))
        return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"

    found = judged(pairs, longest)
    assert found["low"] > 0.6
    assert found["length_controlled_low"] < 0.5 < found["length_controlled_high"]
    assert any(warning.startswith("length: 0.") for warning in found["warnings"])
    # A judge that likes the content of the same answers keeps its rate.
    fair = judged(pairs, lambda prompt: f"[[{'A' if places(prompt)[0].startswith('a') else 'B'}]]")
    assert fair["length_controlled_low"] > 0.9
    assert not fair["warnings"]


def test_faults_of_the_endpoint_are_repeated_then_missing_and_never_a_loss(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    faults = [Reply(b"", status=429), Reply(b"", status=500), Reply(b"{"), Reply("no verdict here"), Reply("[[A]] or [[B]]")]

    def answer(prompt, before):
        number = int(re.search(r"User: q(\d+)\n", prompt)[1])
        if number < len(faults):
            return faults[number]  # never any better
        return better(prompt) if before or number % 2 else Reply(b"", status=503)  # better the second time

    with stand_in(answer) as server:
        arbiter = LanguageModelJudge.of(Completions(Endpoint("m", server.url, retries=2)))
        found = preference(PAIRS, arbiter.compare(PAIRS))
    assert (found["rate"], found["missing"], found["judged"]) == (1.0, 5, 25)
    assert found["low"] == pytest.approx(0.867, abs=1e-3)  # Wilson's for 25 of 25
    assert "5 of 30 pairs have no verdict" in found["warnings"][0]
    asked = Counter(server.prompts)
    assert sorted(asked.values()) == sorted([3] * 6 + [1] * 4 + [2] * 24 + [1] * 26)


def test_no_verdict_at_all_is_no_rate():
    found = judged(PAIRS, lambda prompt: Answer(None, "HTTP 500"))
    assert found["rate"] is found["length_controlled"] is None
    assert found["missing"] == 30
    assert found["warnings"][-1] == "no pair has a verdict"


def test_one_missing_order_leaves_the_pair_out():
    found = judged(PAIRS, lambda prompt: better(prompt) if places(prompt)[0].startswith("+") else "hm")
    assert (found["rate"], found["missing"]) == (None, 30)


def test_answers_to_one_prompt_count_as_one_prompt():
    pairs = [Pair(user(f"q{i % 5}"), "+" if i % 5 else "-", "-" if i % 5 else "+") for i in range(50)]
    pairs = [Pair(pair.prompt, f"{pair.a}{i}", f"{pair.b}{i}") for i, pair in enumerate(pairs)]
    found = judged(pairs, better)
    assert (found["rate"], found["prompts"]) == (0.8, 5)
    assert found["low"] < 0.5  # fifty pairs would have said 0.69
    assert found["prompts_needed"] > 200


def test_a_judge_is_judged_by_peoples_comparisons():
    comparisons = [
        {"prompt": user(f"q{i}"), "chosen": f"{'-' if i % 4 == 0 else '+'} {i} longer", "rejected": f"{'+' if i % 4 == 0 else '-'} {i}"}
        for i in range(40)
    ]
    found = judge(better).accuracy(comparisons)
    assert (found["accuracy"], found["longer_wins"], found["pairs"], found["missing"]) == (0.75, 1.0, 40, 0)
    assert 0.55 < found["accuracy_low"] < 0.65
    assert 0.85 < found["accuracy_high"] < 0.9


def test_ratings_are_on_their_scale_or_missing():
    said = {"a": "[[7]]", "b": "[[11]]", "c": "Rating: 3", "d": "seven", "e": "[[0]]", "f": "[[2]] or [[3]]", "g": "[[-5]]", "h": "[[8]]"}
    arbiter = judge(lambda prompt: said[re.search(r"\[The answer\]\n(.*)\n", prompt)[1]])
    answers = [Answered(user("q"), text) for text in said]
    nan = np.nan
    np.testing.assert_array_equal(arbiter.rate(answers), [7, nan, 3, nan, nan, nan, nan, 8])
    np.testing.assert_array_equal(arbiter.rate(answers, "likert"), [7, nan, 3, nan, nan, nan, nan, nan])
    assert any("from 1 (very bad) to 10" in prompt for prompt in arbiter.completions.completer.asked)
    assert any("7 very good" in prompt for prompt in arbiter.completions.completer.asked)


def test_a_reference_is_shown_where_there_is_one():
    arbiter = judge(lambda prompt: "[[5]]" if "[Answer A]" not in prompt else "[[A]]")
    arbiter.rate([Answered(user("q"), "x", "what a person said"), Answered(user("q"), "x")])
    arbiter.compare([Pair(user("q"), "x", "y", "what a person said")])
    assert ["what a person said" in prompt for prompt in arbiter.completions.completer.asked] == [True, False, True, True]


def test_judging_prompts_are_the_users_to_change(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "\n".join(
            f"{name}: Shorter is better. $conversation"
            for name in ("pairwise", "pairwise_reference", "pointwise", "pointwise_reference", "likert", "likert_reference")
        )
    )
    completer = FakeCompleter(lambda prompt: "[[A]]")
    LanguageModelJudge.of(Completions(completer), tmp_path / "own.yaml").compare(PAIRS[:1])
    assert set(completer.asked) == {"Shorter is better. User: q0"}
