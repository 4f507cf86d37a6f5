"""What was asked and what people said, in one SQLite file: prompts, answers, items (pairs and K-sets), showings, votes, voters.

A voter sees a `Showing`: texts in an order of his own, and a ticket. Who wrote which answer is told by `reveal`, once his vote is on
the disk. `vote` returns only then: what was acknowledged survives kill -9. What is in the file is read as `Vote` rows, by export and
insight, or as `Waiting` rows, by the queue.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import secrets
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import groupby, permutations
from pathlib import Path

from ..data.records import read_records
from ..errors import InstructLiteError
from .ballots import MAX_ANSWERS, AlreadyVoted, Answer, Ballot, Candidate, Judged, Showing, Vote, Voter
from .database import Database
from .queue import Waiting

IMBALANCE = 3
PENDING_MINUTES = 10
MAX_NAME = 80


@dataclass(frozen=True)
class Item:
    """What `add_item` made; `answers` are the ids, in the order in which the answers were given. For the server only."""

    id: int
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Unscored:
    """An answer that a reward model has not scored."""

    answer: int
    prompt: list[dict]
    text: str


class Store(Database):
    """The votes of one run. Several processes may have it open; in each, one Store serves all threads.

    path: the file, or a run directory. votes_per_minute: more of one voter are refused (None: any number).
    """

    def __init__(self, path: str | Path, *, create: bool = True, votes_per_minute: int | None = 60, rng: random.Random | None = None):
        super().__init__(path, create=create)
        self.votes_per_minute = votes_per_minute
        self._rng = rng or random.SystemRandom()  # a voter must not be able to guess an order

    # --- what is asked ------------------------------------------------------------------------------------------------------

    def add_item(
        self, prompt: Sequence[Mapping], answers: Sequence[Answer], *, use_case: str | None = None, gold: Sequence[int] | None = None
    ) -> Item:
        """Answers to one prompt, to be compared. The same finished answers again are the same item.

        prompt: messages that end with the user. gold: the right ranks, where they are known: voters are measured by them.
        """
        if not 2 <= len(answers) <= MAX_ANSWERS:
            raise InstructLiteError(f"{len(answers)} answers to compare, expected 2 to {MAX_ANSWERS}")
        if gold is not None and (len(gold) != len(answers) or len(set(gold)) < 2):
            raise InstructLiteError(f"gold ranks {list(gold)} do not order the {len(answers)} answers")
        with self.writing() as db:
            prompt_id = self._prompt(db, prompt, use_case)
            found = [self._answer(db, prompt_id, answer) for answer in answers]
            ids = [answer_id for answer_id, _ in found]
            if len(set(ids)) < len(ids):
                raise InstructLiteError("two of the answers to compare are the same one")
            key = ",".join(map(str, sorted(ids)))
            known = db.execute("SELECT id FROM items WHERE answers = ?", (key,)).fetchone()
            if known:
                if gold is not None:
                    rows = zip(gold, known * len(ids), ids, strict=True)
                    db.executemany("UPDATE item_answers SET gold = ? WHERE item_id = ? AND answer_id = ?", rows)
                return Item(known[0], tuple(ids))
            candidates = ",".join(map(str, sorted(candidate for _, candidate in found)))
            item = db.execute(
                "INSERT INTO items (prompt_id, answers, candidates, created) VALUES (?, ?, ?, ?)", (prompt_id, key, candidates, _now())
            ).lastrowid
            rows = zip([item] * len(ids), ids, gold or [None] * len(ids), strict=True)
            db.executemany("INSERT INTO item_answers (item_id, answer_id, gold) VALUES (?, ?, ?)", rows)
            return Item(item, tuple(ids))

    def finish(self, answer: int, text: str) -> None:
        """The text of an answer that was being written. An item can be voted on when all of its answers are finished."""
        with self.writing() as db:
            if not db.execute("UPDATE answers SET text = ? WHERE id = ? AND text IS NULL", (_whole(text), answer)).rowcount:
                raise InstructLiteError(f"answer {answer} is not one that is being written")

    def add_scores(self, judge: str, scores: Mapping[int, float]) -> None:
        """What a reward model gives answers (by their ids). An ensemble's members are judges of their own."""
        if bad := next((answer for answer, score in scores.items() if not math.isfinite(score)), None):
            raise InstructLiteError(f"the score of {judge} for answer {bad} is not finite")
        with self.writing() as db:
            rows = [(answer, judge, float(score)) for answer, score in scores.items()]
            db.executemany("INSERT OR REPLACE INTO scores (answer_id, judge, score) VALUES (?, ?, ?)", rows)

    def unscored(self, judge: str) -> list[Unscored]:
        """The finished answers that have no score of this reward model yet."""
        with self.reading() as db:
            rows = db.execute(
                """SELECT answers.id, messages, text FROM answers JOIN prompts ON prompts.id = prompt_id WHERE text IS NOT NULL
                   AND NOT EXISTS (SELECT 1 FROM scores WHERE answer_id = answers.id AND judge = ?) ORDER BY answers.id""",
                (judge,),
            ).fetchall()
        return [Unscored(answer, json.loads(messages), text) for answer, messages, text in rows]

    # --- voters -------------------------------------------------------------------------------------------------------------

    def voter(self, key: str | None = None, *, name: str | None = None, group: str | None = None) -> Voter:
        """The voter of a key that was given out before; else of that name; else a new one.

        name: of somebody who has logged in; not what anybody typed, since it gives out the key. Nobody has to give a name or a group.
        """
        name, group = _short(name, "name"), _short(group, "group")
        key = key if _is_token(key) else None
        with self.writing() as db:
            known = 'SELECT key, name, "group" FROM voters WHERE key = ? OR name = ? ORDER BY key = ? DESC'
            found = db.execute(known, (key, name, key)).fetchone()
            if found is None:
                found = (secrets.token_urlsafe(16), name, group)
                db.execute('INSERT INTO voters (key, name, "group", created) VALUES (?, ?, ?, ?)', (*found, _now()))
            elif group and group != found[2]:
                db.execute('UPDATE voters SET "group" = ? WHERE key = ?', (group, found[0]))
                found = (found[0], found[1], group)
        return Voter(*found)

    # --- what a voter sees and says -----------------------------------------------------------------------------------------

    def show(self, item: int, voter: str) -> Showing:
        """An item in this voter's order, which is drawn the first time and stays. See `balanced_order`."""
        with self.writing() as db:
            voter_id = _voter_id(db, voter)
            row = db.execute("SELECT id FROM showings WHERE item_id = ? AND voter_id = ?", (item, voter_id)).fetchone()
            return _showing(db, row[0] if row else self._new_showing(db, item, voter_id))

    def current(self, voter: str) -> Showing | None:
        """What this voter was shown last and has not voted on: a page that is loaded again shows it again.

        Not what was never finished: the process that was writing the answers is gone.
        """
        _check_tokens(voter)
        with self.reading() as db:
            row = db.execute(
                """SELECT showings.id FROM showings JOIN voters ON voters.id = showings.voter_id WHERE key = ? AND NOT EXISTS
                   (SELECT 1 FROM votes WHERE votes.item_id = showings.item_id AND votes.voter_id = showings.voter_id) AND NOT EXISTS
                   (SELECT 1 FROM places JOIN answers ON answers.id = answer_id WHERE showing_id = showings.id AND text IS NULL)
                   ORDER BY showings.id DESC""",
                (voter,),
            ).fetchone()
            return _showing(db, row[0]) if row else None

    def vote(self, ticket: str, voter: str, ballot: Ballot) -> bool:
        """Save a vote. Returned means: on the disk. True: new; False: the very same vote was there already (a second click).

        Raises InstructLiteError for another vote on the same item, an unknown ticket or one of somebody else, answers that are not
        finished, and more votes a minute than are taken.
        """
        with self.writing() as db:
            _check_tokens(ticket, voter)
            row = db.execute(
                "SELECT s.id, s.item_id, s.voter_id, key FROM showings s JOIN voters ON voters.id = s.voter_id WHERE ticket = ?", (ticket,)
            ).fetchone()
            if row is None:
                raise InstructLiteError("this ticket is not known (load the page again)")
            showing, item, voter_id, owner = row
            if not secrets.compare_digest(owner.encode(), voter.encode()):
                raise InstructLiteError("this ticket is another voter's (load the page again)")
            places = [answer for (answer,) in db.execute("SELECT answer_id FROM places WHERE showing_id = ? ORDER BY place", (showing,))]
            return self._save(db, item, voter_id, places, ballot, showing)

    def reveal(self, ticket: str, voter: str) -> list[tuple[Candidate, dict[str, float]]]:
        """Who wrote the answers, and what reward models gave them, in the order shown. Only after the vote: InstructLiteError before."""
        with self.reading() as db:
            _check_tokens(ticket, voter)
            rows = db.execute(
                """SELECT candidates.name, base, adapter, answers.id FROM showings s JOIN voters ON voters.id = s.voter_id
                   JOIN votes ON votes.item_id = s.item_id AND votes.voter_id = s.voter_id JOIN places ON places.showing_id = s.id
                   JOIN answers ON answers.id = places.answer_id JOIN candidates ON candidates.id = candidate_id
                   WHERE ticket = ? AND key = ? ORDER BY place""",
                (ticket, voter),
            ).fetchall()
            if not rows:
                raise InstructLiteError("names are shown after the vote (vote first)")
            return [(Candidate(*candidate), _scores(db, answer)) for *candidate, answer in rows]

    def places(self, ticket: str) -> list[int]:
        """Ids of a showing's answers in the order shown, so that the server knows which text to write where. Never for a voter."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT answer_id FROM places JOIN showings ON showings.id = showing_id WHERE ticket = ? ORDER BY place", (ticket,)
            )
            return [answer for (answer,) in rows]

    def record(self, item: Item, voter: str, ballot: Ballot, created: str | None = None) -> bool:
        """A vote that was cast elsewhere, on the answers in the order of `item.answers`. As `vote`, but for the votes a minute."""
        with self.writing() as db:
            return self._save(db, item.id, _voter_id(db, voter), list(item.answers), ballot, None, created)

    # --- what is read -------------------------------------------------------------------------------------------------------

    def votes(self) -> list[Vote]:
        """Every vote there is at one moment, in the order of their numbers."""
        with self.reading() as db:
            scores: dict[int, dict[str, float]] = {}
            for answer, judge, score in db.execute("SELECT answer_id, judge, score FROM scores ORDER BY judge"):
                scores.setdefault(answer, {})[judge] = score
            rows = db.execute(_VOTES).fetchall()
        return [_vote(list(group), scores) for _, group in groupby(rows, key=lambda row: row[0])]

    def cast(self, voter: str) -> int:
        """How many votes of this voter are on the disk."""
        _check_tokens(voter)
        with self.reading() as db:
            return db.execute("SELECT COUNT(*) FROM votes JOIN voters ON voters.id = voter_id WHERE key = ?", (voter,)).fetchone()[0]

    def waiting(self, voter: str) -> list[Waiting]:
        """The finished items that this voter has not voted on, for `queue.choose`. For the server only."""
        recent = (datetime.now(timezone.utc) - timedelta(minutes=PENDING_MINUTES)).isoformat(timespec="milliseconds")
        with self.reading() as db:
            rows = db.execute(_WAITING, {"voter": voter, "recent": recent}).fetchall()
            scores = db.execute(
                """SELECT item_id, judge, score FROM item_answers JOIN scores USING (answer_id) ORDER BY item_id, judge, answer_id"""
            ).fetchall()
        by_item: dict[int, list[tuple[float, ...]]] = {}
        for (item, _), group in groupby(scores, key=lambda row: row[:2]):
            by_item.setdefault(item, []).append(tuple(score for *_, score in group))
        return [
            Waiting(item, cast + pending, bool(gold), tuple(by for by in by_item.get(item, ()) if len(by) == answers))
            for item, answers, gold, cast, pending in rows
        ]

    # --- one statement each -------------------------------------------------------------------------------------------------

    def _prompt(self, db: sqlite3.Connection, prompt: Sequence[Mapping], use_case: str | None) -> int:
        turns = read_records([{"prompt": list(prompt)}], "prompts")[0]["prompt"]
        messages = json.dumps(turns, ensure_ascii=False)
        row = db.execute("SELECT id FROM prompts WHERE messages = ?", (messages,)).fetchone()
        if row is None:
            values = (messages, use_case, _now())
            return db.execute("INSERT INTO prompts (messages, use_case, created) VALUES (?, ?, ?)", values).lastrowid
        if use_case:
            db.execute("UPDATE prompts SET use_case = ? WHERE id = ?", (use_case, row[0]))
        return row[0]

    def _answer(self, db: sqlite3.Connection, prompt: int, answer: Answer) -> tuple[int, int]:
        """Ids of the answer and of its candidate. Unfinished answers are never taken for one another."""
        who = (answer.candidate.name, answer.candidate.base, answer.candidate.adapter)
        db.execute("INSERT OR IGNORE INTO candidates (name, base, adapter) VALUES (?, ?, ?)", who)
        candidate = db.execute("SELECT id FROM candidates WHERE (name, base, adapter) = (?, ?, ?)", who).fetchone()[0]
        decoding = json.dumps(dict(answer.decoding), sort_keys=True)
        values = (prompt, candidate, None if answer.text is None else _whole(answer.text), decoding, answer.seed)
        # NULL = NULL is not true, so that a text of None finds nothing
        same = "prompt_id = ? AND candidate_id = ? AND text = ? AND decoding = ? AND seed IS ?"
        row = db.execute(f"SELECT id FROM answers WHERE {same}", values).fetchone()
        if row:
            return row[0], candidate
        insert = "INSERT INTO answers (prompt_id, candidate_id, text, decoding, seed, created) VALUES (?, ?, ?, ?, ?, ?)"
        return db.execute(insert, (*values, _now())).lastrowid, candidate

    def _new_showing(self, db: sqlite3.Connection, item: int, voter: int) -> int:
        answers = db.execute(
            "SELECT answers.id, candidate_id FROM item_answers JOIN answers ON answers.id = answer_id WHERE item_id = ?", (item,)
        ).fetchall()
        if not answers:
            raise InstructLiteError(f"there is no item {item}")
        candidates = db.execute("SELECT candidates FROM items WHERE id = ?", (item,)).fetchone()[0]
        earlier = db.execute(
            "SELECT answer_id, place, COUNT(*) FROM showings JOIN places ON showings.id = showing_id WHERE item_id = ? GROUP BY 1, 2",
            (item,),
        )
        in_item = Counter({(answer, place): times for answer, place, times in earlier})
        before = db.execute("SELECT candidate_id, place, times FROM shown WHERE candidates = ?", (candidates,))
        by_candidate = Counter({(candidate, place): times for candidate, place, times in before})
        order = balanced_order(answers, in_item, by_candidate, self._rng)
        showing = db.execute(
            "INSERT INTO showings (ticket, item_id, voter_id, created) VALUES (?, ?, ?, ?)",
            (secrets.token_urlsafe(16), item, voter, _now()),
        ).lastrowid
        db.executemany("INSERT INTO places VALUES (?, ?, ?)", [(showing, place, answer) for place, (answer, _) in enumerate(order)])
        db.executemany(
            "INSERT INTO shown VALUES (?, ?, ?, 1) ON CONFLICT (candidates, candidate_id, place) DO UPDATE SET times = times + 1",
            [(candidates, candidate, place) for place, (_, candidate) in enumerate(order)],
        )
        return showing

    def _save(
        self,
        db: sqlite3.Connection,
        item: int,
        voter: int,
        answers: list[int],
        ballot: Ballot,
        showing: int | None,
        created: str | None = None,
    ) -> bool:
        unfinished = "SELECT 1 FROM item_answers JOIN answers ON answers.id = answer_id WHERE item_id = ? AND text IS NULL"
        if db.execute(unfinished, (item,)).fetchone():
            raise InstructLiteError("the answers are not finished (vote when they are)")
        said = {
            answer: (row["rank"], row["likert"], None if row["flags"] is None else json.dumps(row["flags"]), row["edited"])
            for answer, row in zip(answers, ballot.judgements(len(answers)), strict=True)
        }
        whole = (int(ballot.all_bad), ballot.comment)
        before = db.execute("SELECT id, all_bad, comment FROM votes WHERE item_id = ? AND voter_id = ?", (item, voter)).fetchone()
        if before:
            rows = db.execute("SELECT answer_id, rank, likert, flags, edited FROM judgements WHERE vote_id = ?", before[:1])
            if before[1:] == whole and {answer: tuple(row) for answer, *row in rows} == said:
                return False
            raise AlreadyVoted("you have already voted on this, and otherwise: the first vote counts")
        if showing is not None:
            self._check_rate(db, voter)
        vote = db.execute(
            "INSERT INTO votes (item_id, voter_id, showing_id, all_bad, comment, created) VALUES (?, ?, ?, ?, ?, ?)",
            (item, voter, showing, *whole, created or _now()),
        ).lastrowid
        db.executemany("INSERT INTO judgements VALUES (?, ?, ?, ?, ?, ?)", [(vote, answer, *row) for answer, row in said.items()])
        return True

    def _check_rate(self, db: sqlite3.Connection, voter: int) -> None:
        if self.votes_per_minute is None:
            return
        since = (datetime.now(timezone.utc) - timedelta(minutes=1)).isoformat(timespec="milliseconds")
        votes = db.execute("SELECT COUNT(*) FROM votes WHERE voter_id = ? AND created > ?", (voter, since)).fetchone()[0]
        if votes >= self.votes_per_minute:
            raise InstructLiteError(f"more than {self.votes_per_minute} votes within a minute (read the answers, and vote again later)")


def balanced_order(
    answers: Sequence[tuple[int, int]], in_item: Counter, by_candidate: Counter, rng: random.Random
) -> list[tuple[int, int]]:
    """(answer, candidate) pairs in a random order, such that no candidate is shown much more often at one place than at another.

    A big stick (Soares & Wu 1983): the order is left to chance until a candidate would be IMBALANCE ahead at one place. Strict
    alternation could be foretold by a voter who has seen names after his votes. Among several voters of one item the orders
    alternate: none of them knows those of the others.

    in_item: times by (answer, place); by_candidate: by (candidate, place), over all items of the same candidates.
    """
    orders = list(permutations(answers)) if len(answers) <= 4 else [tuple(rng.sample(answers, len(answers))) for _ in range(64)]
    rng.shuffle(orders)

    def excess(order: tuple[tuple[int, int], ...]) -> int:
        after = by_candidate + Counter((candidate, place) for place, (_, candidate) in enumerate(order))
        times = [[after[candidate, place] for place in range(len(order))] for candidate in {candidate for _, candidate in order}]
        return sum(max(0, max(places) - min(places) - IMBALANCE) for places in times)

    def repeats(order: tuple[tuple[int, int], ...]) -> int:
        return sum(in_item[answer, place] for place, (answer, _) in enumerate(order))

    return list(min(orders, key=lambda order: (excess(order), repeats(order))))


def pseudonym(key: str) -> str:
    return f"voter-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _is_token(given: object) -> bool:
    """Keys and tickets come from outside, and may be anything."""
    return isinstance(given, str) and given.isascii()


def _check_tokens(*tokens: object) -> None:
    if not all(map(_is_token, tokens)):
        raise InstructLiteError("this ticket is not known (load the page again)")


def _voter_id(db: sqlite3.Connection, key: str) -> int:
    _check_tokens(key)
    row = db.execute("SELECT id FROM voters WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise InstructLiteError("this voter is not known (load the page again)")
    return row[0]


def _showing(db: sqlite3.Connection, showing: int) -> Showing:
    ticket, messages, voted = db.execute(
        """SELECT ticket, messages, EXISTS (SELECT 1 FROM votes WHERE votes.item_id = s.item_id AND votes.voter_id = s.voter_id)
           FROM showings s JOIN items ON items.id = s.item_id JOIN prompts ON prompts.id = prompt_id WHERE s.id = ?""",
        (showing,),
    ).fetchone()
    texts = db.execute("SELECT text FROM places JOIN answers ON answers.id = answer_id WHERE showing_id = ? ORDER BY place", (showing,))
    return Showing(ticket, json.loads(messages), tuple(text for (text,) in texts), bool(voted))


def _scores(db: sqlite3.Connection, answer: int) -> dict[str, float]:
    return dict(db.execute("SELECT judge, score FROM scores WHERE answer_id = ? ORDER BY judge", (answer,)).fetchall())


_VOTES = """
SELECT votes.id, votes.item_id, messages, use_case, voters.key, voters.name, voters."group", votes.created, showings.created, all_bad,
       comment, candidates.name, base, adapter, text, decoding, seed, place, rank, likert, flags, edited, gold, answers.id
