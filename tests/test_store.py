"""The votes: nothing acknowledged is lost or counted twice, nothing is told before the vote, nothing of a damaged file is thrown away."""

import inspect
import itertools
import os
import random
import sqlite3
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from instructlite.errors import InstructLiteError
from instructlite.feedback import database, store
from instructlite.feedback.ballots import AlreadyVoted, Answer, Ballot, Candidate
from instructlite.feedback.migrations import MIGRATIONS
from instructlite.feedback.store import IMBALANCE, Store

BASE = Candidate("base", "org/Secret-7B")
SFT = Candidate("sft-run", "org/Secret-7B", "a" * 64)
PPO = Candidate("ppo-run", "org/Secret-7B", "b" * 64)


def asked(number: int = 0) -> list[dict]:
    return [{"role": "user", "content": f"Question {number}?"}]


def pair(number: int = 0, *candidates: Candidate) -> list[Answer]:
    return [Answer(c, f"text {len(c.name) * 7 + ord(c.name[0])} for {number}", {"top_p": 0.9}, 3) for c in candidates or (SFT, PPO)]


@pytest.fixture
def votes(tmp_path):
    opened = Store(tmp_path, votes_per_minute=None, rng=random.Random(0))
    yield opened
    opened.close()


@pytest.fixture
def shown(votes):
    voter = votes.voter()
    return SimpleNamespace(voter=voter.key, showing=votes.show(votes.add_item(asked(), pair()).id, voter.key))


def rows(votes: Store, table: str) -> list[tuple]:
    with votes.reading() as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


# --- several processes ------------------------------------------------------------------------------------------------------


