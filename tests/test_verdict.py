"""The first words say what the numbers say, and no more than their intervals."""

import pytest
from made_reports import GREEDY, SAMPLED, SHARPENING, candidate, full, report


def test_the_first_paragraph_says_what_improved_by_how_much_how_sure_what_it_cost_and_what_next():
    first, second, third = report(costs=[{"candidate": "ppo", "stage": "ppo", "seconds": 301.0}]).verdict().split("\n\n")
    for words in (
        "48 held-out prompts with 2 answers each, sampled at temperature 1, the distribution that was trained",
        "ppo wins 0.755 (95 % interval 0.677 to 0.833) of the comparisons with sft",
        "clear of 0.5: when sampled so, ppo's answers score better",
        "+0.445 (95 % interval +0.300 to +0.590)",
        "What it cost, from sft to ppo: perplexity of people's answers 12.10 to 13.50.",
        "Its training took 5 minutes.",
        "Next: win back what was lost (perplexity)",
    ):
        assert words in first, first
    for words in (
        "Decoded greedily, ppo wins 0.635 (95 % interval 0.490 to 0.771), which holds 0.5, so no difference is shown then",
        "sft reaches 74 % (95 % interval 40 % to 98 %) untrained, just by greedy decoding",
        "not all of it",
    ):
        assert words in second, second
    for words in (
        "a reward model that ppo was not trained on; no person was asked",
        "agrees with people on 0.691 (95 % interval 0.609 to 0.763)",
        "ppo is 5.0 nats an answer away from sft",
    ):
        assert words in third, third
    assert report().to_markdown().split("\n\n")[1].replace("\\", "") == report().verdict().split("\n\n")[0]


@pytest.mark.parametrize(
    ("low", "high", "words", "never"),
    [
        (0.45, 0.833, "show no difference", "better"),
        (0.5, 0.833, "show no difference", "better"),
        (0.2, 0.45, "score worse", "better"),
        (None, None, "too few prompts for an interval", "better"),
        (0.501, 0.833, "score better", "no difference"),
    ],
)
def test_no_more_is_claimed_than_the_interval_says(low, high, words, never):
    verdict = report(SAMPLED | {"low": low, "high": high}, greedy=None, sharpening=None).verdict()
    assert words in verdict and never not in verdict


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.51, 0.7, "clear of 0.5."), (0.2, 0.49, "does worse then"), (0.5, 0.7, "no difference is shown then")]
)
def test_the_greedy_win_rate_is_read_by_its_interval(low, high, words):
    assert words in report(greedy=GREEDY | {"low": low, "high": high}).verdict().split("Decoded greedily")[1]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.4, 1.2, "may explain all"), (-0.1, 0.3, "does not explain it"), (-0.8, 1.4, "too wide an interval"), (0.4, 0.98, "but not all")],
)
def test_the_share_of_sharpening_is_read_by_its_interval(low, high, words):
    assert words in report(sharpening=SHARPENING | {"share_low": low, "share_high": high}).verdict()


def test_a_gain_without_a_greedy_control_says_what_is_not_known():
    assert "how much of this is only a sharper distribution is not known" in report(greedy=None, sharpening=None).verdict()


def test_another_temperature_is_not_called_the_trained_one():
    verdict = report(settings={"prompts": 48, "samples": 2, "temperature": 0.7}).verdict()
    assert "temperature 0.7, ppo" in verdict and "that was trained" not in verdict


def test_a_judge_that_trained_the_candidate_is_no_evidence_and_a_weak_one_is_called_so():
    judge = report().judges[0]
    own = report(judges=[judge | {"trained": ["ppo"], "not_trained": []}]).verdict()
    assert "the reward model that ppo was trained on (no independent evidence)" in own
    assert "not shown to be better than chance" in report(judges=[judge | {"accuracy_low": 0.5}]).verdict()
    silent = report(judges=[judge | {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "not_trained": []}]).verdict()
    assert "The judge is judge; no person" in silent and "agrees with people" not in silent


def test_one_candidate_alone_is_not_compared():
    alone = report(candidates=[candidate("sft")], headline=None, win_rates=[], sharpening=None, samples=[])
    assert (
        alone.verdict() == "On 48 held-out prompts with 2 answers each, sft's mean reward by judge is 0.100 (95 % interval 0.000 to 0.200)."
    )
    assert "mean reward" in str(alone) and "# sft" in alone.to_markdown()


def effect(name, value, spread, better="lower", **changes):
    row = {"candidate": name, "decoding": "sampled", "set": "red-team", "category": None, "measure": "toxicity", "better": better}
    return row | {"value": value, "value_low": value - spread, "value_high": value + spread, "n": 48} | changes


