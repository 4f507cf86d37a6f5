"""Every judge on every pair of candidates: outcomes of all comparisons, and the report's rows that are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..data.generating.pairwise import Pair, Verdicts
from ..models.sampling import Sampling
from . import outcomes, statistics
from .judges import SCALES, Answered, Judge, LanguageModelJudge, People, RewardJudge, position_bias
from .outcomes import Contest

Row = dict[str, Any]


@dataclass
class Decoding:
    """Answers to all prompts, drawn one way: prompt by prompt, `samples` of each. Not every candidate takes part in every decoding."""

    name: str
    sampling: Sampling
    samples: int
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """Candidate -> token ids, with the stop token where one came."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """(reward judge, candidate) -> (prompts, samples)."""


class Match(NamedTuple):
    """Whose answers, drawn how, against whose."""

    a: str
    b: str
    decoding: str
    b_decoding: str


@dataclass
class Judging:
    """The candidates' answers before the judges. rows: the prompts, with `prompt` and, for judging by it, `reference`."""

    judges: Sequence[Judge]
    decodings: Sequence[Decoding]
    rows: Sequence[Mapping[str, Any]]
    headline: tuple[str, str] | None
    reference: str | None
    seed: int

    def matches(self) -> list[Match]:
        """All pairs in each decoding, the headline's first; then sampled answers against the reference's greedy ones."""
        found = []
        for decoding in self.decodings:
            pairs = [(a, b) for b, a in itertools.combinations(decoding.answers, 2)]
            pairs.sort(key=lambda pair: pair != self.headline)
            found += [Match(a, b, decoding.name, decoding.name) for a, b in pairs]
        if len(self.decodings) > 1 and self.reference:
            sampled, greedy = self.decodings
            others = [name for name in sampled.answers if name != self.reference]
            others.sort(key=lambda name: (name, self.reference) != self.headline)
            found += [Match(name, self.reference, sampled.name, greedy.name) for name in others]
        return found

    # --- outcomes ---------------------------------------------------------------------------------------------------

    @cached_property
    def paired(self) -> dict[str, dict[Match, np.ndarray]]:
        """By judge the outcomes (prompts, samples) of answer i against answer i, or against the only one."""
        found: dict[str, dict[Match, np.ndarray]] = {}
        for judge in self.judges:
            if isinstance(judge, RewardJudge):
                found[judge.name] = {match: _won(*(np.broadcast_arrays(*self._scores(judge, match)))) for match in self.matches()}
            elif isinstance(judge, LanguageModelJudge):
                found[judge.name] = {match: self._of_verdicts(judge, match) for match in self.verdicts[judge.name]}
        return found

    @cached_property
    def verdicts(self) -> dict[str, dict[Match, Verdicts]]:
        """By language model what it says, each asked everything at once; sampled against greedy answers only for the headline."""
        found = {}
        for judge in self.judges:
            if isinstance(judge, LanguageModelJudge):
                matches = [m for m in self.matches() if m.decoding == m.b_decoding or (m.a, m.b) == self.headline]
                parts = [self.pairs(match) for match in matches]
                said = judge.compare([pair for part in parts for pair in part])
                ends = list(itertools.accumulate(map(len, parts), initial=0))
                found[judge.name] = {m: said.part(range(*ends)) for m, ends in zip(matches, itertools.pairwise(ends), strict=True)}
        return found

    def _of_verdicts(self, judge: LanguageModelJudge, match: Match) -> np.ndarray:
        said = [np.nan if outcome is None else outcome for outcome in self.verdicts[judge.name][match].outcomes]
        return np.array(said).reshape(len(self.rows), -1)

    def pairs(self, match: Match) -> list[Pair]:
        """Prompt by prompt, answer i against answer i, or against the only one."""
        ours, theirs = self._texts(match)
        texts = zip(self.rows, ours, theirs, strict=True)
        return [Pair(row["prompt"], x, y, row.get("reference")) for row, xs, ys in texts for x, y in _side_by_side(xs, ys)]

    def contest(self, judge: Judge, match: Match) -> Contest:
        """What the win rate is made of: of reward judges every answer of a against every answer of b to the same prompt."""
        numbers = tuple(range(len(self.rows)))
        ours, theirs = self._texts(match)
        if isinstance(judge, RewardJudge):
            a, b = self._scores(judge, match)
            won = _won(a[:, :, None], b[:, None, :]).reshape(len(numbers), -1)
            longer = [[len(x) - len(y) for x in xs for y in ys] for xs, ys in zip(ours, theirs, strict=True)]
            return Contest(match.a, match.b, won, np.array(longer), numbers)
        won = self.paired[judge.name][match]
        longer = [[len(x) - len(y) for x, y in _side_by_side(xs, ys)] for xs, ys in zip(ours, theirs, strict=True)]
        return Contest(match.a, match.b, won, np.array(longer), numbers)

    def _sides(self, match: Match) -> tuple[Decoding, Decoding]:
        by_name = {decoding.name: decoding for decoding in self.decodings}
        return by_name[match.decoding], by_name[match.b_decoding]

    def _scores(self, judge: RewardJudge, match: Match) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = self._sides(match)
        return ours.scores[judge.name, match.a], theirs.scores[judge.name, match.b]

    def _texts(self, match: Match) -> tuple[list[list[str]], list[list[str]]]:
        """Of both sides, a list for each prompt."""
        sides = zip(self._sides(match), (match.a, match.b), strict=True)
        return tuple([list(part) for part in _portions(side.texts[name], side.samples)] for side, name in sides)

    # --- rows of the report -----------------------------------------------------------------------------------------

    @cached_property
    def contests(self) -> dict[str, dict[Match, Contest]]:
        """By judge what its win rates and strengths are made of."""
        return {judge.name: self._contests(judge) for judge in self.judges}

    def _contests(self, judge: Judge) -> dict[Match, Contest]:
        if isinstance(judge, People):
            return {Match(contest.a, contest.b, decoding, decoding): contest for decoding, contest in judge.contests}
        matches = self.matches() if isinstance(judge, RewardJudge) else self.verdicts[judge.name]
        return {match: self.contest(judge, match) for match in matches}

    @property
    def rates(self) -> int:
        """How many win rates there are."""
        return sum(map(len, self.contests.values()))

    def win_rates(self, advance: Callable[[], None] = lambda: None) -> list[Row]:
        """advance: called after each."""
        rows = []
        for judge in self.judges:
            for match, contest in self.contests[judge.name].items():
                rows.append(self._win_rate(judge, match, contest))
                advance()
        order = {decoding.name: number for number, decoding in enumerate(self.decodings)}
        return sorted(rows, key=lambda row: ("b_decoding" in row, order.get(row["decoding"], len(order))))

    def _win_rate(self, judge: Judge, match: Match, contest: Contest) -> Row:
        row: Row = {"a": match.a, "b": match.b, "judge": judge.name, "decoding": match.decoding}
        if match.b_decoding != match.decoding:
            row["b_decoding"] = match.b_decoding
        row |= outcomes.rate(contest.outcomes, contest.longer, seed=self.seed)
        gain = None
        if isinstance(judge, RewardJudge):
            ours, theirs = self._scores(judge, match)
            gain = statistics.mean(ours.mean(1) - theirs.mean(1), seed=self.seed)
        if isinstance(judge, LanguageModelJudge):
            said = self.verdicts[judge.name][match]
            row["warnings"] = [*said.warnings(), *row["warnings"]]
            row["missing"] = said.measured()["missing"]
        return row | flat("gain", gain)

    def strengths(self) -> list[Row]:
        rows = []
        for decoding, judge in itertools.product(self.decodings, self.judges):
            plain = [contest for match, contest in self.contests[judge.name].items() if match[2:] == (decoding.name, decoding.name)]
            found = outcomes.strengths(plain, seed=self.seed)
            rows += [{"judge": judge.name, "decoding": decoding.name, **row} for row in found]
        return rows

    def agreement(self) -> Row | None:
        """Between the judges that compared the same answers; people voted on others."""
        matches = list(dict.fromkeys(match for found in self.paired.values() for match in found))
        shapes = {match: next(found[match].shape for found in self.paired.values() if match in found) for match in matches}
        columns = [
            np.concatenate([found.get(match, np.full(shapes[match], np.nan)).ravel() for match in matches]) if matches else np.empty(0)
            for found in self.paired.values()
        ]
        prompts = [np.repeat(np.arange(len(self.rows)), shapes[match][1]) for match in matches]
        return outcomes.agreement(list(self.paired), columns, np.concatenate(prompts), seed=self.seed) if matches else None

    def heard(self, judge: Judge) -> Row:
        """Of a language model: what it said of all pairs, and what is wrong with that."""
        if not isinstance(judge, LanguageModelJudge):
            return {}
        parts = self.verdicts[judge.name]
        said, pairs = Verdicts.together(parts.values()), [pair for match in parts for pair in self.pairs(match)]
        found = said.measured()
        counts = {"same_in_both_orders": found["consistent"], "missing": found["missing"], "judged": found["judged"]}
        bias = flat("position_bias", position_bias(pairs, said, seed=self.seed))
        return {**counts, **bias, "warnings": said.warnings()}

    def ratings(self, scales: Iterable[str]) -> list[Row]:
        rows = []
        raters = [judge for judge in self.judges if isinstance(judge, LanguageModelJudge)]
        for judge, scale, decoding in itertools.product(raters, scales, self.decodings):
            for name, texts in decoding.texts.items():
                portions = zip(self.rows, _portions(texts, decoding.samples), strict=True)
                answers = [Answered(row["prompt"], text, row.get("reference")) for row, part in portions for text in part]
                said = judge.rate(answers, scale).reshape(len(self.rows), -1)
                by_reference = "_reference" if any(answer.reference for answer in answers) else ""
                known = said[~np.isnan(said).all(1)]
                mean = statistics.mean(np.nanmean(known, 1), seed=self.seed) if len(known) else None
                named = {"candidate": name, "judge": judge.name, "scale": scale + by_reference, "decoding": decoding.name}
                rows.append({**named, **flat("rating", mean), "missing": int(np.isnan(said).sum()), "highest": SCALES[scale][1]})
        return rows

    def margins(self, judge: Judge, match: Match) -> np.ndarray | None:
        """(prompts, samples): by how much answer i of a is better; None where the judge did not see them."""
        if isinstance(judge, RewardJudge):
            a, b = self._scores(judge, match)
            return a - b
        found = self.paired.get(judge.name, {}).get(match)
        return None if found is None else np.nan_to_num(found, nan=0.5) - 0.5


def _won(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a > b) + 0.5 * (a == b)


def _portions(values: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _side_by_side(ours: Sequence[str], theirs: Sequence[str]) -> Iterable[tuple[str, str]]:
    return zip(ours, theirs if len(theirs) == len(ours) else itertools.cycle(theirs), strict=False)


def flat(name: str, interval: statistics.Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
