"""Who says which answer is better: a reward adapter (a check on one reward model by another), or a language model that is asked.

Neither is a human verdict; both are judged themselves by how often they agree with people. A language model's verdict that does not
come, or cannot be read, is missing: it is never scored as a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..data.generating import pairwise
from ..data.generating.completer import Budget, Completions, Endpoint, Messages, Request
from ..data.generating.pairwise import Pair, Verdicts, verdict_in
from ..data.generating.templates import Prompts, read_prompts, transcript
from ..errors import InstructLiteError
from ..models.manifest import Adapter, unused
from . import outcomes, statistics
from .outcomes import Contest


@dataclass(frozen=True)
class RewardJudge:
    """A reward adapter, or an ensemble of them, under the name it has in the report; `roles` are what they are loaded as."""

    name: str
    members: tuple[Adapter, ...]
    roles: tuple[str, ...]

    def __post_init__(self) -> None:
        for member in self.members:
            if member.role != "reward":
                raise InstructLiteError(f"{member}: a {member.role} adapter cannot judge; pass one that RewardRecipe wrote")

    @property
    def kind(self) -> str:
        return "reward" if len(self.members) == 1 else "ensemble"

    def combined(self, scores: Mapping[str, Sequence[float]]) -> np.ndarray:
        """One score for each answer from those of the members by role: their mean, each in units of its own spread where that is known."""
        each = np.array([scores[role] for role in self.roles])
        measured = [member.metrics for member in self.members]
        if len(each) == 1 or not all(found.get("score_std") for found in measured):
            return each.mean(0)
        means, spreads = (np.array([found[name] for found in measured])[:, None] for name in ("score_mean", "score_std"))
        return ((each - means) / spreads).mean(0)

    def to_dict(self, rewarded_by: Mapping[str, set[str]]) -> dict[str, Any]:
        """Its row in the report: its own accuracy, and whom it trained. rewarded_by: by candidate the hashes of the reward models that it
        was trained on, or that its answers were chosen by."""
        own = {member.sha256 for member in self.members}
        found = self.members[0].metrics
        return {
            "name": self.name,
            "kind": self.kind,
            "adapter": self.members[0].sha256,
            **{name: found.get(f"eval_{name}") for name in ACCURACY},
            "trained": [name for name, rewards in rewarded_by.items() if rewards & own],
            "not_trained": [name for name, rewards in rewarded_by.items() if rewards and not rewards & own],
        }


ACCURACY = ("accuracy", "accuracy_low", "accuracy_high", "pairs", "longer_wins")


Scale = Literal["pointwise", "likert"]
SCALES: dict[str, tuple[int, int]] = {"pointwise": (1, 10), "likert": (1, 7)}


@dataclass(frozen=True)
class Answered:
    """An answer to be rated. reference: what a person answered, for rating by it."""

    prompt: Messages
    answer: str
    reference: str | None = None


@dataclass(frozen=True)
class LanguageModelJudge:
    """A language model, behind an endpoint or in memory, asked by the prompts of data/generating/prompts/judge.yaml or of a file."""

    name: str
    completions: Completions
    prompts: Prompts = field(default_factory=lambda: read_prompts("judge"))
    max_tokens: int = 512

    @classmethod
    def of(cls, completions: Completions, prompts: str | Path | None = None, **options: Any) -> LanguageModelJudge:
        return cls(completions.model, completions, read_prompts("judge", prompts), **options)

    def to_dict(self, rewarded_by: Mapping[str, set[str]]) -> dict[str, Any]:
        """Its row in the report, what it is; it has trained nobody."""
        return {"name": self.name, "kind": "language model", "adapter": None, **dict.fromkeys(ACCURACY), "trained": [], "not_trained": []}

    def compare(self, pairs: Sequence[Pair]) -> Verdicts:
        """Every pair in both orders; see pairwise.py."""
        return pairwise.compare(self.completions, self.prompts, pairs, max_tokens=self.max_tokens, label=f"judged by {self.name}")

    def rate(self, answers: Sequence[Answered], scale: Scale = "pointwise") -> np.ndarray:
        """A whole number of the scale for each answer, NaN where none came that is on it."""
        low, high = SCALES[scale]
        requests = [Request(self._question(item, scale), 0.0, self.max_tokens) for item in answers]
        said = [verdict_in(answer.text) for answer in self.completions.ask(requests, f"rated by {self.name}")]
        numbers = [float(text) if text and text.isdecimal() else np.nan for text in said]
        return np.array([number if low <= number <= high else np.nan for number in numbers])

    def _question(self, item: Answered, scale: Scale) -> Messages:
        values = {"conversation": transcript(item.prompt), "answer": item.answer}
        if item.reference is None:
            return self.prompts.message(scale, **values)
        return self.prompts.message(f"{scale}_reference", reference=item.reference, **values)

    def accuracy(self, comparisons: Sequence[Mapping], *, seed: int = 0) -> dict[str, Any]:
        """How often it prefers what people preferred, a tie counting half; with the interval, and what is wrong with the judge."""
        verdicts = self.compare([Pair(row["prompt"], row["chosen"], row["rejected"]) for row in comparisons])
        found = accuracy(comparisons, [np.nan if outcome is None else outcome for outcome in verdicts.outcomes], seed=seed)
        return verdicts.measured() | {"warnings": verdicts.warnings()} | found


def accuracy(comparisons: Sequence[Mapping], won: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """Of a judge's outcomes for people's comparisons (1: it prefers what they chose, NaN: no verdict): how often that is so, with the
    interval, on how many pairs, and how often the longer answer was chosen."""
    differences = [len(row["chosen"]) - len(row["rejected"]) for row in comparisons]
    grid = statistics.by_prompt(zip((row["prompt"] for row in comparisons), won, strict=True))
    found = None if np.isnan(grid).all() else statistics.preference_rate(grid, seed=seed)
    values = (found.value, found.low, found.high) if found else (None, None, None)
    longer = float(np.mean([0.5 + 0.5 * np.sign(difference) for difference in differences]))
    return dict(zip(ACCURACY, (*values, int((~np.isnan(grid)).sum()), longer), strict=True))


@dataclass(frozen=True)
class People:
    """What people voted, on whatever answers of the candidates they were shown: (decoding, contest) for each pair of candidates."""

    contests: tuple[tuple[str, Contest], ...]
    name: str = "people"

    @classmethod
    def of(cls, votes: Iterable[Mapping[str, Any]], candidates: Mapping[str, str]) -> People | None:
        """votes: rows of a, b (hash of the adapter, "" for the base alone), a_text, b_text, prompt, decoding, outcome (1: a was
        preferred, 0.5 neither). candidates: name by hash. None where no vote is about two of them."""
        found: dict[tuple[str, str, str], list[tuple[Any, float, int]]] = {}
        for vote in votes:
            a, b = (candidates.get(vote[side]) for side in ("a", "b"))
            if a is None or b is None or a == b:
                continue
            order = list(candidates.values())
            row = (vote["prompt"], vote["outcome"], len(vote["a_text"]) - len(vote["b_text"]))
            if order.index(a) < order.index(b):  # the one that comes later is a, as in all other rows
                a, b, row = b, a, (row[0], 1 - row[1], -row[2])
            found.setdefault((vote["decoding"], a, b), []).append(row)
        prompts = {repr(prompt): number for number, prompt in enumerate(row[0] for rows in found.values() for row in rows)}
        contests = []
        for (decoding, a, b), rows in found.items():
            won, longer = (statistics.by_prompt((row[0], row[place]) for row in rows) for place in (1, 2))
            numbers = tuple(dict.fromkeys(prompts[repr(row[0])] for row in rows))
            contests.append((decoding, Contest(a, b, won, longer, numbers)))
        return cls(tuple(contests)) if contests else None

    def to_dict(self, rewarded_by: Mapping[str, set[str]]) -> dict[str, Any]:
        return {"name": self.name, "kind": "people", "adapter": None, **dict.fromkeys(ACCURACY), "trained": [], "not_trained": []}


Judge = RewardJudge | LanguageModelJudge | People


LANGUAGE_MODEL = "llm:"
VERDICTS = "verdicts.sqlite"
"""Where, beside a report, what language models said is kept."""


def language_model(spelled: str, cache: str | Path | None, *, budget: Budget | None = None, **options: Any) -> LanguageModelJudge:
    """The judge that "llm:MODEL@URL" names, an OpenAI-compatible endpoint ("llm:MODEL@openai": OpenAI's), or "llm:MODEL", in memory.

    cache: the file where its answers are kept. budget: what may be spent; pairs that are then not asked are missing, the headline's last.
    options: of the Endpoint.
    """
    model, at, url = spelled.removeprefix(LANGUAGE_MODEL).rpartition("@")
    if at and (url == "openai" or "://" in url):
        return LanguageModelJudge.of(Completions(Endpoint(model, None if url == "openai" else url, **options), cache, budget))
    from ..models.completer import LocalCompleter  # an endpoint judges without torch

    return LanguageModelJudge.of(Completions(LocalCompleter.load(spelled.removeprefix(LANGUAGE_MODEL)), cache, budget))


def judges_of(given: Any, cache: str | Path | None = None) -> list[RewardJudge | LanguageModelJudge]:
    """Judges from what a user may give: one, several, or {name: judge}; each a reward adapter (its directory, a Hub repository), a
    list of them as an ensemble, a LanguageModelJudge, or "llm:MODEL@URL" and "llm:MODEL".

    cache: where the answers of language models are kept. Raises InstructLiteError where one cannot judge.
    """
    single = isinstance(given, (str, Path, Adapter, LanguageModelJudge))
    named = list(given.items()) if isinstance(given, Mapping) else [(None, one) for one in ([given] if single else given)]
    judges: list[RewardJudge | LanguageModelJudge] = []
    for number, (name, one) in enumerate(named):
        if isinstance(one, str) and one.startswith(LANGUAGE_MODEL):
            one = language_model(one, cache)
        judge = one if isinstance(one, LanguageModelJudge) else reward_judge(one, f"judge{number}")
        judges.append(replace(judge, name=unused(name or judge.name, [other.name for other in judges])))
    if not judges:
        raise InstructLiteError("judge: there is none; pass a reward adapter")
    return judges


def reward_judge(given: Any, role: str) -> RewardJudge:
    """A reward adapter, with the other members where it is an ensemble, or several as one."""
    listed = [given] if isinstance(given, (str, Path, Adapter)) else given
    members = tuple(itertools.chain(*(Adapter.load(one).members for one in listed)))
    return RewardJudge(members[0].name, members, tuple(f"{role}_{number}" for number in range(len(members))))


def position_bias(pairs: Sequence[Pair], verdicts: Verdicts, *, seed: int = 0) -> statistics.Interval | None:
    """How much oftener the first place won in both orders than the second did, as a share of the pairs: 0 for a fair judge."""
    places = zip(pairs, verdicts.first_order, verdicts.second_order, verdicts.same, strict=True)
    known = [(pair.prompt, (x == y == 1) - (x == y == 0)) for pair, x, y, same in places if not same and None not in (x, y)]
    return statistics.mean(np.nanmean(statistics.by_prompt(known), 1), seed=seed) if known else None


def preference(pairs: Sequence[Pair], verdicts: Verdicts, *, margin: float = 0.05, seed: int = 0) -> dict[str, Any]:
    """How often the pairs' `a` was preferred: plain and length-controlled rate with intervals over prompts, and warnings.

    margin: to either side; `prompts_needed` says how many prompts an interval of it takes.
    """
    known = zip(pairs, verdicts.outcomes, strict=True)
    won = statistics.by_prompt((pair.prompt, np.nan if outcome is None else outcome) for pair, outcome in known)
    longer = statistics.by_prompt((pair.prompt, len(pair.a) - len(pair.b)) for pair in pairs)
    found = outcomes.rate(won, longer, margin=margin, seed=seed)
    return found | verdicts.measured() | {"warnings": [*verdicts.warnings(), *found["warnings"]]}