FROM votes JOIN voters ON voters.id = votes.voter_id JOIN items ON items.id = votes.item_id JOIN prompts ON prompts.id = items.prompt_id
JOIN judgements ON vote_id = votes.id JOIN answers ON answers.id = judgements.answer_id JOIN candidates ON candidates.id = candidate_id
JOIN item_answers ON item_answers.item_id = items.id AND item_answers.answer_id = answers.id
LEFT JOIN showings ON showings.id = votes.showing_id
LEFT JOIN places ON places.showing_id = showings.id AND places.answer_id = answers.id
ORDER BY votes.id, answers.id"""

_WAITING = """
SELECT items.id, COUNT(*), COUNT(gold), (SELECT COUNT(*) FROM votes WHERE votes.item_id = items.id),
       (SELECT COUNT(*) FROM showings s JOIN voters ON voters.id = s.voter_id WHERE s.item_id = items.id AND s.created > :recent
        AND key <> :voter AND NOT EXISTS (SELECT 1 FROM votes WHERE votes.item_id = s.item_id AND votes.voter_id = s.voter_id))
FROM items JOIN item_answers ON item_answers.item_id = items.id JOIN answers ON answers.id = answer_id
WHERE NOT EXISTS (SELECT 1 FROM votes JOIN voters ON voters.id = votes.voter_id WHERE votes.item_id = items.id AND key = :voter)
GROUP BY items.id HAVING COUNT(text) = COUNT(*) ORDER BY items.id"""


def _vote(rows: list[tuple], scores: Mapping[int, Mapping[str, float]]) -> Vote:
    """One vote from its rows of _VOTES, one for each answer."""
    _, item, messages, use_case, key, name, group, created, shown, all_bad, comment = rows[0][:11]
    answers = [
        Judged(row[23], Candidate(*row[11:14]), row[14], json.loads(row[15]), row[16], scores.get(row[23], {}), row[17], row[18],
               row[19], None if row[20] is None else tuple(json.loads(row[20])), row[21])
        for row in rows
    ]  # fmt: skip
    gold = tuple(row[22] for row in rows)
    seconds = (datetime.fromisoformat(created) - datetime.fromisoformat(shown)).total_seconds() if shown else None
    return Vote(
        item, json.loads(messages), use_case, None if None in gold else gold, pseudonym(key), name, group, created, seconds,
        bool(all_bad), comment, tuple(answers),
    )  # fmt: skip


def _whole(text: str) -> str:
    """Without halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _short(text: str | None, what: str) -> str | None:
    text = " ".join(_whole(text or "").split())
    if len(text) > MAX_NAME:
        raise InstructLiteError(f"the {what} has {len(text):,} characters, at most {MAX_NAME} are taken")
    return text or None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
