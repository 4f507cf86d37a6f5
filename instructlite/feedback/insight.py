"""What the votes say so far: who wins, how sure that is, how far people agree, and whether reward models agree with people.

Plain data: the app draws it, `instructlite votes report` prints it. Gold items and votes that were not blind count only where it is
said. Intervals are over prompts (evaluation/statistics.py): they shrink with more prompts, not with more voters of the same ones.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..evaluation import statistics
from .ballots import FLAGS, Judged, Vote, outcome
from .exchange import screen

Row = dict[str, Any]
Pair = tuple[Vote, Judged, Judged]
SHOWN_VOTERS = 30


@dataclass
class Insight:
    """Rows are plain dictionaries; an interval of `x` is x, low, high, and None is "not known"."""

    votes: int
    """All there are; `counted` are those that the rest is about, `left_out` the others by reason."""
    counted: int
    left_out: Row
    voters: list[Row]
    """voter, votes, shared (pairs that others judged too), agreement (share of these others), gold_right, gold, first_shown (how often
    the answer shown first won), ties (share of pairs), seconds (median from showing to vote)."""
    win_rates: list[Row]
    """a, b, rate low high (ties a half), wins, ties, losses, prompts."""
    by_use_case: list[Row]
    """The same with use_case."""
    by_group: list[Row]
    """The same with group."""
    first_shown: Row | None
    """rate low high of the answer that was shown first, of pairs that one won: 0.5 but for position bias."""
    agreement: Row
    """pairs that several judged, same (share of pairs of votes on them that say the same), and Krippendorff's alpha low high of the
    preferences; likert_alpha… of the scores."""
    gold: Row | None
    """right, votes, rate low high: gold items ordered rightly, all voters."""
    candidates: list[Row]
    """candidate, judged (times), likert low high, flags (share of the times they were asked)."""
    reward_models: list[Row]
    """judge, rate low high of the pairs that it orders as people do, prompts, longer_wins, calibration (predicted, observed, pairs)."""

    def to_dict(self) -> Row:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_text(self)).rstrip()


def insight(votes: Sequence[Vote], *, seed: int = 0) -> Insight:
    """All of it, from the rows of `Store.votes`."""
    kept, left_out = screen(votes)
    pairs = list(_pairs(kept))
    name_of = _names(kept)
    return Insight(
        votes=len(votes),
        counted=len(kept),
        left_out=dict(left_out),
        voters=_voters(votes, pairs),
        win_rates=_win_rates(pairs, name_of, seed),
        by_use_case=_split(pairs, lambda vote: vote.use_case, "use_case", name_of, seed),
        by_group=_split(pairs, lambda vote: vote.group, "group", name_of, seed),
        first_shown=_first_shown(pairs, seed),
        agreement=_agreement(kept, pairs, seed),
        gold=_gold(votes),
        candidates=_candidates(kept, name_of, seed),
        reward_models=_reward_models(pairs, seed),
    )


def _pairs(votes: Iterable[Vote]) -> Iterator[Pair]:
    """The pairs that a voter compared."""
    for vote in votes:
        for a, b in combinations(vote.answers, 2):
            if outcome(a, b) is not None:
                yield vote, a, b


def _names(votes: Sequence[Vote]) -> Callable[[Judged], str]:
    """Candidates by name; where one name stands for several adapters (of two rounds), with the beginning of the adapter's hash."""
    candidates = dict.fromkeys(answer.candidate for vote in votes for answer in vote.answers)
    times = Counter(candidate.name for candidate in candidates)
    named = {each: each.name if times[each.name] == 1 else f"{each.name}@{(each.adapter or 'base')[:8]}" for each in candidates}
    return lambda answer: named[answer.candidate]


def _rate(values: Iterable[tuple[Any, float]], seed: int) -> Row:
    """rate, low, high and prompts of (prompt, outcome) pairs, of which there is at least one."""
    grid = statistics.by_prompt(values)
    rate = statistics.preference_rate(grid, seed=seed)
    return {"rate": rate.value, "low": rate.low, "high": rate.high, "prompts": len(grid)}


