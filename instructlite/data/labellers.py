"""`instructlite data report`: who judged how much, and how far people agree where several judged the same.

A vote is one pair of answers and which of them is preferred: a comparison is one, a ranking of K answers K(K-1)/2 less its ties.
Likert scores are compared as numbers too. Memory grows by some 16 bytes a vote; texts are not kept.
"""

import importlib.util
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .agreement import agreement, alpha
from .formats import Row, rows
from .repeats import prompt_key
from .schema import Fault, annotator_of

GROUPS = ("group", "gender", "age", "age_group", "country", "nationality", "ethnicity", "education", "language", "demographics")
"""Columns that tell groups of annotators when none is named; an object's keys are columns of their own (`demographics.age`)."""
SUSPICIOUS = 20  # shared votes from which on an agreement below one half is more than bad luck


@dataclass
class LabellerReport:
    rows: int = 0
    faults: int = 0
    """Rows that could not be read, and are not in the rest."""
    unnamed: int = 0
    """Rows of nobody in particular: they are counted, and left out of the agreement."""
    kinds: Counter = field(default_factory=Counter)
    shared: int = 0
    """Pairs that two or more judged."""
    alpha: float | None = None
    """Krippendorff's alpha over them, nominal."""
    scored: int = 0
    """Answers that two or more scored."""
    score_alpha: float | None = None
    """Krippendorff's alpha over them, with the differences of scores (interval)."""
    annotators: list[dict] = field(default_factory=list)
    """name, rows, shared (votes on pairs that others judged too), agreement (share of these others), first, last, flags."""
    groups: dict[str, list[dict]] = field(default_factory=dict)
    """By column: name, rows, shared and agreement (with people of other groups), alpha (inside the group)."""

    @property
    def notes(self) -> list[str]:
        """What a person should know of these numbers."""
        notes = []
        if self.faults:
            notes.append(f"{self.faults:,} rows could not be read and are left out (instructlite data check names them)")
        if not self.annotators:
            notes.append("no row names who judged it (a column 'annotator'), so that nothing can be said of agreement")
        elif not self.shared and not self.scored:
            notes.append(
                "no two annotators judged the same answers: let some items be judged twice (InstructGPT's labellers agreed on 73 %)"
            )
        elif not importlib.util.find_spec("krippendorff"):
            notes.append("for Krippendorff's alpha: pip install 'instructlite[data]'")
        for row in self.annotators:
            if row["shared"] >= SUSPICIOUS and row["agreement"] < 0.5:
                notes.append(
                    f"{row['name']} agrees with the others in {row['agreement']:.2f} of {row['shared']:,} votes, less than coins would"
                )
        return notes


def report_on(files: Sequence[str | Path], by: Iterable[str] = (), kind: str | None = None) -> LabellerReport:
    """Read the files once. by: columns that tell groups (`country`, `demographics.age`); none: those of GROUPS that are there."""
    report, votes = LabellerReport(), _Votes(tuple(by))
    for file in files:
        for row in rows(file, kind):
            if isinstance(row, Fault):
                report.faults += row.rows
                continue
            report.rows += 1
            report.kinds[row.kind] += 1
            if (name := annotator_of(row.record)) is None:
                report.unnamed += 1
            votes.add(row, name)
    votes.settle(report)
    return report


