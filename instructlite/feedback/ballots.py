"""What is asked, what a voter may see of it, what a voter says, and what is kept of that.

Two sides that must not mix: a `Showing` goes to a voter and holds no candidate, no id and no score; `Vote` and `Judged` are what the
server knows, for export, insight and the reveal after the vote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InstructLiteError

LIKERT = (1, 7)
MAX_ANSWERS = 9  # InstructGPT's labellers ranked 4 to 9
MAX_COMMENT, MAX_EDIT = 4_000, 40_000  # characters; checked here, since what a page limits an API call does not
FLAGS = {
    "fails_instruction": "fails to follow the instruction",
    "inappropriate": "inappropriate for a customer assistant",
    "hallucination": "hallucination",
    "satisfies_constraint": "satisfies the constraint given in the instruction",
    "sexual": "contains sexual content",
    "violent": "contains violent content",
    "harmful_advice": "gives harmful advice",
    "denigrates": "denigrates a protected class",
    "gives_advice": "gives advice",
    "moral_judgement": "expresses a moral judgement",
}
"""The metadata that InstructGPT's labellers gave for each answer (Ouyang et al. 2022, table 3), each yes or no."""


class AlreadyVoted(InstructLiteError):
    """The voter has voted on this item, and otherwise."""


@dataclass(frozen=True)
class Candidate:
    """Who answers: an adapter by its hash (`Adapter.sha256`), or the base alone (""); `base` is the base's id."""

    name: str
    base: str = ""
    adapter: str = ""


@dataclass(frozen=True)
class Answer:
    """text None: it is being written; nobody can vote on it before `Store.finish` has its text."""

    candidate: Candidate
    text: str | None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Showing:
    """What one voter sees of one item. The order of the answers is his alone; `ticket` is what he votes with."""

    ticket: str
    prompt: list[dict]
    answers: tuple[str | None, ...]
    voted: bool


@dataclass(frozen=True)
class Voter:
    """`key` is a secret between the store and one browser; the name in everything that is exported is made from its hash."""

    key: str
    name: str | None
    group: str | None


@dataclass(frozen=True)
class Ballot:
    """What a voter says of the answers he was shown, in the order in which he was shown them."""

    ranks: tuple[int | None, ...] | None = None
    """The lowest the best, equal ones tie; those with None are behind the others, and not compared with one another. No ranks at
    all: taken from the Likert scores."""
    all_bad: bool = False
    """A tie, and none of them is any good."""
    likert: tuple[int | None, ...] | None = None
    flags: tuple[Sequence[str] | None, ...] | None = None
    """Names of FLAGS for each answer; None where they were not asked."""
    edits: tuple[str | None, ...] | None = None
    """Answers as they should have been: demonstrations."""
    comment: str | None = None

    @classmethod
    def better(cls, place: int, answers: int = 2, **rest: Any) -> "Ballot":
        """The answer at `place` (from 0) is the best; which of the others is better is not said."""
        if place not in range(answers):
            raise InstructLiteError(f"there is no answer {place + 1} of {answers}")
        return cls(tuple(0 if number == place else None for number in range(answers)), **rest)

    @classmethod
    def tie(cls, answers: int = 2, **rest: Any) -> "Ballot":
        return cls((0,) * answers, **rest)

    @classmethod
    def both_bad(cls, answers: int = 2, **rest: Any) -> "Ballot":
        return cls((0,) * answers, all_bad=True, **rest)

    def judgements(self, answers: int) -> list[dict]:
        """{rank, likert, flags, edited} for each place, ranks as 0, 1, 2 …; raises InstructLiteError if it does not fit what was asked."""
        columns = {name: self._column(name, answers) for name in ("ranks", "likert", "flags", "edits")}
        _check_likert(columns["likert"])
        ranks = _tidy(columns["ranks"] if self.ranks is not None else _from_likert(columns["likert"]))
        if self.all_bad and len(set(ranks)) > 1:
            raise InstructLiteError("the vote says that all answers are bad, and that some are better (give all the same rank)")
        if self.comment is not None:
            _check_text(self.comment, "the comment", MAX_COMMENT)
        for edit in columns["edits"]:
            if edit is not None:
                _check_text(edit, "the edited answer", MAX_EDIT)
        flags = [None if given is None else _known_flags(given) for given in columns["flags"]]
        return [
            {"rank": rank, "likert": likert, "flags": flag, "edited": edit}
            for rank, likert, flag, edit in zip(ranks, columns["likert"], flags, columns["edits"], strict=True)
        ]

    def _column(self, name: str, answers: int) -> tuple:
        given = getattr(self, name)
        if given is None:
            return (None,) * answers
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != answers:
            raise InstructLiteError(f"the vote's '{name}' do not fit the {answers} answers shown (one for each)")
        return tuple(given)


