"""The report's first words: what improved, by how much, how sure that is, what it cost and what to do next.

All of it is computed from the numbers and says no more than their intervals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .advice import advice
from .effects import effects
from .formatting import Row, between, find, listed, number, side

if TYPE_CHECKING:
    from .report import Report

LISTED = 3  # effects in a sentence; the tables have the others


def verdict(report: Report, advised: bool = True) -> str:
    """Paragraphs of plain text: the answer; what greedy decoding and equal length leave of it; who says so.

    advised: with what to do next.
    """
    if report.headline is None:
        return _alone(report)
    first = " ".join([*_sampled_words(report), *_cost_words(report), *(_next_words(report) if advised else ())])
    second = " ".join([*_greedy_words(report), *_sharpening_words(report), *_length_words(report)])
    third = " ".join([*_judge_words(report), *_distance_words(report)])
    return "\n\n".join(filter(None, (first, second, third)))


def prompts_words(report: Report) -> str:
    prompts, samples = report.settings["prompts"], report.settings["samples"]
    return f"{prompts} held-out prompt{'s' * (prompts > 1)} with {samples} answer{'s' * (samples > 1)} each"


def _alone(report: Report) -> str:
    row = report.candidates[0]
    if not report.judges or row.get("mean_reward") is None:
        return f"{row['name']} answered {prompts_words(report)}; with nothing to compare it with, no win rate follows."
    return f"On {prompts_words(report)}, {row['name']}'s mean reward by {report.judges[0]['name']} is {between(row, 'mean_reward')}."


# --- the answer -------------------------------------------------------------------------------------------------------


def _sampled_words(report: Report) -> Iterable[str]:
    (a, b), row, temperature = report.headline, report.headline_row("sampled"), report.settings["temperature"]
    trained = ", the distribution that was trained" if temperature == 1 else ""
    opening = f"On {prompts_words(report)}, sampled at temperature {temperature:g}{trained}, "
    if row is None or row.get("rate") is None:
        yield f"{opening}{a} and {b} were not compared: no verdict came."
        return
    yield f"{opening}{a} wins {between(row, 'rate')} of the comparisons with {b}; 0.5 would be a draw."
    yield {
        1: f"The interval is clear of 0.5: when sampled so, {a}'s answers score better than {b}'s.",
        -1: f"The interval lies below 0.5: when sampled so, {a}'s answers score worse than {b}'s.",
        0: "The interval holds 0.5: these prompts show no difference between the two.",
        None: "That is too few prompts for an interval: nothing follows from it.",
    }[side(row)]
    if row.get("gain") is not None:
        yield f"The difference in mean reward is {between(row, 'gain', sign='+')}."


def _cost_words(report: Report) -> Iterable[str]:
    """What the gain was paid with: other abilities, clear of chance, and the distance from the reference."""
    a, b = (find(report.candidates, name=name) for name in report.headline)
    found, before, after = [], b.get("perplexity"), a.get("perplexity")
    if None not in (before, after):
        change = f"{number(before, 2)} to {number(after, 2)}"
        found += [f"perplexity of people's answers {change}"] if after > before else []
    worse = [effect for effect in effects(report) if not effect.better]
    found += [f"{effect.name} {effect.b} to {effect.a}" for effect in worse[:LISTED]]
    if len(worse) > LISTED:
        found.append(f"{len(worse) - LISTED} more measures that are clearly worse")
    if found:
        yield f"What it cost, from {b['name']} to {a['name']}: {listed(found)}."
    if None not in (before, after) and after <= before:
        yield f"Perplexity of people's answers did not rise ({change})."
    measured = len({(row["set"], row["measure"]) for row in report.side_effects} | {(row["task"], "") for row in report.benchmarks})
    if measured and not worse:
        yield f"Of {measured} other measure{'s' * (measured > 1)}, none is clearly worse."
    gained = [f"{effect.name} {effect.b} to {effect.a}" for effect in effects(report) if effect.better]
    if gained:
        yield f"Clearly better, too: {listed(gained[:LISTED])}."
    yield from _time_words(report)


def _time_words(report: Report) -> Iterable[str]:
    rows = [row for row in report.costs if row["candidate"] == report.headline[0] and row.get("seconds")]
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        yield f"Its training took {f'{seconds / 60:.0f} minutes' if seconds >= 90 else f'{seconds:.0f} seconds'}."


def _next_words(report: Report) -> Iterable[str]:
    first = next(iter(advice(report)), None)
    if first:
        yield f"Next: {first}"


# --- what is left of it -----------------------------------------------------------------------------------------------


def _greedy_words(report: Report) -> Iterable[str]:
    (a, b), row = report.headline, report.headline_row("greedy")
    if row is not None and row.get("rate") is not None:
        meaning = {
            1: "clear of 0.5",
            -1: f"below 0.5, so {a} does worse then",
            0: "which holds 0.5, so no difference is shown then",
            None: "without an interval",
        }[side(row)]
        yield f"Decoded greedily, {a} wins {between(row, 'rate')}, {meaning}."
    cross = report.cross_row()
    if cross is not None:
        meaning = {
            1: "which is clear of 0.5: more than a sharper distribution",
            -1: f"which is below 0.5: {b} is better off with greedy decoding than {a} with sampling",
            0: "which holds 0.5",
            None: "without an interval",
        }[side(cross)]
        yield f"{a}'s sampled answers win {between(cross, 'rate')} against {b}'s greedy ones, {meaning}."


def _sharpening_words(report: Report) -> Iterable[str]:
    sampled = report.headline_row("sampled")
    if report.sharpening is None:
        if report.headline_row("greedy") is None and sampled is not None and side(sampled) == 1:
            yield "Greedy answers were not compared, so how much of this is only a sharper distribution is not known."
        return
    share, low, high = (report.sharpening[name] for name in ("share", "share_low", "share_high"))
    if low is None:
        return
    meaning = {
        (False, False): "that much a sharper distribution alone can give, but not all of it",
        (False, True): "a sharper distribution alone may explain all of it",
        (True, False): "a sharper distribution alone does not explain it",
        (True, True): "too wide an interval to say how much a sharper distribution alone explains",
    }[low <= 0, high >= 1]
    interval = f"{100 * share:.0f} % (95 % interval {100 * low:.0f} % to {100 * high:.0f} %)"
    yield f"Of the difference in reward, {report.headline[1]} reaches {interval} untrained, just by greedy decoding: {meaning}."


def _length_words(report: Report) -> Iterable[str]:
    row = report.headline_row("sampled")
    if row is None or row.get("length_controlled") is None:
        return
    plain_side, controlled = side(row), side(row, "length_controlled")
    meaning = ""
    if plain_side and controlled is not None:
        meaning = ", so length does not explain it" if controlled == plain_side else ", so length alone may explain it"
    yield f"Between answers of equal length {report.headline[0]} would win {between(row, 'length_controlled')}{meaning}."


# --- who says so ------------------------------------------------------------------------------------------------------


def _judge_words(report: Report) -> Iterable[str]:
    a = report.headline[0]
    for position, judge in enumerate(report.judges):
        name, relation = judge["name"], _relation(judge, a)
        if position == 0:
            asked = "" if any(other.get("kind") == "people" for other in report.judges) else "; no person was asked"
            yield f"The judge is {name}{relation}{asked}."
            yield from _accuracy_words(judge)
            continue
        row = report.headline_row("sampled", name)
        if row is not None and row.get("rate") is not None:
            yield f"By {name}{relation}, {a} wins {between(row, 'rate')} when sampled."
    if report.agreement:
        yield f"The judges agree with one another with Krippendorff's alpha {between(report.agreement, 'alpha', 2)}."


def _relation(judge: Row, a: str) -> str:
    if a in (judge.get("trained") or ()):
        return f", the reward model that {a} was trained on (no independent evidence)"
    if a in (judge.get("not_trained") or ()):
        return f", a reward model that {a} was not trained on"
    return {"language model": ", a language model", "people": ", people's votes"}.get(judge.get("kind") or "", "")


def _accuracy_words(judge: Row) -> Iterable[str]:
    if judge.get("accuracy") is not None:
        low = judge.get("accuracy_low")
        weak = ", which is not shown to be better than chance" if low is not None and low <= 0.5 else ""
        yield f"It agrees with people on {between(judge, 'accuracy')} of held-out pairs{weak}."


def _distance_words(report: Report) -> Iterable[str]:
    row = find(report.candidates, name=report.headline[0])
    if row.get("kl") is not None and row["name"] != report.reference:
        yield f"{row['name']} is {number(row['kl'], 1)} nats an answer away from {report.reference} (KL)."