class _Votes:
    """Pair keys, votes and raters of all rows, and what is counted by annotator and by group."""

    def __init__(self, by: tuple[str, ...]):
        self.by = by
        self.people: dict[str, dict[str, Any]] = {}
        self.group_rows: dict[str, Counter] = {}
        self.pairs, self.sides, self.raters = array("q"), array("b"), array("l")
        self.items, self.scores, self.scorers = array("q"), array("d"), array("l")
        self.groups: dict[str, dict[str, int]] = {}
        self.group_votes: dict[str, array] = {}

    def add(self, row: Row, name: str | None) -> None:
        columns = dict(_columns(row.record, self.by))
        for column, value in columns.items():
            self.group_rows.setdefault(column, Counter())[value] += 1
        if name is None:
            return
        person = self.people.setdefault(name, {"number": len(self.people), "rows": 0, "dates": set(), "flags": Counter()})
        person["rows"] += 1
        person["flags"].update(key for key, value in _flat(row.record) if value is True)
        if isinstance(created := row.record.get("created"), str):
            person["dates"] = {min(person["dates"] | {created}), max(person["dates"] | {created})}
        before = len(self.pairs)
        for pair, side in _pairs(row):
            self.pairs.append(pair)
            self.sides.append(side)
            self.raters.append(person["number"])
        for item, score in _scores(row):
            self.items.append(item)
            self.scores.append(score)
            self.scorers.append(person["number"])
        self._add_groups(columns, before)

    def _add_groups(self, columns: Mapping[str, str], before: int) -> None:
        """The group of each vote since `before`; -1 where the row has none."""
        for column in {*self.groups, *columns}:
            names = self.groups.setdefault(column, {})
            numbers = self.group_votes.setdefault(column, array("l"))
            numbers.extend([-1] * (before - len(numbers)))
            number = names.setdefault(columns[column], len(names)) if column in columns else -1
            numbers.extend([number] * (len(self.pairs) - before))

    def settle(self, report: LabellerReport) -> None:
        pairs, sides, raters = (np.frombuffer(numbers, numbers.typecode) for numbers in (self.pairs, self.sides, self.raters))
        once = _once(pairs, raters)
        pairs, sides, raters = pairs[once], sides[once].astype(int), raters[once]
        report.shared = _several(pairs)
        report.alpha = alpha(pairs, sides)
        report.scored, report.score_alpha = self._score_alpha()
        for row in agreement(pairs, sides, raters, list(self.people)):
            person = self.people[row["name"]]
            dates = sorted(person["dates"]) or [None]
            report.annotators.append(row | {"rows": person["rows"], "first": dates[0], "last": dates[-1], "flags": dict(person["flags"])})
        report.annotators.sort(key=lambda row: -row["rows"])
        for column, counted in self.group_rows.items():
            names = self.groups.get(column, {})
            groups = np.frombuffer(self.group_votes.get(column, array("l")), "l")[once]
            known = groups >= 0
            agreeing = {row["name"]: row for row in agreement(pairs[known], sides[known], groups[known], list(names))}
            report.groups[column] = [
                {"shared": 0, "agreement": None, **agreeing.get(name, {}), "name": name, "rows": count}
                | {"alpha": alpha(pairs[groups == names[name]], sides[groups == names[name]]) if name in names else None}
                for name, count in counted.most_common()
            ]

    def _score_alpha(self) -> tuple[int, float | None]:
        items, scores, scorers = (np.frombuffer(numbers, numbers.typecode) for numbers in (self.items, self.scores, self.scorers))
        once = _once(items, scorers)
        items, scores = items[once], scores[once]
        return _several(items), alpha(items, scores, "interval")


def _pairs(row: Row) -> Iterator[tuple[int, int]]:
    """(key of the pair, 0 or 1 for which of the two is preferred), ties left out."""
    record = row.record
    if row.kind == "comparisons":
        ranked = [(record["chosen"], 0), (record["rejected"], 1)]
    elif row.kind == "rankings":
        ranked = list(zip(record["responses"], record["ranks"], strict=True))
    else:
        return
    prompt = hash(prompt_key(record, row.kind))
    for (first, one), (second, two) in combinations(sorted(ranked), 2):
        if one != two:
            yield hash((prompt, first, second)), int(one > two)


def _scores(row: Row) -> Iterator[tuple[int, float]]:
    if row.kind == "rankings" and isinstance(scores := row.record.get("scores"), list):
        prompt = hash(prompt_key(row.record, row.kind))
        for response, score in zip(row.record["responses"], scores, strict=False):
            if isinstance(score, (int, float)):
                yield hash((prompt, response)), score


def _columns(record: Mapping, by: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for column, value in _flat(record):
        if (column in by if by else column.split(".")[0] in GROUPS) and value is not None:
            yield column, str(value)


def _flat(record: Mapping) -> Iterator[tuple[str, Any]]:
    """Columns and, of objects, their keys as `column.key`."""
    for column, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{column}.{key}", item) for key, item in value.items())
        else:
            yield column, value


def _once(keys: np.ndarray, raters: np.ndarray) -> np.ndarray:
    """The first vote of each rater on each pair: who judges twice is not two people."""
    _, first = np.unique(np.stack([keys, raters.astype(np.int64)], axis=1), axis=0, return_index=True)
    return np.sort(first)


def _several(keys: np.ndarray) -> int:
    return int((np.unique(keys, return_counts=True)[1] > 1).sum())
