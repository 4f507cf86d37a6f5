"""What to do next: each rule speaks where its numbers call for it, and is silent where they do not."""

import pytest
from made_reports import GREEDY, SAMPLED, SHARPENING, candidate, report

from instructlite.evaluation import advice as rules
from instructlite.evaluation.advice import advice

EVEN = {"rate": 0.5, "low": 0.38, "high": 0.62}
NARROW = {"rate": 0.5, "low": 0.47, "high": 0.53}
LOST = {"rate": 0.3, "low": 0.2, "high": 0.4}
PAIR = {"a": "ppo", "b": "sft", "judge": "judge", "decoding": "sampled", "prompts": 48}
FINE = [candidate("sft", kl=0.0, perplexity=12.0), candidate("ppo", kl=5.0, perplexity=12.5)]


def judged(**changes):
    return [report().judges[0] | changes]


def own_judge(independent, own=SAMPLED):
    """ppo's own reward model beside the judge."""
    reward = report().judges[0] | {"name": "reward", "trained": ["ppo"], "not_trained": []}
    rows = [PAIR | independent, PAIR | own | {"judge": "reward"}]
    return report(judges=[*judged(), reward], win_rates=rows, sharpening=None)


def against(other, row, kind="adapter"):
    rows = [PAIR | SAMPLED, PAIR | row | {"a": "ppo", "b": other}]
    return report(candidates=[*FINE, candidate(other, kind=kind)], win_rates=rows)


def crossed(row):
    return report(win_rates=[PAIR | SAMPLED, PAIR | GREEDY | {"decoding": "greedy"}, PAIR | row | {"b_decoding": "greedy"}])


def ended(sft, ppo):
    return report(candidates=[candidate("sft", ended=sft), candidate("ppo", ended=ppo)])


def controlled(low, high):
    return report(SAMPLED | {"length_controlled": 0.5, "length_controlled_low": low, "length_controlled_high": high})


COURSE = {"candidate": "ppo", "cycles": 1, "curves": {}, "health": {}}
CASES = [
    ("no_verdicts", report(SAMPLED | {"rate": None, "low": None, "high": None}), report(), "asks only for what is missing"),
    ("weak_judge", report(judges=judged(accuracy_low=0.49)), report(), "not shown to be better than chance"),
    ("weak_judge", report(judges=judged(accuracy_low=0.52)), report(judges=judged(accuracy_low=None)), "barely better than chance"),
    ("judge_of_length", report(judges=judged(longer_wins=0.65)), report(), "preferring the longer answer would be right on 0.650"),
    ("judge_trained_it", report(judges=judged(trained=["ppo"])), report(judges=judged(trained=["ppo-ptx"])), "did not train ppo"),
    ("judge_warned", report(judges=judged(warnings=["position bias"])), report(judges=judged(warnings=[])), "warnings about judge"),
    ("over_optimised", own_judge(LOST), own_judge(SAMPLED), "by every other judge it is worse than sft"),
    ("over_optimised", own_judge(EVEN), own_judge(EVEN, EVEN), "no other judge confirms it"),
    ("worse", report(LOST), report(EVEN), "keep sft"),
    ("undecided", report(EVEN), report(), "about 277 like these bring the interval to 0.05 to either side; there were 48"),
    ("undecided", report(EVEN | {"prompts_needed": 1200}), report(LOST), "about 1,200 like these"),
    ("undecided", report(NARROW), report(), "enough to say that ppo and sft differ by little"),
    ("undecided", report(EVEN | {"low": None, "high": None}), report(), "48 are too few for an interval"),
    ("beaten", against("dpo", LOST), against("dpo", EVEN), "consider what beats ppo here: dpo (0.700 of the comparisons)."),
    ("beaten", against("best-of-4", LOST, "best-of-n"), against("best-of-4", SAMPLED), "pays with n answers for each one"),
    ("length_explains", controlled(0.45, 0.6), controlled(0.52, 0.6), "take length out of the reward"),
    ("length_explains", controlled(0.3, 0.4), report(), "take length out of the reward"),
    ("sharpened", report(sharpening=SHARPENING | {"share_high": 1.1}), report(), "try sft with greedy decoding"),
    ("sharpened", crossed(EVEN), crossed(SAMPLED), "try sft with greedy decoding"),
    ("greedy_unknown", report(greedy=None, sharpening=None), report(), "greedy=True"),
    ("greedy_unknown", report(greedy=None, sharpening=None), report(LOST, greedy=None), "greedy=True"),
    ("not_ended", ended(0.73, 0.98), ended(0.95, 0.98), "27 % of sft's are cut at the limit of 48 tokens"),
    ("not_ended", ended(0.5, 0.6), ended(0.9, 0.9), "40 % of ppo's and 50 % of sft's"),
    ("large_kl", report(candidates=[candidate("sft"), candidate("ppo", kl=44.0)]), report(), "44.0 nats an answer is far"),
    ("repeats", report(candidates=[candidate("sft"), candidate("ppo", repeated_trigrams=0.3)]), report(), "30 % of their trigrams"),
    ("taxed", report(), report(candidates=FINE), "win back what was lost (perplexity)"),
    ("training_warned", report(training=[COURSE | {"health": {"x": "y"}}]), report(training=[COURSE]), "the warning of the training"),
    ("training_warned", report(training=[COURSE | {"health": {"x": "y", "z": "y"}}]), report(), "2 warnings of the training"),
    ("ask_people", report(), report(judges=judged(kind="people")), "let people vote"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "speaks", "silent", "words"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_rule_speaks_where_the_numbers_call_for_it_and_only_there(rule, speaks, silent, words):
    said = getattr(rules, rule)(speaks)
    assert said is not None and words in said
    assert said in advice(speaks)
    assert getattr(rules, rule)(silent) is None


def test_every_rule_is_tried():
    assert {rule.__name__ for rule in rules.RULES} == {case[0] for case in CASES}


def test_what_is_most_pressing_comes_first_and_stands_in_the_verdict():
    found = report(LOST, judges=judged(accuracy_low=0.49))
    first, second, *_ = advice(found)
    assert first.startswith("get a better judge") and second.startswith("keep sft")
    assert f"Next: {first}" in found.verdict().split("\n\n")[0]
    assert f"## What to do next\n\n- G{first[1:6]}" in found.to_markdown() and "- Keep sft" in found.to_markdown()


def test_a_candidate_alone_gets_no_advice():
    alone = report(candidates=[candidate("sft")], headline=None, win_rates=[], sharpening=None)
    assert advice(alone) == [] and "What to do next" not in alone.to_markdown()
