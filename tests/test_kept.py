"""What was computed is on the disk: all of a batch or nothing of it, whatever happens to the process."""

import multiprocessing
import os
import signal
import sqlite3
import time

import pytest

from instructlite.errors import InstructLiteError
from instructlite.evaluation.kept import Kept

BATCH = 50


def keep_on(path):
    kept = Kept(path)
    for number in range(10**6):
        kept.put({f"{number}/{i}": [number, i] for i in range(BATCH)})


def test_values_come_back_as_they_were_also_in_another_process(tmp_path):
    values = {"ids": [1, 2, 3], "score": 0.1 + 0.2, "nested": [[-0.5, 1e-30]]}
    Kept(tmp_path / "a" / "kept.sqlite").put(values)
    again = Kept(tmp_path / "a" / "kept.sqlite")
    assert again.get([*values, "other"]) == values
    again.put({"score": 2.0})
    assert again.get(["score"]) == {"score": 2.0}
    assert Kept(None).get(values) == {}


def test_more_keys_than_a_query_takes():
    kept = Kept(None)
    kept.put({str(i): i for i in range(1234)})
    assert kept.get(map(str, range(2000))) == {str(i): i for i in range(1234)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_whole_batches(tmp_path):
    path = tmp_path / "kept.sqlite"
    process = multiprocessing.get_context("fork").Process(target=keep_on, args=(path,))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or not Kept(path).get(["20/0"])):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    rows = sqlite3.connect(path).execute("SELECT key FROM kept").fetchall()
    counts = {}
    for (key,) in rows:
        counts[key.split("/")[0]] = counts.get(key.split("/")[0], 0) + 1
    assert len(counts) > 20 and set(counts.values()) == {BATCH}
    Kept(path).put({"more": 1})


def test_another_file_in_its_place_is_one_line(tmp_path):
    (tmp_path / "kept.sqlite").write_text("this is no data base" * 100)
    with pytest.raises(InstructLiteError, match=r"kept.sqlite: nothing can be kept there \(file is not a database\)"):
        Kept(tmp_path / "kept.sqlite")
