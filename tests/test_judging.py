"""Judges on the answers of several candidates: who wins, how sure that is, and what the judges' own faults do to it. No models."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from endpoints import FakeCompleter

from instructlite.data.generating.completer import Answer, Completions
from instructlite.evaluation import outcomes
from instructlite.evaluation.judges import LanguageModelJudge, People, RewardJudge
from instructlite.evaluation.judging import Decoding, Judging
from instructlite.models.sampling import Sampling

QUALITY = {"base": 1, "sft": 2, "ppo": 3}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def judge(answer, name="m") -> LanguageModelJudge:
    return LanguageModelJudge(name, Completions(FakeCompleter(answer)))


def reward(name="judge") -> RewardJudge:
    return RewardJudge(name, (), ())


def fair(prompt: str) -> str:
    a, b = (re.search(rf"\[Answer {name}\]\n(.*)\n", prompt)[1].count("+") for name in "AB")
    return f"[[{'A' if a > b else 'B' if b > a else 'C'}]]"


def decodings(prompts=10, samples=2, reward_judges=("judge",)):
    """Every fifth prompt goes against the order of the candidates; greedy answers are better. A plus is worth one point."""
    found = []
    for decoding, count, bonus in (("sampled", samples, 0), ("greedy", 1, 1)):
        one = Decoding(decoding, Sampling(), count)
        for name, good in QUALITY.items():
            points = np.repeat([(4 - good if number % 5 == 0 else good) + bonus for number in range(prompts)], count)
            one.answers[name] = [[1]] * len(points)
            one.texts[name] = [f"{name} {'+' * n} {i % count}" for i, n in enumerate(points)]
            for judged in reward_judges:
                one.scores[judged, name] = points.reshape(prompts, count).astype(float)
        found.append(one)
    return found


def judging(*judges, headline=("ppo", "sft"), **options) -> Judging:
    names = tuple(j.name for j in judges if isinstance(j, RewardJudge))
    drawn = decodings(reward_judges=names, **options)
    rows = [{"prompt": user(f"q{number}")} for number in range(len(drawn[0].texts["sft"]) // drawn[0].samples)]
    return Judging(judges, drawn, rows, headline, "sft", seed=0)


def row(rows, **keys):
    (found,) = [row for row in rows if all(row.get(name) == value for name, value in ({"b_decoding": None} | keys).items())]
    return found


def test_a_language_model_and_a_reward_model_that_see_the_same_say_the_same():
    found = judging(reward(), judge(fair))
    rows, strengths = found.win_rates(), found.strengths()
    for name in ("judge", "m"):
        for decoding in ("sampled", "greedy"):
            assert row(rows, a="ppo", b="sft", judge=name, decoding=decoding)["rate"] == pytest.approx(0.8)
            table = [r for r in strengths if (r["judge"], r["decoding"]) == (name, decoding)]
            assert [r["candidate"] for r in table] == ["ppo", "sft", "base"]
            assert sum(r["strength"] for r in table) == pytest.approx(0)
    assert row(rows, a="ppo", b="sft", judge="judge", decoding="sampled")["gain"] == pytest.approx(0.6)
    assert row(rows, a="ppo", b="sft", judge="m", decoding="sampled")["gain"] is None
    assert found.agreement()["alpha"] == 1.0 and found.agreement()["judges"] == ["judge", "m"]


def test_sampled_answers_against_greedy_ones_separate_sharpening():
    rows = judging(reward(), judge(fair)).win_rates()
    assert (rows[0]["a"], rows[0]["b"]) == ("ppo", "sft")
    for name in ("judge", "m"):
        crossed = row(rows, a="ppo", b="sft", judge=name, decoding="sampled", b_decoding="greedy")
        assert crossed["rate"] == pytest.approx(0.4), "greedy answers of sft are about as good as what ppo samples"
    assert row(rows, a="base", b="sft", judge="judge", decoding="sampled", b_decoding="greedy")["rate"] == pytest.approx(0.1)
    assert not [r for r in rows if r.get("b_decoding") and (r["a"], r["judge"]) == ("base", "m")], "asked about the headline only"
    assert ["b_decoding" in r for r in rows] == sorted("b_decoding" in r for r in rows)


@pytest.mark.parametrize(("letter", "bias"), [("A", 1.0), ("B", -1.0)])
def test_a_judge_that_always_names_one_place_yields_a_draw_and_warnings(letter, bias):
    found = judging(judge(lambda prompt: f"[[{letter}]]"))
    rate = row(found.win_rates(), a="ppo", b="sft", judge="m", decoding="sampled")
    assert (rate["rate"], rate["p_of_a_draw"]) == (0.5, 1.0)
    assert any("position bias" in warning for warning in rate["warnings"])
    heard = found.heard(found.judges[0])
    assert (heard["position_bias"], heard["position_bias_low"], heard["same_in_both_orders"]) == (bias, bias, 0.0)
    assert "position bias" in heard["warnings"][0]
    assert all(abs(strength["strength"]) < 1e-6 for strength in found.strengths())


def test_what_a_judge_does_not_say_is_missing_and_no_loss():
    silent = judging(judge(lambda prompt: Answer(None, "HTTP 500") if "q1\n" in prompt else fair(prompt)))
    rate = row(silent.win_rates(), a="ppo", b="sft", judge="m", decoding="sampled")
    assert (rate["rate"], rate["prompts"], rate["missing"]) == (pytest.approx(7 / 9), 9, 2)
    dumb = judging(judge(lambda prompt: Answer(None, "HTTP 500")))
    assert {rate["rate"] for rate in dumb.win_rates()} == {None}
    assert dumb.strengths() == [] and dumb.agreement() is None
    assert dumb.heard(dumb.judges[0])["position_bias"] is None


def test_a_judge_that_sees_nothing_agrees_with_nobody():
    found = judging(reward(), judge(lambda prompt: "[[A]]" if len(prompt) % 2 else "[[B]]"), prompts=30).agreement()
    assert found["alpha"] < 0.3 and found["alpha_low"] <= found["alpha"] <= found["alpha_high"]


def test_too_wide_an_interval_says_how_many_prompts_it_would_take():
    rate = row(judging(reward()).win_rates(), a="ppo", b="sft", judge="judge", decoding="sampled")
    assert rate["prompts_needed"] > 200
    assert f"about {rate['prompts_needed']} prompts would bring it to 0.05" in rate["warnings"][-1]
    sure = row(judging(reward(), prompts=150).win_rates(), a="ppo", b="sft", judge="judge", decoding="sampled")
    assert not sure["warnings"] and sure["low"] > 0.7


def test_length_is_controlled_on_reward_models_too():
    draw = np.random.default_rng(0)
    one = Decoding("sampled", Sampling(), 1)
    for name, mean in (("sft", 40), ("ppo", 70)):
        lengths = draw.integers(mean - 35, mean + 35, 200)
        one.answers[name], one.texts[name] = [[1]] * 200, ["x" * n for n in lengths]
        one.scores["judge", name] = lengths.reshape(200, 1).astype(float)
    rate = Judging([reward()], [one], [{"prompt": user(f"q{i}")} for i in range(200)], ("ppo", "sft"), "sft", 0).win_rates()[0]
    assert rate["low"] > 0.7 and rate["length_controlled_low"] < 0.5 < rate["length_controlled_high"]
    assert any(warning.startswith("length: ") for warning in rate["warnings"])


def test_ratings_have_means_with_intervals_and_count_what_is_missing():
    said = {"base": "[[3]]", "sft": "[[5]]", "ppo": "[[9]]"}
    rate = lambda prompt: said[re.search(r"\[The answer\]\n(\w+)", prompt)[1]]  # noqa: E731
    rows = judging(judge(rate)).ratings(["pointwise", "likert"])
    assert row(rows, candidate="ppo", scale="pointwise", decoding="greedy")["rating"] == 9
    likert = row(rows, candidate="ppo", scale="likert", decoding="sampled")
    assert (likert["rating"], likert["missing"], likert["highest"]) == (None, 20, 7), "a nine is not on that scale"


def test_references_are_shown_to_judges_where_rows_carry_them():
    arbiter = judge(lambda prompt: "[[5]]" if "[The answer]" in prompt else fair(prompt))
    found = judging(arbiter)
    found.rows = [{**asked, "reference": "what a person said"} for asked in found.rows]
    assert {rated["scale"] for rated in found.ratings(["likert"])} == {"likert_reference"}
    found.win_rates()
    assert all("what a person said" in prompt for prompt in arbiter.completions.completer.asked)


def vote(a, b, outcome, prompt="q", decoding="sampled"):
    texts = {"a_text": "x", "b_text": "y" * 3}
    return {"a": a, "b": b, "outcome": outcome, "prompt": user(prompt), "decoding": decoding, **texts}


def test_peoples_votes_are_one_more_judge():
    names = {"": "base", "s" * 64: "sft", "p" * 64: "ppo"}
    sft, ppo = "s" * 64, "p" * 64
    votes = [vote(ppo, sft, 1, f"q{i}") for i in range(6)] + [vote(sft, ppo, 1, "q6"), vote(sft, ppo, 0.5, "q6"), vote(sft, "", 1, "q7")]
    votes += [vote(ppo, "another adapter", 0), vote(ppo, sft, 0, decoding="greedy")]
    people = People.of(votes, names)
    found = judging(reward(), people)
    rows = found.win_rates()
    sampled = row(rows, a="ppo", b="sft", judge="people", decoding="sampled")
    assert (sampled["rate"], sampled["prompts"]) == (pytest.approx((6 + 0.25) / 7), 7)
    assert row(rows, a="ppo", b="sft", judge="people", decoding="greedy")["rate"] == 0.0
    assert row(rows, a="sft", b="base", judge="people", decoding="sampled")["prompts"] == 1
    table = [r["candidate"] for r in found.strengths() if (r["judge"], r["decoding"]) == ("people", "sampled")]
    assert table == ["ppo", "sft", "base"]
    assert People.of([vote(ppo, "another adapter", 0)], names) is None


def test_no_outcome_at_all_is_no_rate():
    found = outcomes.rate(np.full((3, 2), np.nan), np.zeros((3, 2)))
    assert found["rate"] is found["length_controlled_low"] is None and found["warnings"] == ["no pair has a verdict"]


def test_members_of_an_ensemble_count_the_same_whatever_their_scale():
    def member(**metrics):
        return SimpleNamespace(role="reward", metrics=metrics, sha256="")

    scores = {"a": [0.0, 10.0, 20.0], "b": [0.3, 0.2, 0.1]}
    measured = RewardJudge("both", (member(score_mean=10, score_std=10), member(score_mean=0.2, score_std=0.1)), ("a", "b"))
    assert measured.combined(scores).tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    unknown = RewardJudge("both", (member(score_mean=10, score_std=10), member()), ("a", "b"))
    assert unknown.combined(scores).tolist() == pytest.approx([0.15, 5.1, 10.05])
    assert RewardJudge("one", (member(score_mean=10, score_std=10),), ("a",)).combined(scores).tolist() == scores["a"]
    assert (measured.kind, RewardJudge("one", (member(),), ("a",)).kind) == ("ensemble", "reward")
