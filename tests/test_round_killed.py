"""`instructlite round`, killed with -9 while it draws answers and in PPO: the same command goes on and comes to the same end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_rounds import letters, make_run

from instructlite.feedback.store import Store

pytestmark = pytest.mark.slow  # every start of the command loads the libraries anew
# Many short steps, each of them saved: the kill meets one of them.
OPTIONS = [
    "round.batch_size=3", "reward.training.max_steps=12", "reward.training.save_steps=1", "reward.training.logging_steps=1",
    "ppo.training.max_steps=12", "ppo.training.save_steps=1", "ppo.training.logging_steps=1",
]  # fmt: skip
SAME = ("data/answers.jsonl", "data/votes.jsonl", "data/reward.jsonl")


def judge(prompts, completions, **rest):
    """Notes whom it was asked about, in the way a paid one would charge for it."""
    with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
        file.write("asked\n")
    return [letters(text) for text in completions]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_path) -> Path:
    return make_run(tmp_path_factory.mktemp("made"), tiny_path)


def started(run: Path) -> subprocess.Popen:
    """The command as somebody types it, in a process of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "instructlite", "round", str(run), "--judge", f"{__name__}:judge"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "ASKED": str(run.parent / "asked")}
    with (run.parent / "log").open("a") as log:
        return subprocess.Popen([*command, *OPTIONS], env=environment, stdout=log, stderr=log)


def finished(run: Path) -> None:
    process = started(run)
    assert process.wait(1800) == 0, (run.parent / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A round that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(made, run)
    finished(run)
    return run


def state(directory: Path) -> dict:
    return json.loads((directory / "round.json").read_text())


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


MOMENTS = {
    "drawing": lambda directory: lines(directory / "data" / "answers.jsonl") >= 2,
    "ppo": lambda directory: any((directory / "ppo.partial" / "trainer").glob("checkpoint-*")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_round_goes_on_with_the_same_command(made, whole, tmp_path, moment):
    run, directory = tmp_path / "run", tmp_path / "run" / "rounds" / "01"
    shutil.copytree(made, run)
    process = started(run)
    while process.poll() is None and not MOMENTS[moment](directory):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert "finished" not in state(directory)
    drawn = (directory / "data" / "answers.jsonl").read_bytes()
    finished(run)
    of_whole = whole / "rounds" / "01"
    assert (directory / "data" / "answers.jsonl").read_bytes().startswith(drawn[: drawn.rfind(b"\n") + 1]), "what was drawn is kept"
    for file in SAME:
        assert (directory / file).read_bytes() == (of_whole / file).read_bytes(), file
    assert state(directory)["adapters"] == state(of_whole)["adapters"]
    assert state(directory)["metrics"]["win_rates"] == state(of_whole)["metrics"]["win_rates"]
    assert not list(directory.glob("*.partial"))
    assert lines(tmp_path / "asked") == 1, "the judge was not asked again"
    votes = Store(run).votes()
    assert len({(vote.item, vote.voter) for vote in votes}) == len(votes) == len(state(directory)["items"])
