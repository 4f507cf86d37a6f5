"""The command line: its verbs are in commands/. What is heavy is imported inside a command, so that `--help` answers at once.

A user's mistake is one line on stderr and exit code 2; `--debug` shows the traceback. A run that SIGTERM or Ctrl-C stopped has
saved, says the command that goes on, and exits with 143 or 130.
"""

import os
import shlex
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from . import __version__
from .commands import benchmarking, data, evaluating, planning, pushing, rounds, running, serving, showing, votes
from .errors import BadRecords, InstructLiteError
from .training.interrupt import Interruption
from .training.work import is_main_process, launched

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
app.command()(running.demo)
app.command()(running.run)
app.command("recipes")(running.show_recipes)
app.add_typer(data.app, name="data")
app.add_typer(votes.app, name="votes")
app.command("round")(rounds.round_of)
app.command()(evaluating.evaluate)
app.command()(benchmarking.benchmark)
app.command()(planning.plan)
app.command()(showing.app)
app.command()(pushing.push)
app.command()(serving.serve)
app.command()(serving.merge)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, turn a user's mistake into one line. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        with Interruption(_again(given)) if given[:1] in (["run"], ["demo"], ["evaluate"], ["round"]) else nullcontext():
            app(args=given, prog_name="instructlite")
    except InstructLiteError as error:
        if "--debug" in arguments:
            raise
        opening = "the data has faults, nothing was trained:\n" if isinstance(error, BadRecords) else ""
        process = "" if is_main_process() else f" (process {os.environ['RANK']})"
        print(f"instructlite{process}: {opening}{error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _again(given: list[str]) -> str:
    """The command that goes on with what this one began."""
    command = shlex.join(["instructlite", *given, *([] if given[0] in ("evaluate", "round") or "--resume" in given else ["--resume"])])
    return f"accelerate launch ... -m {command}" if launched() else command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"instructlite {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """SFT, reward model and PPO as adapters of one base model, and a report on what came of it."""