def _win_rates(pairs: Iterable[Pair], name_of: Callable[[Judged], str], seed: int) -> list[Row]:
    """Of each two candidates; the one that came later is a."""
    found: dict[tuple[str, str], list[tuple[Any, float]]] = defaultdict(list)
    for vote, first, second in pairs:
        (b, a), won = (name_of(first), name_of(second)), 1 - outcome(first, second)
        if (b, a) in found or (a, b) not in found:
            found[b, a].append((vote.prompt, won))
        else:
            found[a, b].append((vote.prompt, 1 - won))
    rows = []
    for (b, a), won in found.items():
        if a != b:
            counts = Counter(value for _, value in won)
            rows.append({"a": a, "b": b, **_rate(won, seed), "wins": counts[1.0], "ties": counts[0.5], "losses": counts[0.0]})
    return rows


def _split(pairs: list[Pair], part_of: Callable[[Vote], str | None], column: str, name_of: Callable[[Judged], str], seed: int) -> list[Row]:
    """Win rates in each part of the votes; votes of no part are in none."""
    parts: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if part := part_of(pair[0]):
            parts[part].append(pair)
    return [{column: part, **row} for part in sorted(parts) for row in _win_rates(parts[part], name_of, seed)]


def _shown_first(pairs: Iterable[Pair]) -> Iterator[tuple[Vote, float]]:
    """Votes on two answers of which one won, and whether it was the one shown first."""
    for vote, a, b in pairs:
        if len(vote.answers) == 2 and a.place is not None and (won := outcome(a, b)) != 0.5:
            yield vote, won if a.place < b.place else 1 - won


def _first_shown(pairs: Iterable[Pair], seed: int) -> Row | None:
    wins = [(vote.prompt, won) for vote, won in _shown_first(pairs)]
    return _rate(wins, seed) if wins else None


def _agreement(votes: Sequence[Vote], pairs: Iterable[Pair], seed: int) -> Row:
    said: dict[Any, dict[str, float]] = defaultdict(dict)
    for vote, a, b in pairs:
        said[vote.item, a.id, b.id][vote.voter] = outcome(a, b)
    scored: dict[Any, dict[str, float]] = defaultdict(dict)
    for vote in votes:
        for answer in vote.answers:
            if answer.likert is not None:
                scored[vote.item, answer.id][vote.voter] = answer.likert
    shared = [list(voices.values()) for voices in said.values() if len(voices) > 1]
    same = [a == b for voices in shared for a, b in combinations(voices, 2)]
    row: Row = {"pairs": len(shared), "same": fmean(same) if same else None}
    for name, ratings in (("", said), ("likert_", scored)):
        alpha = statistics.agreement(_grid(ratings), level="ordinal", seed=seed)
        row |= {f"{name}alpha": alpha and alpha.value, f"{name}low": alpha and alpha.low, f"{name}high": alpha and alpha.high}
    return row


def _grid(ratings: dict[Any, dict[str, float]]) -> np.ndarray:
    """(voters, items), NaN where one said nothing."""
    voters = {voter: number for number, voter in enumerate(sorted({voter for voices in ratings.values() for voter in voices}))}
    grid = np.full((len(voters), len(ratings)), np.nan)
    for column, voices in enumerate(ratings.values()):
        for voter, value in voices.items():
            grid[voters[voter], column] = value
    return grid


def _gold_right(vote: Vote) -> bool:
    """Whether the voter orders every pair that he compared as the gold ranks do; where gold has a tie, anything is right."""
    pairs = combinations(zip(vote.answers, vote.gold, strict=True), 2)
    return all(outcome(a, b) in (None, float(gold_a < gold_b)) for (a, gold_a), (b, gold_b) in pairs if gold_a != gold_b)


