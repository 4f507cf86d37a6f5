"""The work directory of a run: one process at a time, nothing that is somebody else's, nothing good removed too early."""

import json
import os
import socket
import subprocess
import sys

import pytest
from test_checkpoints import tiny_sft

from instructlite.errors import InstructLiteError
from instructlite.training.work import restore, working, write_text


def test_a_second_run_in_the_same_directory_is_refused_in_one_line(tiny_path, tmp_path):
    with working(tmp_path / "sft"), pytest.raises(InstructLiteError, match=f"process {os.getpid()} on {socket.gethostname()}") as caught:
        tiny_sft(tiny_path).run(tmp_path / "sft")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_dead_process_is_none(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom instructlite.training.work import working\n"
        f"with working(Path({str(tmp_path / 'sft')!r})):\n    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(InstructLiteError, match=f"process {holder.pid} "), working(tmp_path / "sft"):
        pass
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "sft.partial" / "owner.json").read_text())["pid"] == holder.pid
    with working(tmp_path / "sft"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_directory_that_happens_to_be_called_partial_is_left_alone(tiny_path, tmp_path):
    (tmp_path / "sft.partial").mkdir()
    (tmp_path / "sft.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(InstructLiteError, match="no work directory of InstructLite"):
        tiny_sft(tiny_path).run(tmp_path / "sft")
    assert (tmp_path / "sft.partial" / "thesis.tex").read_text() == "precious"


def test_an_adapter_that_was_about_to_be_replaced_is_put_back(tmp_path):
    (tmp_path / "sft.partial" / "replaced" / "sft").mkdir(parents=True)
    (tmp_path / "sft.partial" / "replaced" / "sft" / "adapter").write_text("old")
    with working(tmp_path / "sft"):
        assert (tmp_path / "sft" / "adapter").read_text() == "old"
    (tmp_path / "replaced" / "sft").mkdir(parents=True)
    restore(tmp_path, tmp_path)
    assert (tmp_path / "sft" / "adapter").read_text() == "old", "what has been replaced by something is not put back"


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"
