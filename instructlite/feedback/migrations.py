"""The schema of the votes file, as the list of steps that led to it (as simonw/llm does).

A step is never changed once it is released: what is wrong with it is mended by a new one at the end. `PRAGMA user_version` is the
number of steps that a file has behind it.
"""

import sqlite3

from ..errors import InstructLiteError


def m001_prompts_answers_and_votes(db: sqlite3.Connection) -> None:
    for statement in (
        "CREATE TABLE prompts (id INTEGER PRIMARY KEY, messages TEXT NOT NULL UNIQUE, use_case TEXT, created TEXT NOT NULL)",
        """CREATE TABLE candidates (id INTEGER PRIMARY KEY, name TEXT NOT NULL, base TEXT NOT NULL, adapter TEXT NOT NULL,
           UNIQUE (name, base, adapter))""",
        """CREATE TABLE answers (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts,
           candidate_id INTEGER NOT NULL REFERENCES candidates, text TEXT, decoding TEXT NOT NULL, seed INTEGER, created TEXT NOT NULL)""",
        "CREATE INDEX answers_of_prompt ON answers (prompt_id, candidate_id)",
        # `answers` and `candidates` are the sorted ids: the first finds an item again, the second whose order is to be balanced.
        """CREATE TABLE items (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts, answers TEXT NOT NULL UNIQUE,
           candidates TEXT NOT NULL, created TEXT NOT NULL)""",
        """CREATE TABLE item_answers (item_id INTEGER NOT NULL REFERENCES items, answer_id INTEGER NOT NULL REFERENCES answers,
           PRIMARY KEY (item_id, answer_id)) WITHOUT ROWID""",
        """CREATE TABLE voters (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, name TEXT UNIQUE COLLATE NOCASE, "group" TEXT,
           created TEXT NOT NULL)""",
        """CREATE TABLE showings (id INTEGER PRIMARY KEY, ticket TEXT NOT NULL UNIQUE, item_id INTEGER NOT NULL REFERENCES items,
           voter_id INTEGER NOT NULL REFERENCES voters, created TEXT NOT NULL, UNIQUE (item_id, voter_id))""",
        """CREATE TABLE places (showing_id INTEGER NOT NULL REFERENCES showings, place INTEGER NOT NULL,
           answer_id INTEGER NOT NULL REFERENCES answers, PRIMARY KEY (showing_id, place)) WITHOUT ROWID""",
        """CREATE TABLE shown (candidates TEXT NOT NULL, candidate_id INTEGER NOT NULL, place INTEGER NOT NULL, times INTEGER NOT NULL,
           PRIMARY KEY (candidates, candidate_id, place)) WITHOUT ROWID""",
        """CREATE TABLE votes (id INTEGER PRIMARY KEY, item_id INTEGER NOT NULL REFERENCES items,
           voter_id INTEGER NOT NULL REFERENCES voters, showing_id INTEGER REFERENCES showings,
           all_bad INTEGER NOT NULL, comment TEXT, created TEXT NOT NULL,
           UNIQUE (item_id, voter_id))""",
        "CREATE INDEX votes_of_voter ON votes (voter_id, created)",
        """CREATE TABLE judgements (vote_id INTEGER NOT NULL REFERENCES votes, answer_id INTEGER NOT NULL REFERENCES answers,
           rank INTEGER, likert INTEGER CHECK (likert BETWEEN 1 AND 7), flags TEXT, edited TEXT,
           PRIMARY KEY (vote_id, answer_id)) WITHOUT ROWID""",
    ):
        db.execute(statement)


def m002_scores_of_reward_models(db: sqlite3.Connection) -> None:
    db.execute(
        """CREATE TABLE scores (answer_id INTEGER NOT NULL REFERENCES answers, judge TEXT NOT NULL, score REAL NOT NULL,
           PRIMARY KEY (answer_id, judge)) WITHOUT ROWID"""
    )


def m003_gold_items(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE item_answers ADD COLUMN gold INTEGER")


MIGRATIONS = (m001_prompts_answers_and_votes, m002_scores_of_reward_models, m003_gold_items)


def migrate(db: sqlite3.Connection, path: object) -> None:
    """Bring a file to the newest schema, all steps or none. Raises InstructLiteError for a file of a newer version."""
    db.execute("BEGIN IMMEDIATE")
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise InstructLiteError(
                f"{path}: has schema {version}, this version of InstructLite knows {len(MIGRATIONS)}; use the version that wrote it"
            )
        if version == 0 and db.execute("SELECT name FROM sqlite_master").fetchone():
            raise InstructLiteError(f"{path}: is a database of something else (name another file for the votes)")
        for step in MIGRATIONS[version:]:
            step(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
