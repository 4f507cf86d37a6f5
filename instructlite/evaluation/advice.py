"""What to do next: rules over the numbers, the most pressing first. Each says something only where the intervals bear it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .effects import effects, sides_by_judge
from .formatting import between, find, listed, number, side

if TYPE_CHECKING:
    from .report import Report

MARGIN = 0.05  # of a win rate, to either side: what an interval should reach
LARGE_KL = 30.0  # nats an answer: where training's own health check warns
BARELY = 0.55  # an accuracy that is not shown to lie above this is little better than a coin
ENDED = 0.9
TAX = 1.1  # perplexity that rose by more than a tenth


def advice(report: Report) -> list[str]:
    """Sentences; none for a single candidate."""
    if report.headline is None or report.headline_row("sampled") is None:
        return []
    return [said for rule in RULES if (said := rule(report))]


# --- can the judge be believed? ---------------------------------------------------------------------------------------


def no_verdicts(report: Report) -> str | None:
    row = report.headline_row("sampled")
    if row.get("rate") is None:
        return "no verdict came from the judge: look at its warnings, and run evaluate again, which asks only for what is missing."
    return None


def weak_judge(report: Report) -> str | None:
    judge = report.judges[0]
    low = judge.get("accuracy_low")
    if low is None or low > BARELY:
        return None
    shown = "not shown to be" if low <= 0.5 else "barely"
    return (
        f"get a better judge before anything else: {judge['name']} agrees with people on {between(judge, 'accuracy')} of held-out pairs, "
        f"{shown} better than chance. It takes more comparisons to train it on, a language model, or people's votes."
    )


def judge_of_length(report: Report) -> str | None:
    judge = report.judges[0]
    low, longer = judge.get("accuracy_low"), judge.get("longer_wins")
    if low is None or longer is None or longer <= BARELY or low > longer:
        return None
    return (
        f"do not take {judge['name']} for a judge of content: always preferring the longer answer would be right on {number(longer, 3)} of "
        f"the same pairs, which its own {between(judge, 'accuracy')} is not clear of."
    )


def judge_trained_it(report: Report) -> str | None:
    judge, a = report.judges[0], report.headline[0]
    if a not in (judge.get("trained") or ()):
        return None
    return f"judge with something that did not train {a}: another reward model on other comparisons, a language model, or people's votes."


def judge_warned(report: Report) -> str | None:
    warned = [judge["name"] for judge in report.judges if judge.get("warnings")]
    return f"read the warnings about {listed(warned)} below before quoting its numbers." if warned else None


# --- is it better? ----------------------------------------------------------------------------------------------------


def over_optimised(report: Report) -> str | None:
    """The reward model that trained it sees a gain, no other judge does."""
    a, b = report.headline
    sides = sides_by_judge(report)
    own = [judge["name"] for judge in report.judges if a in (judge.get("trained") or ())]
    others = [sides[name] for name in sides if name not in own]
    if not own or not others or sides.get(own[0]) != 1 or any(found == 1 for found in others):
        return None
    found = f"by every other judge it is worse than {b}" if all(found == -1 for found in others) else "no other judge confirms it"
    return (
        f"train less against this reward model: {own[0]}, which {a} was trained on, prefers {a}, but {found}: over-optimisation. "
        "Raise kl_coef, take an earlier checkpoint, or train the reward model on more comparisons, as an ensemble."
    )


def worse(report: Report) -> str | None:
    a, b = report.headline
    return f"keep {b}: {a}'s answers score worse." if side(report.headline_row("sampled")) == -1 else None


def beaten(report: Report) -> str | None:
    """Another candidate's answers score better than a's."""
    a, b = report.headline
    judge = report.judges[0]["name"]
    found = []
    for row in report.win_rates:
        alike = row["judge"] == judge and row["decoding"] == "sampled" and row.get("b_decoding") in (None, "sampled")
        if alike and a in (row["a"], row["b"]) and b not in (row["a"], row["b"]) and row.get("rate") is not None:
            other, sign = (row["b"], -1) if row["a"] == a else (row["a"], 1)
            if side(row) == sign:
                found.append((other, row["rate"] if sign == 1 else 1 - row["rate"]))
    if not found:
        return None
    each = listed(f"{name} ({number(rate, 3)} of the comparisons)" for name, rate in found)
    dear = any((find(report.candidates, name=name) or {}).get("kind") == "best-of-n" for name, _ in found)
    price = " Best-of-n pays with n answers for each one." if dear else ""
    return f"consider what beats {a} here: {each}.{price}"


def undecided(report: Report) -> str | None:
    """No difference shown: too few prompts, or enough to say that there is little of one."""
    row, (a, b) = report.headline_row("sampled"), report.headline
    if row.get("rate") is None or side(row) not in (0, None):
        return None
    needed, prompts = row.get("prompts_needed") or _needed(row), row["prompts"]
    if needed is None:
        return f"use more held-out prompts: {prompts} {'is' if prompts == 1 else 'are'} too few for an interval."
    if needed > prompts:
        return (
            f"use more held-out prompts before deciding: about {needed:,} like these bring the interval to {MARGIN:.2f} to either side; "
            f"there were {prompts:,}."
        )
    return f"do not add prompts: they are enough to say that {a} and {b} differ by little. Train longer, or on other data."


def _needed(row: dict) -> int | None:
    """Prompts for an interval of MARGIN to either side; an interval shrinks with the root of their number."""
    if row.get("low") is None:
        return None
    return math.ceil(row["prompts"] * ((row["high"] - row["low"]) / 2 / MARGIN) ** 2)


def sharpened(report: Report) -> str | None:
    """What a lower temperature of b gives, too."""
    (a, b), cross = report.headline, report.cross_row()
    if side(report.headline_row("sampled")) != 1:
        return None
    share = report.sharpening
    explained = share is not None and share["share_low"] is not None and share["share_low"] > 0 and share["share_high"] >= 1
    if not explained and (cross is None or side(cross) not in (0, -1)):
        return None
    return f"try {b} with greedy decoding or a lower temperature first: that may give all that {a} gained, without PPO."


def greedy_unknown(report: Report) -> str | None:
    if report.headline_row("greedy") is not None or side(report.headline_row("sampled")) != 1:
        return None
    return "compare greedy answers, too (greedy=True): the gain may be a sharper distribution and nothing else."


def length_explains(report: Report) -> str | None:
    row = report.headline_row("sampled")
    if row.get("length_controlled") is None or side(row) != 1 or side(row, "length_controlled") in (1, None):
        return None
    return (
        "take length out of the reward: between answers of equal length the gain is not clear of a draw. reward.length_controlled fits "
        "what length explains and leaves it out."
    )


# --- what else went wrong? --------------------------------------------------------------------------------------------


def large_kl(report: Report) -> str | None:
    row = find(report.candidates, name=report.headline[0])
    if row.get("kl") is None or row["kl"] <= LARGE_KL:
        return None
    return (
        f"keep {row['name']} nearer to {report.reference}: {number(row['kl'], 1)} nats an answer is far. Raise kl_coef, set target_kl, or "
        "lower the learning rate."
    )


def not_ended(report: Report) -> str | None:
    rows = [find(report.candidates, name=name) for name in report.headline]
    cut = [row for row in rows if row.get("ended") is not None and row["ended"] < ENDED]
    if not cut:
        return None
    shares = listed(f"{100 * (1 - row['ended']):.0f} % of {row['name']}'s" for row in cut)
    limit = report.settings.get("max_new_tokens")
    at = f" of {limit} tokens" if limit else ""
    return (
        f"let answers come to their end: {shares} are cut at the limit{at}, and judged as they stand. Raise max_new_tokens; in training, "
        "response_length and missing_eos_penalty."
    )


def repeats(report: Report) -> str | None:
    a, b = (find(report.candidates, name=name) for name in report.headline)
    ours, theirs = a.get("repeated_trigrams"), b.get("repeated_trigrams")
    if ours is None or theirs is None or ours <= max(0.1, 2 * theirs):
        return None
    return f"read {a['name']}'s answers: {100 * ours:.0f} % of their trigrams repeat what stood before ({b['name']} {100 * theirs:.0f} %)."


def taxed(report: Report) -> str | None:
    """Abilities that were lost."""
    a, b = (find(report.candidates, name=name) for name in report.headline)
    lost = [effect.name for effect in effects(report) if not effect.better]
    if a.get("perplexity") and b.get("perplexity") and a["perplexity"] > TAX * b["perplexity"]:
        lost.insert(0, "perplexity")
    if not lost:
        return None
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return (
        f"win back what was lost ({', '.join(lost[:3])}{more}): mix texts into PPO (ptx_data, ptx_coef), or stay nearer to the reference."
    )


def training_warned(report: Report) -> str | None:
    course = find(report.training, candidate=report.headline[0])
    if not course or not course["health"]:
        return None
    count = len(course["health"])
    return (
        f"see to the {'warning' if count == 1 else f'{count} warnings'} of the training of {course['candidate']}, below: cause and remedy."
    )


def ask_people(report: Report) -> str | None:
    if any(judge.get("kind") == "people" for judge in report.judges):
        return None
    return "let people vote on the two side by side: a judge that is a model is no person (instructlite votes)."


RULES: tuple[Callable[[Report], str | None], ...] = (
    no_verdicts, weak_judge, judge_trained_it, over_optimised, worse, undecided, beaten, length_explains, sharpened, greedy_unknown,
    judge_of_length, judge_warned, not_ended, large_kl, repeats, taxed, training_warned, ask_people,
)  # fmt: skip
