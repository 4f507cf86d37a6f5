"""SIGTERM and Ctrl-C: the step is finished and saved, the exit code is the signal's, and one line says how to go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_checkpoints import ROWS, outcome, tiny_sft

from instructlite.training import sft
from instructlite.training.checkpoints import newest_verified, step_of
from instructlite.training.interrupt import Interrupted, Interruption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_finish_saves_and_says_how_to_go_on(tiny_path, tmp_path, monkeypatch, capfd, number, code):
    expected = outcome(tiny_sft(tiny_path).run(tmp_path / "whole"))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    original = sft.SFTTrainer.compute_loss

    def signalled(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), number)
            monkeypatch.setattr(sft.SFTTrainer, "compute_loss", original)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(sft.SFTTrainer, "compute_loss", signalled)
    with pytest.raises(Interrupted) as stopped:
        tiny_sft(tiny_path, training={"save_strategy": "no"}).run(tmp_path / "sft")
    assert (stopped.value.code, stopped.value.step) == (code, 3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    said = capfd.readouterr().err
    assert f"after step 3, which is saved in {tmp_path / 'sft.partial'}" in said
    assert f"go on with: SFTRecipe(...).run('{tmp_path / 'sft'}', resume=True)" in said
    assert outcome(tiny_sft(tiny_path).run(tmp_path / "sft", resume=True)) == expected


def test_the_second_signal_stops_at_once_but_not_one_that_came_two_ways(tiny_path, tmp_path, monkeypatch):
    reached = []

    def impatient(trainer, *args, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            reached.append(number)
            os.kill(os.getpid(), number)
            if len(reached) == 2:
                monkeypatch.setattr("instructlite.training.interrupt.SAME", 0)  # the seconds pass
        pytest.fail("went on after the second Ctrl-C")

    monkeypatch.setattr(sft.SFTTrainer, "compute_loss", impatient)
    with pytest.raises(Interrupted) as stopped:
        tiny_sft(tiny_path).run(tmp_path / "sft")
    assert (stopped.value.code, stopped.value.step, len(reached)) == (130, None, 3)
    assert not list(tmp_path.iterdir()), "nothing was saved, so nothing is left"


def test_a_signal_outside_of_training_stops_at_once_and_the_outermost_context_speaks(capfd):
    with pytest.raises(Interrupted), Interruption("outer"), Interruption("inner"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert capfd.readouterr().err == "go on with: outer\n"


def test_a_signal_that_comes_after_the_last_step_is_not_lost():
    with pytest.raises(Interrupted) as stopped, Interruption("x") as interruption, interruption.finishing_steps():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143


TINY_LOOP = """\
model: {model}
dtype: float32
chat_template: chatml
lora: {{r: 4, alpha: 8}}
data: {{demonstrations: {data}, comparisons: starter, comparison_limit: 12, judge: 12, heldout: 12}}
sft: {{training: {{max_steps: 2000, save_strategy: "no", gradient_checkpointing: false}}}}
"""


def signal_it(process: subprocess.Popen, number: int, to_group: bool) -> list[str]:
    """Send a signal once the child trains; the lines on stderr, of all there is."""
    said = []
    for line in process.stderr:
        said.append(line.rstrip())
        if re.search(r"sft: training \d+/2000", line):
            (os.killpg if to_group else os.kill)(process.pid, number)
            break
    said += process.stderr.read().splitlines()
    process.wait()
    return said


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_t3_a_signal_to_the_command_reaches_the_stage_in_its_own_process(tiny_path, tmp_path):
    data, recipe = tmp_path / "d.jsonl", tmp_path / "tiny.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe.write_text(TINY_LOOP.format(model=tiny_path, data=data))
    # SIGTERM goes to the command alone, as from a scheduler; Ctrl-C to all processes of the terminal, so that it comes two ways.
    cases = {signal.SIGTERM: (143, False), signal.SIGINT: (130, True), signal.SIGKILL: (-9, False)}
    started, here = {}, Path(__file__).parent.parent
    for number in cases:
        run = tmp_path / signal.Signals(number).name
        command = ["run", str(recipe), "seed=1", "--only", "sft", "--output", str(run)]
        call = [sys.executable, "-m", "instructlite", *command]
        started[number] = run, command, subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=here)
    for number, (run, command, process) in started.items():
        code, to_group = cases[number]
        said = signal_it(process, number, to_group)
        assert process.returncode == code, said
        if number != signal.SIGKILL:  # which stops nobody from saving but the one it hits
            assert said[-1] == f"go on with: instructlite {' '.join(command)} --resume"
        assert sum(line.startswith("go on with") for line in said) == (number != signal.SIGKILL)
        assert sum("finishing this step and saving" in line for line in said) == 1
        saved = newest_verified(run / "sft.partial" / "trainer", pytest.fail)
        assert 0 < step_of(saved) < 2000
        assert [line for line in said if f"after step {step_of(saved)}, which is saved in {run / 'sft.partial'}" in line]
        assert not any("Traceback" in line for line in said)
