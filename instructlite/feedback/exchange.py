"""Votes as the records that training reads, and records as votes.

Nothing disappears: what goes into no record is counted with the reason. A row is written only if the reader of training data takes it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

from ..data.records import read_records
from ..errors import BadRecords, InstructLiteError
from .ballots import AlreadyVoted, Answer, Ballot, Candidate, Judged, Vote, outcome
from .store import MAX_NAME, Store

To = Literal["comparisons", "rankings", "demonstrations", "likert"]
Counting = Literal["consensus", "all"]
KINDS: dict[str, str] = {"comparisons": "comparisons", "rankings": "rankings", "demonstrations": "demonstrations", "likert": "rankings"}
UNITS = {"comparisons": "judged pairs", "rankings": "rankings", "demonstrations": "edited answers", "likert": "rated sets"}
NOT_BLIND = "an answer names a candidate or a model, so that the vote was not blind"
NAMES_ONE = "the edited answer names a candidate or a model"
GOLD = "an item that measures voters"

# Said of oneself, these betray who answers; elsewhere they may be what the prompt is about. Those that are words too count as written.
_NAMES = (
    "ChatGPT|GPT|OpenAI|Anthropic|DeepMind|PaLM|LaMDA|Gemma|Vicuna|Mistral|Mixtral|Qwen|Alibaba|DeepSeek|Microsoft|OLMo|SmolLM|"
    "Hugging ?Face|ChatGLM|Zhipu|Moonshot|Baichuan|InternLM|StableLM|Databricks|Open ?Assistant|LAION|EleutherAI"
)
_WORDS = "Claude|Gemini|Bard|Google|Llama|LLaMA|Alpaca|Koala|Meta|Phi|Copilot|Bing|Falcon|Cohere|Grok|Yi|Kimi|Dolly|Pythia"
_OF_ITSELF = r"\b(?i:I am|I'm|my name is|call me|(?:trained|developed|created|made|built|designed) by|(?:model|assistant) (?:by|from))\b"
_SELF_NAMING = re.compile(rf"{_OF_ITSELF}[^.!?\n]{{0,60}}\b(?:(?i:{_NAMES})|{_WORDS})(?![A-Za-z])")


@dataclass
class Exported:
    """Records, and what became of the votes: `used` + the sum of `left_out` = `units`, whatever is exported."""

    to: str
    records: list[dict] = field(default_factory=list)
    votes: int = 0
    voters: int = 0
    units: int = 0
    """Judged pairs, rankings, edited answers or rated sets in the votes."""
    used: int = 0
    left_out: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        what = f"{len(self.records):,} {self.to}" if self.to != "likert" else f"{len(self.records):,} rankings with Likert scores"
        lines = [f"{what} from {self.units:,} {UNITS[self.to]} in {self.votes:,} votes of {self.voters:,} voters"]
        lines += [f"left out: {count:,}: {reason}" for reason, count in self.left_out.most_common()]
        return "\n".join(lines)


@dataclass
class Imported:
    new: int = 0
    known: int = 0
    """Votes that were there already."""
    conflicting: int = 0
    """Other votes of the same voter on the same answers: the first ones stay."""

    def __str__(self) -> str:
        more = {"there already": self.known, "left out, since the same voter has voted otherwise": self.conflicting}
        return "; ".join([f"{self.new:,} votes imported", *(f"{count:,} {what}" for what, count in more.items() if count)])


def screen(votes: Sequence[Vote]) -> tuple[list[Vote], Counter]:
    """The votes that count: blind ones, on items that do not measure voters; and of the others how many for which reason."""
    names_one = detector(votes)
    why = [GOLD if vote.gold else NOT_BLIND if names_one(vote, (answer.text for answer in vote.answers)) else None for vote in votes]
    kept = [vote for vote, reason in zip(votes, why, strict=True) if reason is None]
    return kept, Counter(reason for reason in why if reason)


def detector(votes: Iterable[Vote]) -> Callable[[Vote, Iterable[str]], bool]:
    """A function that tells whether texts about a vote's prompt name who wrote them.

    That is one of these votes' candidates or bases, unless the prompt names it too, or a known model that they say they are.
    """
    candidates = {answer.candidate for vote in votes for answer in vote.answers}
    own = {name for candidate in candidates for name in (candidate.name, *_base_names(candidate.base))} - {"base", "imported", ""}
    ours = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(own, key=len, reverse=True)))})(?!\w)", re.IGNORECASE) if own else None

    def names_one(vote: Vote, texts: Iterable[str]) -> bool:
        asked = " ".join(turn["content"] for turn in vote.prompt).casefold()
        for text in texts:
            named = [match.group().casefold() for match in ours.finditer(text)] if ours else []
            if _SELF_NAMING.search(text) or any(name not in asked for name in named):
                return True
        return False

    return names_one


def _base_names(base: str) -> set[str]:
    """Of a path or Hub id "SmolLM2-135M-Instruct" and "SmolLM2"; but no words like others, such as the "tiny" of tiny-llama."""
    whole = Path(base).name
    first = re.split(r"[-_. ]", whole)[0]
    return {name for name in (whole, first) if len(name) > 3 and re.search(r"\d|.[A-Z]|.[-_].", name)}


def export(votes: Sequence[Vote], to: To, *, counting: Counting = "consensus", identified: bool = False) -> Exported:
    """The votes as comparisons, rankings (also those from Likert scores) or demonstrations.

    counting: "consensus" is one record for each pair or set, what most voters say (rankings: by mean rank; Likert: by mean score),
    with the shares as soft label; "all" is one for each vote, so that disagreement stands there as repeated and opposite pairs.
    identified: with names, groups and comments; otherwise voters are pseudonyms, and dates have no time.
    """
    if to not in KINDS:
        raise InstructLiteError(f"--to {to}: choose {', '.join(KINDS)}")
    if counting not in get_args(Counting):
        raise InstructLiteError(f"--votes {counting}: choose {' or '.join(get_args(Counting))}")
    result = Exported(to, votes=len(votes), voters=len({vote.voter for vote in votes}))
    parts = {"comparisons": _pairs, "rankings": _rankings, "demonstrations": _edits, "likert": _rated}[to]
    names_one = detector(votes)
    # An edited answer need not be blind; but nobody should learn from it to be somebody else.
    naming = NAMES_ONE if to == "demonstrations" else NOT_BLIND
    groups: dict[tuple, list[_Unit]] = defaultdict(list)
    for number, vote in enumerate(votes):
        for key, answers in parts(vote):
            result.units += 1
            texts = [answers[0].edited] if to == "demonstrations" else [answer.text for answer in vote.answers]
            reason = GOLD if vote.gold else naming if names_one(vote, texts) else None
            if reason:
                result.left_out[reason] += 1
            else:
                groups[key if counting == "consensus" and to != "demonstrations" else (*key, number)].append(_Unit(vote, answers))
    record_of = {"comparisons": _comparison, "rankings": _ranking, "demonstrations": _demonstration, "likert": _likert}[to]
    for units in groups.values():
        try:
            record = record_of(units)
            record |= _about([unit.vote for unit in units], identified)
            result.records += read_records([record], KINDS[to])
            result.used += len(units)
        except _LeftOut as reason:
            result.left_out[str(reason)] += len(units)
        except BadRecords as bad:
            result.left_out[re.sub(r"^rows(:\d+)?: | \([^()]*\)$", "", bad.problems[0])] += len(units)
    return result


@dataclass(frozen=True)
class _Unit:
    vote: Vote
    answers: tuple[Judged, ...]


class _LeftOut(Exception):
    """Why a pair or set gives no record."""


Parts = Iterator[tuple[tuple, tuple[Judged, ...]]]


def _pairs(vote: Vote) -> Parts:
    for a, b in combinations(range(len(vote.answers)), 2):
        if outcome(vote.answers[a], vote.answers[b]) is not None:
            yield (vote.item, a, b), (vote.answers[a], vote.answers[b])


def _rankings(vote: Vote) -> Parts:
    yield (vote.item,), vote.answers


def _edits(vote: Vote) -> Parts:
    for number, answer in enumerate(vote.answers):
        if answer.edited is not None:
            yield (vote.item, number), (answer,)


def _rated(vote: Vote) -> Parts:
    if any(answer.likert is not None for answer in vote.answers):
        yield (vote.item,), vote.answers


def _comparison(units: list[_Unit]) -> dict:
    """The side that most voters prefer. `soft_label`: the chance that `chosen` is better, a tie counting half."""
    sides = Counter(int(2 * outcome(*unit.answers) - 1) for unit in units)
    bad = sum(unit.vote.all_bad for unit in units)
    (side, most), *others = sides.most_common()
    if others and others[0][1] == most:
        raise _LeftOut("voters disagree, and none of the answers has a majority")
    if side == 0:
        raise _LeftOut("all bad" if 2 * bad > len(units) else "a tie")
    chosen, rejected = units[0].answers[:: 1 if side > 0 else -1]
    counts = {"chosen": sides[side], "rejected": sides[-side], "tie": sides[0]}
    return {
        "prompt": units[0].vote.prompt, "chosen": chosen.text, "rejected": rejected.text, "votes": counts,
        "soft_label": (sides[side] + sides[0] / 2) / len(units),
        "candidates": {"chosen": chosen.candidate.name, "rejected": rejected.candidate.name},
    }  # fmt: skip


def _ranking(units: list[_Unit]) -> dict:
    """Answers by their mean rank; those that tie within a vote share the mean of their ranks."""
    ranks = [_mid_ranks([answer.rank for answer in unit.answers]) for unit in units]
    return _set(units, [fmean(column) for column in zip(*ranks, strict=True)])


def _likert(units: list[_Unit]) -> dict:
    """Answers by their mean score. Those that somebody has not scored are left to those that have."""
    columns = zip(*(unit.answers for unit in units), strict=True)
    given = [[answer.likert for answer in column if answer.likert is not None] for column in columns]
    rated = [number for number, scores in enumerate(given) if scores]
    if len(rated) < 2:
        raise _LeftOut("fewer than 2 answers have a Likert score")
    means = [fmean(given[number]) for number in rated]
    units = [_Unit(unit.vote, tuple(unit.answers[number] for number in rated)) for unit in units]
    best_first = sorted(set(means), reverse=True)
    return _set(units, [best_first.index(mean) for mean in means]) | {"scores": means}


def _set(units: list[_Unit], ranks: Sequence[float]) -> dict:
    answers = units[0].answers
    flags = [sorted({flag for unit in units for flag in unit.answers[number].flags or ()}) for number in range(len(answers))]
    return {
        "prompt": units[0].vote.prompt,
        "responses": [answer.text for answer in answers],
        "ranks": list(ranks),
        "candidates": [answer.candidate.name for answer in answers],
        **({"flags": flags} if any(flags) else {}),
    }


def _demonstration(units: list[_Unit]) -> dict:
    answer = units[0].answers[0]
    if answer.edited == answer.text:
        raise _LeftOut("the answer was not changed")
    return {"prompt": units[0].vote.prompt, "completion": answer.edited, "edited_from": answer.text, "candidate": answer.candidate.name}


def _mid_ranks(given: Sequence[int | None]) -> list[float]:
    """Ranks from 0 with ties (and all that have none) at the mean of their places, so that every voter gives away the same sum."""
    ranks = [len(given) if rank is None else rank for rank in given]
    return [sum(other < rank for other in ranks) + (sum(other == rank for other in ranks) - 1) / 2 for rank in ranks]


def _about(votes: list[Vote], identified: bool) -> dict[str, Any]:
    """Who and when: `annotator` and `created` of one vote, `annotators` of several."""
    voters = [vote.name or vote.voter if identified else vote.voter for vote in votes]
    first = votes[0]
    about: dict[str, Any] = {"item": first.item} | ({"category": first.use_case} if first.use_case else {})
    if len(votes) > 1:
        return about | {"annotators": voters, "created": max(vote.created for vote in votes)[: None if identified else 10]}
    about |= {"annotator": voters[0], "created": first.created[: None if identified else 10]}
    private = {"group": first.group, "comment": first.comment} if identified else {}
    return about | {key: value for key, value in private.items() if value}


def import_votes(store: Store, path: str | Path) -> Imported:
    """Comparisons and rankings of a JSONL file as votes, all or none; the same file again changes nothing.

    `annotator` tells voters apart (rows without one are of one voter named after the file), `candidates` who answered, `category` the
    use case, `created` when; as `export` writes them. Raises BadRecords with all faults.
    """
    records = read_records(str(path))
    if any("responses" not in row and "chosen" not in row for row in records):
        raise InstructLiteError(f"{path}: holds no votes (comparisons or rankings are wanted)")
    result = Imported()
    with store.writing():
        for row in records:
            texts, ranks, names = _judged(row)
            answers = [Answer(Candidate(name), text) for text, name in zip(texts, names, strict=True)]
            category = row.get("category")
            item = store.add_item(row["prompt"], answers, use_case=category if isinstance(category, str) else None)
            annotator, group = row.get("annotator"), row.get("group")
            voter = store.voter(name=str(annotator or Path(path).name)[:MAX_NAME], group=group if isinstance(group, str) else None)
            try:
                new = store.record(item, voter.key, Ballot(ranks), _moment(row.get("created")))
            except AlreadyVoted:
                result.conflicting += 1
            else:
                result.new, result.known = result.new + new, result.known + (not new)
    return result


def _judged(row: dict) -> tuple[list[str], tuple[int, ...], list[str]]:
    """Texts, ranks and candidates' names of a comparison or ranking, each different answer once."""
    names = row.get("candidates")
    if "chosen" in row:
        texts, ranks = [row["chosen"], row["rejected"]], [0, 1]
        names = [names.get(side) for side in ("chosen", "rejected")] if isinstance(names, dict) else None
    else:
        texts, ranks = row["responses"], row["ranks"]
    if not isinstance(names, list) or len(names) != len(texts) or not all(isinstance(name, str) for name in names):
        names = ["imported"] * len(texts)
    first = list({(name, text): number for number, (name, text) in reversed(list(enumerate(zip(names, texts, strict=True))))}.values())
    order = sorted(set(ranks))
    return [texts[n] for n in sorted(first)], tuple(order.index(ranks[n]) for n in sorted(first)), [names[n] for n in sorted(first)]


def _moment(created: object) -> str | None:
    try:
        return datetime.fromisoformat(created).isoformat() if isinstance(created, str) else None
    except ValueError:
        return None