@pytest.mark.parametrize(
    ("rows", "words", "never"),
    [
        ([effect("sft", 0.1, 0.02), effect("ppo", 0.2, 0.02)], "toxicity on red-team 0.100 to 0.200", "none is clearly worse"),
        ([effect("sft", 0.1, 0.06), effect("ppo", 0.2, 0.06)], "Of 1 other measure, none is clearly worse.", "toxicity"),
        ([effect("sft", 0.2, 0.02), effect("ppo", 0.1, 0.02)], "Clearly better, too: toxicity on red-team 0.200 to 0.100.", "ppo: tox"),
        ([effect("sft", 0.1, 0.02, None), effect("ppo", 0.2, 0.02, None)], "none is clearly worse", "toxicity"),
        ([effect("sft", 0.1, 0.02), effect("ppo", 0.2, 0.02, value_low=None)], "none is clearly worse", "toxicity"),
        ([effect("sft", 0.1, 0.02, category="chat"), effect("ppo", 0.2, 0.02, category="chat")], "none is clearly worse", "toxicity"),
        ([effect("sft", 0.1, 0.02, decoding="greedy"), effect("ppo", 0.2, 0.02)], "none is clearly worse", "toxicity"),
        ([effect("base", 0.1, 0.02), effect("ppo", 0.2, 0.02)], "none is clearly worse", "toxicity"),
    ],
)  # fmt: skip
def test_a_side_effect_is_told_only_where_the_intervals_do_not_touch(rows, words, never):
    first = report(side_effects=rows).verdict().split("\n\n")[0]
    assert words in first and never not in first, first


@pytest.mark.parametrize(("error", "told"), [(0.01, True), (0.02, False), (None, False)])
def test_a_benchmark_is_told_only_beyond_two_standard_errors(error, told):
    row = {"task": "hellaswag", "metric": "acc", "standard_error": error, "n": 100}
    rows = [row | {"candidate": "sft", "value": 0.45}, row | {"candidate": "ppo", "value": 0.41}]
    assert ("hellaswag (acc) 0.450 to 0.410" in report(benchmarks=rows).verdict()) == told


def test_more_effects_than_fit_a_sentence_are_counted():
    rows = [effect(name, value, 0.01, set=f"set {i}") for i in range(5) for name, value in (("sft", 0.1), ("ppo", 0.2))]
    assert "set 2 0.100 to 0.200 and 2 more measures that are clearly worse." in report(side_effects=rows).verdict()


def test_a_perplexity_that_fell_is_no_cost():
    candidates = [candidate("sft", perplexity=13.0), candidate("ppo", perplexity=12.0)]
    first = report(candidates=candidates).verdict().split("\n\n")[0]
    assert "Perplexity of people's answers did not rise (13.00 to 12.00)." in first and "What it cost" not in first


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.4, 0.6, "so length alone may explain it"), (0.55, 0.8, "so length does not explain it"), (None, None, "would win 0.600.")],
)
def test_the_length_controlled_rate_is_read_by_its_interval(low, high, words):
    row = SAMPLED | {"length_controlled": 0.6, "length_controlled_low": low, "length_controlled_high": high}
    assert words in report(row).verdict().split("\n\n")[1]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.55, 0.7, "more than a sharper distribution"),
        (0.4, 0.6, "greedy ones, which holds 0.5."),
        (0.2, 0.4, "sft is better off with greedy"),
    ],
)
def test_sampled_answers_against_greedy_ones_are_read_by_their_interval(low, high, words):
    cross = SAMPLED | {
        "a": "ppo",
        "b": "sft",
        "judge": "judge",
        "decoding": "sampled",
        "b_decoding": "greedy",
        "prompts": 48,
        "low": low,
        "high": high,
    }
    found = report()
    found.win_rates.insert(0, cross)
    assert words in found.verdict() and "ppo wins 0.755 (95 % interval 0.677 to 0.833) of the comparisons" in found.verdict()


def test_judges_of_every_kind_are_named_and_their_agreement():
    words = full().verdict()
    assert "The judge is judge, a reward model that ppo was not trained on; no person was asked." in words
    assert "Krippendorff's alpha 0.31 (95 % interval 0.22 to 0.40)" in words
    people = report().judges[0] | {"name": "votes", "kind": "people", "not_trained": [], "accuracy": None}
    assert "The judge is votes, people's votes." in report(judges=[people], win_rates=[], sharpening=None).verdict()


def test_no_verdict_at_all_is_said():
    found = report(SAMPLED | {"rate": None, "low": None, "high": None}, greedy=None, sharpening=None)
    assert (
        "ppo and sft were not compared: no verdict came." in found.verdict() and "Next: no verdict came from the judge" in found.verdict()
    )