def _gold(votes: Iterable[Vote]) -> Row | None:
    right = [_gold_right(vote) for vote in votes if vote.gold]
    if not right:
        return None
    rate = statistics.proportion(sum(right), len(right))
    return {"right": sum(right), "votes": len(right), "rate": rate.value, "low": rate.low, "high": rate.high}


def _voters(votes: Sequence[Vote], pairs: Sequence[Pair]) -> list[Row]:
    said: dict[Any, dict[str, float]] = defaultdict(dict)
    first: dict[str, list[float]] = defaultdict(list)
    for vote, a, b in pairs:
        said[vote.item, a.id, b.id][vote.voter] = outcome(a, b)
    for vote, won in _shown_first(pairs):
        first[vote.voter].append(won)
    own: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        own[vote.voter].append(vote)
    rows = []
    for voter, cast in own.items():
        mine = [voices for voices in said.values() if voter in voices]
        shared = [fmean(other == voices[voter] for who, other in voices.items() if who != voter) for voices in mine if len(voices) > 1]
        gold = [_gold_right(vote) for vote in cast if vote.gold]
        seconds = [vote.seconds for vote in cast if vote.seconds is not None]
        rows.append({
            "voter": voter, "votes": len(cast), "shared": len(shared), "agreement": fmean(shared) if shared else None,
            "gold_right": sum(gold), "gold": len(gold), "first_shown": fmean(first[voter]) if first[voter] else None,
            "ties": fmean(voices[voter] == 0.5 for voices in mine) if mine else None, "seconds": median(seconds) if seconds else None,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (-row["votes"], row["voter"]))


def _candidates(votes: Iterable[Vote], name_of: Callable[[Judged], str], seed: int) -> list[Row]:
    judged: dict[str, list[tuple[Vote, Judged]]] = defaultdict(list)
    for vote in votes:
        for answer in vote.answers:
            judged[name_of(answer)].append((vote, answer))
    rows = []
    for name, answers in judged.items():
        scores = [(vote.prompt, float(answer.likert)) for vote, answer in answers if answer.likert is not None]
        mean = statistics.mean(np.nanmean(statistics.by_prompt(scores), 1), seed=seed) if scores else None
        asked = [answer.flags for _, answer in answers if answer.flags is not None]
        flags = {flag: fmean(flag in given for given in asked) for flag in FLAGS} if asked else {}
        likert = {"likert": mean and mean.value, "low": mean and mean.low, "high": mean and mean.high}
        rows.append({"candidate": name, "judged": len(answers), **likert, "flags": flags})
    return rows


def _reward_models(pairs: Sequence[Pair], seed: int) -> list[Row]:
    """Where people saw a difference: how often the reward model's higher score is on the same side, equal scores counting half."""
    decided = [(vote, *((a, b) if outcome(a, b) else (b, a))) for vote, a, b in pairs if outcome(a, b) != 0.5]
    rows = []
    for judge in dict.fromkeys(judge for _, better, _ in decided for judge in better.scores):
        margins = [
            (vote.prompt, better.scores[judge] - worse.scores[judge], len(better.text) - len(worse.text))
            for vote, better, worse in decided
            if judge in better.scores and judge in worse.scores
        ]
        if margins:
            longer = fmean(0.5 + 0.5 * np.sign(length) for _, _, length in margins)
            rate = _rate(((prompt, 0.5 + 0.5 * float(np.sign(margin))) for prompt, margin, _ in margins), seed)
            calibration = _calibration([margin for _, margin, _ in margins])
            rows.append({"judge": judge, **rate, "pairs": len(margins), "longer_wins": float(longer), "calibration": calibration})
    return rows


def _calibration(margins: Sequence[float]) -> list[Row]:
    """How sure the reward model was (Bradley-Terry's chance of the answer it prefers), and how often people preferred that one."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        sure = float(1 / (1 + np.exp(-min(abs(margin), 50.0))))
        bins[min(int((sure - 0.5) * 10), 4)].append((sure, 0.5 + 0.5 * float(np.sign(margin))))
    return [
        {"predicted": fmean(sure for sure, _ in found), "observed": fmean(right for _, right in found), "pairs": len(found)}
        for _, found in sorted(bins.items())
    ]


# --- as text ----------------------------------------------------------------------------------------------------------------


def _text(found: Insight) -> Iterator[str]:
    yield f"{found.votes:,} votes of {len(found.voters):,} voters, {found.counted:,} of them counted"
    yield from (f"left out: {count:,}: {reason}" for reason, count in found.left_out.items())
    for title, rows, column in (("", found.win_rates, ""), *((c, getattr(found, f"by_{c}"), c) for c in ("use_case", "group"))):
        if rows:
            head = [title.replace("_", " "), "a", "against b", "win rate of a", "won", "tied", "lost", "prompts"]
            cells = [
                [row.get(column), row["a"], row["b"], _interval(row), *_counts(row, "wins", "ties", "losses", "prompts")] for row in rows
            ]
            yield from _table(head[not title :], [line[not title :] for line in cells])
    if row := found.agreement if found.agreement["pairs"] else None:
        yield f"\n{row['pairs']:,} pairs have several voters, who say the same in {row['same']:.2f}; Krippendorff's alpha " + (
            f"{_number(row['alpha'])}{_ends(row)} (1 full agreement, 0 chance)"
        )
        if row["likert_alpha"] is not None:
            yield f"of the Likert scores {_number(row['likert_alpha'])}{_ends(row, 'likert_')}"
    if found.gold:
        yield f"gold items: {found.gold['right']:,} of {found.gold['votes']:,} votes right, {_interval(found.gold)}"
    if found.first_shown:
        yield f"the answer shown first won {_interval(found.first_shown)}; 0.5 but for position bias"
    yield from _candidate_lines(found)
    if found.reward_models:
        head = ["reward model", "orders pairs as people do", "pairs", "prompts", "the longer answer wins"]
        rows = [
            [row["judge"], _interval(row), *_counts(row, "pairs", "prompts"), _number(row["longer_wins"])] for row in found.reward_models
        ]
        yield from _table(head, rows)
    head = ["voter", "votes", "pairs others judged", "agreement", "gold", "first shown wins", "ties", "seconds"]
    people = [
        [row["voter"], *_counts(row, "votes", "shared"), _number(row["agreement"]),
         f"{row['gold_right']}/{row['gold']}" if row["gold"] else "-",
         _number(row["first_shown"]), _number(row["ties"]), _number(row["seconds"], 0)]
        for row in found.voters[:SHOWN_VOTERS]
    ]  # fmt: skip
    if people:
        yield from _table(head, people)
    if len(found.voters) > SHOWN_VOTERS:
        yield f"+{len(found.voters) - SHOWN_VOTERS:,} more"


def _candidate_lines(found: Insight) -> Iterator[str]:
    flags = [flag for flag in FLAGS if any(row["flags"].get(flag) for row in found.candidates)]
    if any(row["likert"] is not None or row["flags"] for row in found.candidates):
        rows = [
            [row["candidate"], *_counts(row, "judged"), _interval(row, "likert"), *(_number(row["flags"].get(flag)) for flag in flags)]
            for row in found.candidates
        ]
        yield from _table(["candidate", "judged", "Likert", *(flag.replace("_", " ") for flag in flags)], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=200, markup=False, highlight=False, color_system=None)
    console.print(table)
    return ["", *(line.rstrip() for line in console.file.getvalue().splitlines())]


def _counts(row: Row, *names: str) -> list[str]:
    return [f"{row[name]:,}" for name in names]


def _interval(row: Row, name: str = "rate") -> str:
    return _number(row[name]) + _ends(row)


def _ends(row: Row, prefix: str = "") -> str:
    return "" if row[f"{prefix}low"] is None else f" [{row[f'{prefix}low']:.2f}, {row[f'{prefix}high']:.2f}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
