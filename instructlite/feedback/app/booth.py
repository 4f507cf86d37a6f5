"""What the arena does, without the page: what is shown next, answers written for a vote, the vote itself, and names after it.

Who wrote which answer stays between engine and store; a page gets a `Showing`, and after the vote a `Reveal`.
"""

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...data.preparing.mixture import category
from ...data.preparing.steps import Sample
from ...data.records import read_records
from ...errors import InstructLiteError
from ...models.engine import Engine
from ...models.sampling import Sampling
from ...models.streaming import Stream
from ..ballots import Answer, Ballot, Candidate, Showing
from ..queue import choose
from ..store import Store

LIVE_ANSWERS = (2, 4)  # fewest and most that are written while somebody waits


@dataclass(frozen=True)
class Battle:
    """Answers that are being written. `order[place]` is the number, in the stream, of the answer shown at that place."""

    showing: Showing
    stream: Stream
    answers: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Reveal:
    """Who wrote the answer at one place, and what reward models give it."""

    candidate: Candidate
    scores: Mapping[str, float]


class Booth:
    """prompts: conversations to ask when nothing waits for votes. sampling: how the answers to them are drawn."""

    def __init__(self, engine: Engine, store: Store, prompts: Sequence[dict] = (), sampling: Sampling | None = None):
        self.engine, self.store = engine, store
        self.sampling = sampling or Sampling(min(256, engine.limits.new_tokens), temperature=0.7)
        self.prompts = list(prompts)
        self._asked: dict[str, set[int]] = {}

    # --- what is shown ------------------------------------------------------------------------------------------------------

    def open(self, voter: str) -> Showing | None:
        """What this voter has before him: also after the page was loaded again."""
        return self.store.current(voter)

    def next(self, voter: str, skipped: frozenset[str] = frozenset()) -> Showing | None:
        """The finished item whose vote tells most, if there is one; skipped: tickets of those he did not want."""
        waiting = self.store.waiting(voter)
        while (item := choose(waiting, voter)) is not None:
            showing = self.store.show(item, voter)
            if showing.ticket not in skipped:
                return showing
            waiting = [row for row in waiting if row.item != item]
        return None

    def prompt(self, voter: str) -> dict | None:
        """One of the run's prompts that this voter has not been given yet, by chance."""
        given = self._asked.setdefault(voter, set())
        if len(self._asked) > 10_000:
            self._asked = {voter: given}
        left = [number for number in range(len(self.prompts)) if number not in given]
        if not left:
            return None
        given.add(number := random.choice(left))
        return self.prompts[number]

    # --- answers for a vote -------------------------------------------------------------------------------------------------

    def ask(self, voter: str, prompt: Sequence[Mapping[str, str]], count: int, use_case: str | None = None) -> Battle:
        """Have `count` answers written, by different panes as far as there are so many; nobody can vote before `finish`."""
        panes = self._drawn(count)
        seeds = [secrets.randbelow(2**31) for _ in panes]
        stream = self.engine.submit(list(prompt), [pane.name for pane in panes], self.sampling, seed=seeds)
        decoding = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": self.sampling.top_k,
                    "max_new_tokens": self.sampling.max_new_tokens}  # fmt: skip
        written = [
            Answer(Candidate(pane.name, pane.base, pane.sha256 or ""), None, decoding, seed)
            for pane, seed in zip(panes, seeds, strict=True)
        ]
        try:
            with self.store.writing():
                sample = Sample({"prompt": list(prompt)} | ({"category": use_case} if use_case else {}), "prompts", "arena", 0)
                item = self.store.add_item(prompt, written, use_case=category(sample)[0])
                showing = self.store.show(item.id, voter)
                places = self.store.places(showing.ticket)
        except InstructLiteError:
            stream.cancel()
            raise
        return Battle(showing, stream, item.answers, tuple(item.answers.index(answer) for answer in places))

    def finish(self, battle: Battle, texts: Sequence[str]) -> None:
        """texts: in the order of the stream. From now on the item can be voted on."""
        with self.store.writing():
            for answer, text in zip(battle.answers, texts, strict=True):
                self.store.finish(answer, text)

    def _drawn(self, count: int) -> list:
        fewest, most = LIVE_ANSWERS
        if not fewest <= count <= most:
            raise InstructLiteError(f"{count} answers, expected {fewest} to {most}")
        rounds = (pane for _ in range(most) for pane in random.sample(self.engine.panes, len(self.engine.panes)))
        return list(islice(rounds, count))

    # --- the vote -----------------------------------------------------------------------------------------------------------

    def vote(self, voter: str, ticket: str, ballot: Ballot, group: str = "") -> bool:
        """True: saved just now; False: it was there already. Returned means that it is on the disk."""
        new = self.store.vote(ticket, voter, ballot)
        if group.strip():
            self.store.voter(voter, group=group)
        return new

    def reveal(self, voter: str, ticket: str) -> list[Reveal]:
        return [Reveal(candidate, scores) for candidate, scores in self.store.reveal(ticket, voter)]

    def score(self, voter: str, showing: Showing) -> None:
        """Have the reward models score what was voted on, for the reveal and the insight page. Only after the vote."""
        known = self.reveal(voter, showing.ticket)
        if not self.engine.rewards or all(set(self.engine.rewards) <= set(one.scores) for one in known):
            return
        given = self.engine.score(showing.prompt, [text or "" for text in showing.answers])
        for judge, scores in given.items():
            self.store.add_scores(judge, dict(zip(self.store.places(showing.ticket), scores, strict=True)))


def ballot_of(choice: int | str, showing: Showing, said: Mapping[str, Sequence[Any]], comment: str) -> Ballot:
    """choice: the place of the best answer, "tie", "bad", or "ranks" (by the ranks, or else by the Likert scores, that were given).

    said: ranks, likert, flags and edits for each place, as a page has them: what was left as it was is no statement.
    """
    count = len(showing.answers)
    likert = tuple(said["likert"][:count])
    flags = tuple(tuple(given or ()) for given in said["flags"][:count])
    edits = tuple(_changed(edit, text) for edit, text in zip(said["edits"], showing.answers, strict=False))
    rest: dict[str, Any] = {
        "likert": likert if any(score is not None for score in likert) else None,
        "flags": flags if any(flags) else None,
        "edits": edits if any(edits) else None,
        "comment": comment.strip() or None,
    }
    if choice == "tie":
        return Ballot.tie(count, **rest)
    if choice == "bad":
        return Ballot.both_bad(count, **rest)
    if choice == "ranks":
        ranks = tuple(said["ranks"][:count])
        if None in ranks and any(rank is not None for rank in ranks):
            raise InstructLiteError("give every answer a rank (equal ones tie), or none and a score for each")
        return Ballot(None if None in ranks else ranks, **rest)
    if not isinstance(choice, int):
        raise InstructLiteError("no such vote")
    return Ballot.better(choice, count, **rest)


def _changed(edit: object, text: str | None) -> str | None:
    if not isinstance(edit, str) or not edit.strip() or edit.strip() == (text or "").strip():
        return None
    return edit.strip()


def read_prompts(source: object) -> list[dict]:
    """Prompts to ask, from a file that training reads too; their answers, if they have some, are not shown."""
    return [{key: row[key] for key in ("prompt", "category") if key in row} for row in read_records(source) if row.get("prompt")]