@dataclass(frozen=True)
class Judged:
    """One answer as one voter judged it, with what the voter did not know."""

    id: int
    candidate: Candidate
    text: str
    decoding: Mapping[str, Any]
    seed: int | None
    scores: Mapping[str, float]
    """What reward models gave it, by their names."""
    place: int | None
    """Where it was shown; None for votes cast elsewhere."""
    rank: int | None
    likert: int | None
    flags: tuple[str, ...] | None
    edited: str | None


@dataclass(frozen=True)
class Vote:
    """One voter's word on one item, the answers in an order that says nothing."""

    item: int
    prompt: list[dict]
    use_case: str | None
    gold: tuple[int, ...] | None
    """The right ranks, for items that calibrate voters."""
    voter: str
    """A pseudonym, always the same for the same voter."""
    name: str | None
    group: str | None
    created: str
    """UTC, ISO 8601."""
    seconds: float | None
    """From the showing to the vote."""
    all_bad: bool
    comment: str | None
    answers: tuple[Judged, ...]


def outcome(a: Judged, b: Judged) -> float | None:
    """1 if the voter preferred a, 0 if b, 0.5 for a tie; None: they were not compared."""
    if a.rank is None and b.rank is None:
        return None
    behind = MAX_ANSWERS  # beyond any rank
    first, second = (behind if answer.rank is None else answer.rank for answer in (a, b))
    return 0.5 + 0.5 * ((first < second) - (first > second))


def _tidy(ranks: Sequence[int | None]) -> list[int | None]:
    """Ranks as 0, 1, 2 …; a single answer without one is the last."""
    known = [rank for rank in ranks if rank is not None]
    if not known or any(isinstance(rank, bool) or not isinstance(rank, int) for rank in known):
        raise InstructLiteError(f"the vote's ranks are {str(list(ranks))[:80]}, expected whole numbers, the lowest the best")
    order = sorted(set(known))
    last = len(order) if len(known) == len(ranks) - 1 else None
    return [last if rank is None else order.index(rank) for rank in ranks]


def _check_likert(scores: Sequence[int | None]) -> None:
    low, high = LIKERT
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, int) or not low <= score <= high):
            raise InstructLiteError(f"a Likert score is {score!r}, expected a whole number from {low} to {high}")


def _from_likert(scores: Sequence[int | None]) -> tuple[int, ...]:
    if None in scores:
        raise InstructLiteError("the vote has neither ranks nor a Likert score for every answer")
    return tuple(-score for score in scores)


def _known_flags(given: Sequence[str]) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InstructLiteError("the flags of an answer are no list")
    unknown = [flag for flag in given if not isinstance(flag, str) or flag not in FLAGS]
    if unknown:
        raise InstructLiteError(f"unknown flag {str(unknown[0])[:40]!r} (known: {', '.join(FLAGS)})")
    return [flag for flag in FLAGS if flag in given]


def _check_text(text: object, what: str, longest: int) -> None:
    if not isinstance(text, str):
        raise InstructLiteError(f"{what} is no text")
    if len(text) > longest:
        raise InstructLiteError(f"{what} has {len(text):,} characters, at most {longest:,} are taken (shorten it)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InstructLiteError(f"{what} holds half of a character, which cannot be saved (type it again)") from None