def run_forked(code: str, *arguments: object) -> str:
    """In a fresh process, which may fork: it has no torch and no threads."""
    command = [sys.executable, "-c", inspect.cleandoc(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WRITERS = """
    import os, sys
    from instructlite.feedback.ballots import AlreadyVoted, Ballot
    from instructlite.feedback.store import Store
    path, keys = sys.argv[1], sys.argv[2].split(",")
    children = []
    for number in range(16):
        pid = os.fork()
        if pid == 0:
            store, counts = Store(path, votes_per_minute=None), [0, 0, 0]
            voter = keys[number % 4]
            for item in range(1, 101):
                # every fourth process of a voter prefers the other answer
                texts = store.show(item, voter).answers
                favourite = texts.index((min if number < 12 else max)(texts))
                try:
                    counts[not store.vote(store.show(item, voter).ticket, voter, Ballot.better(favourite))] += 1
                except AlreadyVoted:
                    counts[2] += 1
            os.write(1, (" ".join(map(str, counts)) + "\\n").encode())
            os._exit(0)
        children.append(pid)
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


def test_16_processes_with_100_votes_each_and_duplicates_leave_exact_counts(votes):
    with votes.writing():
        for number in range(100):
            votes.add_item(asked(number), pair(number))
    keys = [votes.voter().key for _ in range(4)]
    counts = [tuple(map(int, line.split())) for line in run_forked(WRITERS, votes.path, ",".join(keys)).splitlines()]
    new, again, otherwise = map(sum, zip(*counts, strict=True))
    assert len(counts) == 16
    assert (new, again + otherwise) == (400, 1200)
    assert otherwise  # those that came second with another choice
    found = votes.votes()
    assert Counter((vote.item, vote.voter) for vote in found) == {(i, store.pseudonym(key)): 1 for i in range(1, 101) for key in keys}
    assert len(rows(votes, "judgements")) == 800
    assert len(rows(votes, "showings")) == 400


KILLED = """
    import os, random, signal, sys
    from instructlite.feedback.ballots import Ballot
    from instructlite.feedback.store import Store
    path, rng, saved = sys.argv[1], random.Random(0), 0
    for life in range(15):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            store = Store(path, votes_per_minute=None)
            voter = store.voter().key
            for item in range(1, 61):
                store.vote(store.show(item, voter).ticket, voter, Ballot.tie(comment=f"{life}-{item}"))
                os.write(into, f"{life}-{item}\\n".encode())
            os._exit(0)
        os.close(into)
        lines, wanted = b"", rng.randrange(1, 40)
        while lines.count(b"\\n") < wanted:
            lines += os.read(out, 64) or sys.exit("the writer has ended")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(out, 4096):
            lines += more
        print(lines.decode(), end="")
"""


def test_every_vote_acknowledged_before_a_kill_9_is_there(votes):
    with votes.writing():
        for number in range(60):
            votes.add_item(asked(number), pair(number))
    votes.close()
    acknowledged = run_forked(KILLED, votes.path).split()
    reopened = Store(votes.path)
    comments = {vote.comment for vote in reopened.votes()}
    assert len(acknowledged) > 100
    assert set(acknowledged) <= comments
    assert len(comments) <= len(acknowledged) + 15  # at most one committed and not yet told of in each life
    with reopened.reading() as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not db.execute("PRAGMA foreign_key_check").fetchall()


def test_a_reader_sees_one_moment_while_others_write(votes, shown):
    other = Store(votes.path)
    with votes.reading() as db:
        before = db.execute("SELECT COUNT(*) FROM votes").fetchone()
        other.vote(shown.showing.ticket, shown.voter, Ballot.tie())
        assert db.execute("SELECT COUNT(*) FROM votes").fetchone() == before == (0,)
    assert len(votes.votes()) == 1


# --- a vote -----------------------------------------------------------------------------------------------------------------


def test_what_was_said_is_what_is_read(votes, shown):
    ballot = Ballot(
        ranks=(5, 2),
        likert=(3, None),
        flags=(["sexual", "hallucination"], None),
        edits=(None, "Better so."),
        comment="x'); DROP TABLE votes;--",
    )
    assert votes.vote(shown.showing.ticket, shown.voter, ballot) is True
    [vote] = votes.votes()
    by_place = sorted(vote.answers, key=lambda answer: answer.place)
    assert [answer.text for answer in by_place] == list(shown.showing.answers)
    assert [(a.rank, a.likert, a.flags, a.edited) for a in by_place] == [
        (1, 3, ("hallucination", "sexual"), None),
        (0, None, None, "Better so."),
    ]
    assert (vote.comment, vote.all_bad, vote.gold, vote.prompt) == (ballot.comment, False, None, asked())
    assert (vote.answers[0].decoding, vote.answers[0].seed) == ({"top_p": 0.9}, 3)
    assert vote.seconds >= 0


def test_the_same_vote_again_is_acknowledged_and_another_one_is_refused(votes, shown):
    ticket, voter = shown.showing.ticket, shown.voter
    assert votes.vote(ticket, voter, Ballot.better(0)) is True
    assert votes.vote(ticket, voter, Ballot((0, 1))) is False
    for other in (Ballot.better(1), Ballot.tie(), Ballot.better(0, comment="so"), Ballot.better(0, likert=(4, 4))):
        with pytest.raises(AlreadyVoted, match="the first vote counts"):
            votes.vote(ticket, voter, other)
    assert [answer.rank for answer in sorted(votes.votes()[0].answers, key=lambda a: a.place)] == [0, 1]


def test_tie_and_both_bad_are_not_the_same(votes):
    found = []
    for ballot in (Ballot.tie(), Ballot.both_bad()):
        voter = votes.voter().key
        votes.vote(votes.show(votes.add_item(asked(), pair()).id, voter).ticket, voter, ballot)
        found = [(vote.all_bad, {answer.rank for answer in vote.answers}) for vote in votes.votes()]
    assert found == [(False, {0}), (True, {0})]


@pytest.mark.parametrize(
    ("ballot", "message"),
    [
        (Ballot((0,)), "do not fit the 2 answers"),
        (Ballot((0, 1, 2)), "do not fit the 2 answers"),
        (Ballot("01"), "do not fit the 2 answers"),
        (Ballot((0, "1")), "expected whole numbers"),
        (Ballot((0, True)), "expected whole numbers"),
        (Ballot((0, [1])), "expected whole numbers"),
        (Ballot((None, None)), "expected whole numbers"),
        (Ballot(), "neither ranks nor a Likert score"),
        (Ballot(likert=(1, None)), "neither ranks nor a Likert score"),
        (Ballot((0, 1), likert=(8, 1)), "a Likert score is 8"),
        (Ballot((0, 1), likert=(0, 1)), "a Likert score is 0"),
        (Ballot((0, 1), likert=(2.5, 1)), "a Likert score is 2.5"),
        (Ballot((0, 1), flags=(["spam"], [])), "unknown flag 'spam'"),
        (Ballot((0, 1), flags=([["x"]], [])), "unknown flag"),
        (Ballot((0, 1), flags=("sexual", [])), "no list"),
        (Ballot((0, 1), all_bad=True), "all answers are bad"),
        (Ballot((0, 1), comment="x" * 4001), "at most 4,000"),
        (Ballot((0, 1), comment={"x": 1}), "is no text"),
        (Ballot((0, 1), edits=("y" * 40_001, None)), "at most 40,000"),
        (Ballot((0, 1), edits=("\ud800", None)), "half of a character"),
    ],
)
def test_a_ballot_that_does_not_fit_is_refused_in_one_line_and_leaves_nothing(votes, shown, ballot, message):
    with pytest.raises(InstructLiteError, match=message) as error:
        votes.vote(shown.showing.ticket, shown.voter, ballot)
    assert "\n" not in str(error.value)
    assert not rows(votes, "votes")


def test_ranks_are_taken_from_likert_scores_where_there_are_none(votes):
    voter = votes.voter().key
    showing = votes.show(votes.add_item(asked(), pair(0, BASE, SFT, PPO)).id, voter)
    votes.vote(showing.ticket, voter, Ballot(likert=(2, 7, 2)))
    assert [answer.rank for answer in sorted(votes.votes()[0].answers, key=lambda a: a.place)] == [1, 0, 1]


def test_the_best_of_three_says_nothing_of_the_other_two(votes):
    voter = votes.voter().key
    showing = votes.show(votes.add_item(asked(), pair(0, BASE, SFT, PPO)).id, voter)
    votes.vote(showing.ticket, voter, Ballot.better(2, 3))
    assert [answer.rank for answer in sorted(votes.votes()[0].answers, key=lambda a: a.place)] == [None, None, 0]
    with pytest.raises(InstructLiteError, match="no answer 4 of 3"):
        Ballot.better(3, 3)


def test_tickets_that_are_forged_or_somebody_elses_are_refused(votes, shown):
    stranger = votes.voter().key
    for ticket, voter in [
        ("x", shown.voter),
        (None, shown.voter),
        ({"a": 1}, shown.voter),
        ("\ud800", shown.voter),
        (shown.showing.ticket, 7),
    ]:
        with pytest.raises(InstructLiteError, match="not known"):
            votes.vote(ticket, voter, Ballot.tie())
    with pytest.raises(InstructLiteError, match="another voter's"):
        votes.vote(shown.showing.ticket, stranger, Ballot.tie())
    with pytest.raises(InstructLiteError, match="not known"):
        votes.show(1, "nobody")
    with pytest.raises(InstructLiteError, match="no item 99"):
        votes.show(99, stranger)
    assert not rows(votes, "votes")


def test_nobody_votes_before_the_answers_are_finished(votes):
    voter = votes.voter().key
    item = votes.add_item(asked(), [Answer(SFT, None), Answer(PPO, None)])
    showing = votes.show(item.id, voter)
    assert showing.answers == (None, None)
    assert votes.places(showing.ticket) in ([1, 2], [2, 1])
    votes.finish(item.answers[0], "one")
    with pytest.raises(InstructLiteError, match="not finished"):
        votes.vote(showing.ticket, voter, Ballot.tie())
    # A server that died while it wrote leaves the item behind: nobody is shown it again.
    assert votes.current(voter) is None
    assert not votes.waiting(votes.voter().key)
    votes.finish(item.answers[1], "two \ud800")
    assert votes.current(voter) == votes.show(item.id, voter)
    assert sorted(votes.show(item.id, voter).answers) == ["one", "two ?"]
    assert votes.vote(showing.ticket, voter, Ballot.tie())
    with pytest.raises(InstructLiteError, match="not one that is being written"):
        votes.finish(item.answers[0], "other")


def test_a_voter_who_floods_is_stopped_and_others_are_not(tmp_path):
    votes = Store(tmp_path, votes_per_minute=5)
    flooder, other = votes.voter().key, votes.voter().key
    tickets = [votes.show(votes.add_item(asked(i), pair(i)).id, flooder).ticket for i in range(6)]
    for ticket in tickets[:5]:
        votes.vote(ticket, flooder, Ballot.tie())
    with pytest.raises(InstructLiteError, match="more than 5 votes within a minute"):
        votes.vote(tickets[5], flooder, Ballot.tie())
    assert votes.vote(tickets[0], flooder, Ballot.tie()) is False
    assert votes.vote(votes.show(1, other).ticket, other, Ballot.tie())


# --- blindness --------------------------------------------------------------------------------------------------------------


def test_nothing_a_voter_gets_before_his_vote_names_a_candidate(votes):
    secrets = ["sft-run", "ppo-run", "base", "Secret", "a" * 8, "b" * 8, "judge-x", "0.625"]
    said = []

    def told(call, *arguments):
        try:
            said.append(repr(call(*arguments)))
        except InstructLiteError as error:
            said.append(f"{error} {error.__cause__!r} {error.__context__!r}")

    for number in range(20):
        item = votes.add_item(asked(number), pair(number, *(BASE, SFT, PPO)[: 2 + number % 2]))
        votes.add_scores("judge-x", dict.fromkeys(item.answers, 0.625))
        voter = votes.voter(name=f"voter {number}")
        said.append(repr(voter))
        told(votes.show, item.id, voter.key)
        told(votes.current, voter.key)
        ticket = votes.current(voter.key).ticket
        told(votes.reveal, ticket, voter.key)
        told(votes.vote, ticket, voter.key, Ballot((0,)))
        told(votes.vote, "forged", voter.key, Ballot.tie())
        told(votes.reveal, "forged", voter.key)
        told(votes.vote, ticket, voter.key, Ballot.tie(2 + number % 2))
        # Another voter's vote opens nothing.
        stranger = votes.voter().key
        told(votes.reveal, ticket, stranger)
        told(votes.reveal, votes.show(item.id, stranger).ticket, stranger)
        told(votes.vote, ticket, voter.key, Ballot.better(0, 2 + number % 2))
    assert not [(text, secret) for text in said for secret in secrets if secret in text]
    assert set(vars(votes.current(stranger))) == {"ticket", "prompt", "answers", "voted"}


def test_names_and_scores_are_revealed_after_the_vote_in_the_order_shown(votes, shown):
    ticket, voter = shown.showing.ticket, shown.voter
    votes.add_scores("judge-x", {1: 0.5, 2: -1.0})
    with pytest.raises(InstructLiteError, match="after the vote"):
        votes.reveal(ticket, voter)
    votes.vote(ticket, voter, Ballot.tie())
    of_text = {answer.text: (answer.candidate, {"judge-x": score}) for answer, score in zip(pair(), (0.5, -1.0), strict=True)}
    assert votes.reveal(ticket, voter) == [of_text[text] for text in shown.showing.answers]
    with pytest.raises(InstructLiteError, match="after the vote"):
        votes.reveal(ticket, votes.voter().key)
    assert votes.current(voter) is None


@pytest.mark.parametrize("candidates", [(SFT, PPO), (BASE, SFT, PPO), (BASE, SFT, PPO, Candidate("dpo-run"), Candidate("bon-run"))])
def test_the_order_is_balanced_and_cannot_be_foretold(votes, candidates):
    voter = votes.voter().key
    with votes.writing():  # one transaction: 150 would wait for the disk
        showings = [votes.show(votes.add_item(asked(number), pair(number, *candidates)).id, voter) for number in range(150)]
    orders = []
    for number, showing in enumerate(showings):
        of_text = {answer.text: answer.candidate.name for answer in pair(number, *candidates)}
        orders.append(tuple(of_text[text] for text in showing.answers))
    for candidate in candidates:
        places = Counter(order.index(candidate.name) for order in orders)
        assert len(places) == len(candidates)
        assert max(places.values()) - min(places.values()) <= IMBALANCE
    repeated = sum(a == b for a, b in itertools.pairwise(orders)) / 149
    if len(candidates) == 2:
        assert 0.25 < repeated < 0.6  # 0 if the orders alternated
        # Who knows all orders so far, and bets on the rarer one, is little better than a coin.
        right = sum(order == min(sorted(set(orders)), key=orders[:n].count) for n, order in enumerate(orders)) / 150
        assert right < 0.75


def test_voters_of_one_item_see_it_in_different_orders_and_each_always_in_his(votes):
    item = votes.add_item(asked(), pair()).id
    keys = [votes.voter().key for _ in range(20)]
    showings = [votes.show(item, key) for key in keys]
    assert all(one.answers != other.answers for one, other in zip(showings[::2], showings[1::2], strict=True))
    assert [votes.show(item, key) for key in keys] == showings
    assert len({showing.ticket for showing in showings}) == 20


# --- what is asked, and who is ----------------------------------------------------------------------------------------------


def test_the_same_answers_are_one_item_and_unfinished_ones_never(votes):
    first = votes.add_item(asked(), pair(), use_case="chat")
    assert votes.add_item(asked(), pair()[::-1]) == store.Item(first.id, first.answers[::-1])
    assert votes.add_item(asked(), pair()[::-1], gold=[1, 0]).id == first.id
    assert rows(votes, "item_answers") == [(1, 1, 0), (1, 2, 1)]
    assert votes.add_item(asked(), [Answer(SFT, "other"), pair()[1]]).id != first.id
    writing = [Answer(SFT, None), Answer(PPO, None)]
    assert votes.add_item(asked(), writing).id != votes.add_item(asked(), writing).id
    assert len(rows(votes, "prompts")) == 1


@pytest.mark.parametrize(
    ("prompt", "answers", "gold", "message"),
    [
        (asked(), pair()[:1], None, "1 answers to compare, expected 2 to 9"),
        (asked(), pair() * 5, None, "10 answers"),
        (asked(), [pair()[0]] * 2, None, "the same one"),
        (asked(), pair(), [0], "do not order"),
        (asked(), pair(), [1, 1], "do not order"),
        ([], pair(), None, "no messages"),
        ([{"role": "assistant", "content": "x"}], pair(), None, "assistant comes first"),
        ([{"role": "user", "content": "\ud800"}], pair(), None, "half of a character"),
    ],
)
def test_items_that_cannot_be_voted_on_are_refused(votes, prompt, answers, gold, message):
    with pytest.raises(InstructLiteError, match=message):
        votes.add_item(prompt, answers, gold=gold)
    assert not rows(votes, "items") + rows(votes, "prompts") + rows(votes, "answers")


def test_a_voter_may_have_a_name_and_a_group_and_needs_neither(votes):
    nobody, ann = votes.voter(), votes.voter(name=" Ann  Lee ", group="nurses")
    assert (nobody.name, nobody.group, ann.name, ann.group) == (None, None, "Ann Lee", "nurses")
    assert votes.voter(name="ann lee") == ann
    assert votes.voter(nobody.key) == nobody != votes.voter()
    assert votes.voter(nobody.key, group="teachers").group == "teachers" == votes.voter(nobody.key).group
    for key in ("made up", "\ud800", {"a": 1}, 7):
        assert votes.voter(key).key != key
    with pytest.raises(InstructLiteError, match="not known"):
        votes.current({"a": 1})
    with pytest.raises(InstructLiteError, match="at most 80"):
        votes.voter(name="x" * 81)


def test_scores_are_finite_and_of_answers_that_are_there(votes):
    item = votes.add_item(asked(), pair())
    assert [row.answer for row in votes.unscored("r")] == list(item.answers)
    votes.add_scores("r", {item.answers[0]: 1.0})
    votes.add_scores("r", {item.answers[0]: 2.0})
    assert [(row.answer, row.prompt, row.text) for row in votes.unscored("r")] == [(item.answers[1], asked(), pair()[1].text)]
    with pytest.raises(InstructLiteError, match="not finite"):
        votes.add_scores("r", {item.answers[1]: float("nan")})
    with pytest.raises(InstructLiteError, match="not in the file"):
        votes.add_scores("r", {99: 1.0})
    assert rows(votes, "scores") == [(1, "r", 2.0)]


def test_waiting_counts_votes_and_items_that_others_have_before_them(votes):
    items = [votes.add_item(asked(i), pair(i), gold=[0, 1] if i == 2 else None) for i in range(4)]
    votes.add_scores("r", {items[0].answers[0]: 1.0, items[0].answers[1]: 0.5, items[1].answers[0]: 3.0})
    ann, bob = votes.voter().key, votes.voter().key
    votes.vote(votes.show(items[0].id, ann).ticket, ann, Ballot.tie())
    votes.show(items[1].id, ann)
    assert [row.item for row in votes.waiting(ann)] == [2, 3, 4]
    assert [row.taken for row in votes.waiting(ann)] == [0, 0, 0]
    assert [row.taken for row in votes.waiting(bob)] == [1, 1, 0, 0]
    assert [row.gold for row in votes.waiting(bob)] == [False, False, True, False]
    assert [row.scores for row in votes.waiting(bob)] == [((1.0, 0.5),), (), (), ()]  # one of two scored is no margin


# --- the file ---------------------------------------------------------------------------------------------------------------

OLDEST = """
CREATE TABLE prompts (id INTEGER PRIMARY KEY, messages TEXT NOT NULL UNIQUE, use_case TEXT, created TEXT NOT NULL);
CREATE TABLE candidates (id INTEGER PRIMARY KEY, name TEXT NOT NULL, base TEXT NOT NULL, adapter TEXT NOT NULL,
  UNIQUE (name, base, adapter));
CREATE TABLE answers (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts,
  candidate_id INTEGER NOT NULL REFERENCES candidates, text TEXT, decoding TEXT NOT NULL, seed INTEGER, created TEXT NOT NULL);
CREATE INDEX answers_of_prompt ON answers (prompt_id, candidate_id);
CREATE TABLE items (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts, answers TEXT NOT NULL UNIQUE,
  candidates TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE item_answers (item_id INTEGER NOT NULL REFERENCES items, answer_id INTEGER NOT NULL REFERENCES answers,
  PRIMARY KEY (item_id, answer_id)) WITHOUT ROWID;
CREATE TABLE voters (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT UNIQUE COLLATE NOCASE, "group" TEXT,
  created TEXT NOT NULL);
CREATE TABLE showings (id INTEGER PRIMARY KEY, ticket TEXT NOT NULL UNIQUE, item_id INTEGER NOT NULL REFERENCES items,
  voter_id INTEGER NOT NULL REFERENCES voters, created TEXT NOT NULL, UNIQUE (item_id, voter_id));
CREATE TABLE places (showing_id INTEGER NOT NULL REFERENCES showings, place INTEGER NOT NULL,
  answer_id INTEGER NOT NULL REFERENCES answers, PRIMARY KEY (showing_id, place)) WITHOUT ROWID;
CREATE TABLE shown (candidates TEXT NOT NULL, candidate_id INTEGER NOT NULL, place INTEGER NOT NULL, times INTEGER NOT NULL,
  PRIMARY KEY (candidates, candidate_id, place)) WITHOUT ROWID;
CREATE TABLE votes (id INTEGER PRIMARY KEY, item_id INTEGER NOT NULL REFERENCES items, voter_id INTEGER NOT NULL REFERENCES voters,
  showing_id INTEGER REFERENCES showings, all_bad INTEGER NOT NULL, comment TEXT, created TEXT NOT NULL, UNIQUE (item_id, voter_id));
CREATE INDEX votes_of_voter ON votes (voter_id, created);
CREATE TABLE judgements (vote_id INTEGER NOT NULL REFERENCES votes, answer_id INTEGER NOT NULL REFERENCES answers,
  rank INTEGER, likert INTEGER CHECK (likert BETWEEN 1 AND 7), flags TEXT, edited TEXT, PRIMARY KEY (vote_id, answer_id)) WITHOUT ROWID;
PRAGMA user_version = 1;
INSERT INTO prompts VALUES (1, '[{"role": "user", "content": "Why?"}]', 'chat', '2026-11-21T10:00:00.000+00:00');
INSERT INTO candidates VALUES (1, 'sft', 'b', 'a1'), (2, 'ppo', 'b', 'b2');
INSERT INTO answers VALUES (1, 1, 1, 'one', '{}', NULL, 't'), (2, 1, 2, 'two', '{}', 7, 't');
INSERT INTO items VALUES (1, 1, '1,2', '1,2', 't');
INSERT INTO item_answers VALUES (1, 1), (1, 2);
INSERT INTO voters VALUES (1, 'the-key', 'Ann', NULL, 't');
INSERT INTO showings VALUES (1, 'the-ticket', 1, 1, '2026-11-21T10:00:00.000+00:00');
INSERT INTO places VALUES (1, 0, 2), (1, 1, 1);
INSERT INTO votes VALUES (1, 1, 1, 1, 0, NULL, '2026-11-21T10:00:30.500+00:00');
INSERT INTO judgements VALUES (1, 1, 1, NULL, NULL, NULL), (1, 2, 0, 6, '["gives_advice"]', NULL);
"""


def schema(path) -> set[str]:
    found = sqlite3.connect(path).execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {" ".join(sql.split()).replace("( ", "(") for (sql,) in found}


def test_a_file_of_the_oldest_schema_is_brought_up_to_date_with_its_votes(tmp_path):
    old = sqlite3.connect(tmp_path / "old.sqlite")
    old.executescript(OLDEST)
    old.close()
    votes = Store(tmp_path / "old.sqlite")
    [vote] = votes.votes()
    assert (vote.prompt, vote.seconds, vote.name, vote.gold) == ([{"role": "user", "content": "Why?"}], 30.5, "Ann", None)
    assert [(a.candidate.name, a.text, a.rank, a.likert, a.flags, a.place, a.scores) for a in vote.answers] == [
        ("sft", "one", 1, None, None, 1, {}), ("ppo", "two", 0, 6, ("gives_advice",), 0, {}),
    ]  # fmt: skip
    assert votes.vote("the-ticket", "the-key", Ballot((0, 1), likert=(6, None), flags=(["gives_advice"], None))) is False
    Store(tmp_path / "new.sqlite")
    assert schema(tmp_path / "old.sqlite") == schema(tmp_path / "new.sqlite")
    assert sqlite3.connect(tmp_path / "old.sqlite").execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    old = sqlite3.connect(tmp_path / "old.sqlite")
    old.executescript(OLDEST)
    old.close()
    before = schema(tmp_path / "old.sqlite")
    broken = (*MIGRATIONS, lambda db: db.execute("CREATE nonsense"))
    monkeypatch.setattr("instructlite.feedback.migrations.MIGRATIONS", broken)
    with pytest.raises(InstructLiteError, match="syntax error"):
        Store(tmp_path / "old.sqlite")
    assert schema(tmp_path / "old.sqlite") == before


def test_files_of_newer_versions_and_of_others_are_left_alone(tmp_path):
    newer, other = tmp_path / "newer.sqlite", tmp_path / "other.sqlite"
    for path, statement in ((newer, "PRAGMA user_version = 99"), (other, "CREATE TABLE t (x)")):
        sqlite3.connect(path).execute(statement).connection.commit()
    with pytest.raises(InstructLiteError, match="schema 99.*use the version that wrote it"):
        Store(newer)
    with pytest.raises(InstructLiteError, match="a database of something else"):
        Store(other)
    assert schema(other) == {"CREATE TABLE t (x)"}


def test_a_damaged_file_is_moved_aside_by_who_writes_and_named_by_who_reads(tmp_path):
    path = tmp_path / "votes.sqlite"
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(InstructLiteError, match="not a database.*name the file"):
        Store(tmp_path, create=False)
    assert path.read_bytes().startswith(b"not a")
    votes = Store(tmp_path)
    assert votes.moved_aside.read_bytes() == b"not a database, " * 100
    assert votes.moved_aside.parent == tmp_path
    votes.add_item(asked(), pair())
    assert Store(tmp_path).moved_aside is None
    assert len(rows(Store(tmp_path), "items")) == 1


def test_pages_overwritten_inside_the_file_are_noticed(tmp_path):
    votes = Store(tmp_path)
    with votes.writing():
        for number in range(50):
            votes.add_item(asked(number), pair(number))
    votes.close()
    with (tmp_path / "votes.sqlite").open("r+b") as file:
        file.seek(4096 * 2)
        file.write(os.urandom(4096 * 6))
    with pytest.raises(InstructLiteError, match="restore it from a copy"):
        Store(tmp_path, create=False)
    assert Store(tmp_path).moved_aside


def test_reading_needs_a_file(tmp_path):
    with pytest.raises(InstructLiteError, match=r"votes\.sqlite: no votes there"):
        Store(tmp_path, create=False)
    assert not list(tmp_path.iterdir())


def test_a_vote_on_a_busy_full_or_read_only_file_is_told_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    votes = Store(tmp_path)
    voter = votes.voter().key
    item = votes.add_item(asked(), pair()).id
    ticket = votes.show(item, voter).ticket
    other = sqlite3.connect(votes.path, isolation_level=None)
    with votes.reading() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    long = Ballot.tie(comment="x" * 4000, edits=("y" * 40_000, "z" * 40_000))

    def pragma(text):
        return lambda: votes._db.execute(f"PRAGMA {text}")

    for cause, cure, message in (
        (lambda: other.execute("BEGIN IMMEDIATE"), lambda: other.execute("ROLLBACK"), "another process holds it; try again"),
        (pragma(f"max_page_count = {pages}"), pragma("max_page_count = 1000"), "free some space"),
        (pragma("query_only = ON"), pragma("query_only = OFF"), "writable"),
    ):
        cause()
        with pytest.raises(InstructLiteError, match=f"{message}.*nothing was saved"):
            votes.vote(ticket, voter, long)
        cure()
        assert not votes.votes()
    assert votes.vote(ticket, voter, long) is True


def test_a_file_that_was_deleted_under_an_open_store_acknowledges_nothing(votes, shown):
    votes.path.unlink()
    with pytest.raises(InstructLiteError, match="deleted or replaced while it was open, this is not saved"):
        votes.vote(shown.showing.ticket, shown.voter, Ballot.tie())


def test_network_file_systems_are_refused(tmp_path, monkeypatch):
    parts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(database.psutil, "disk_partitions", lambda all: parts)
    with pytest.raises(InstructLiteError, match=r"network file system \(nfs4\)"):
        Store(tmp_path / "run" / "votes.sqlite")
    assert not list(tmp_path.iterdir())


def test_what_is_committed_is_synced(votes):
    with votes.reading() as db:
        assert [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")] == ["wal", 2, 1]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_nobody_else_reads_the_keys(votes, shown):
    files = [path for path in votes.path.parent.iterdir() if not path.name.endswith(".lock")]
    assert len(files) == 3
    assert not [path for path in files if path.stat().st_mode & 0o077]


def test_an_error_inside_a_block_undoes_all_of_it(votes):
    with pytest.raises(KeyError), votes.writing():
        votes.add_item(asked(), pair())
        raise KeyError
    assert not rows(votes, "items") + rows(votes, "prompts")
