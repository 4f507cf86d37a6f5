"""`instructlite round`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .running import clock


def round_of(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over its recipe, such as round.answers=2 or round.votes=60.")
    ] = None,
    votes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Votes that were cast elsewhere (JSONL); go on with what there is.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="JUDGE", help="Votes in place of people: a reward adapter, module:function, or a model at --base-url."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The judge's OpenAI-compatible endpoint; 'openai' is OpenAI's own.")
    ] = None,
    key_env: Annotated[str | None, typer.Option(metavar="VARIABLE", help="The environment variable that holds the endpoint's key.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait here for the votes; without it the same command goes on later.")] = False,
) -> None:
    """Have answers of the current policy voted on, and train the next policy by the votes."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.perf_counter()

    def say(line: str) -> None:
        console.print(f"[{clock(time.perf_counter() - start)}] {line}")

    from ..training.recipe import quiet_libraries

    quiet_libraries()
    from ..rounds import Judge, run_round

    chosen = Judge(judge, base_url, key_env) if judge else None
    result = run_round(run, overrides or [], votes=votes, judge=chosen, wait=wait, isolate=True, say=say)
    if result.report is None:
        console.print(f"\n{result.votes} of {result.wanted} votes are there. To vote: instructlite app {run}")
        console.print(f"Then, or with votes from elsewhere (--votes FILE): instructlite round {run}")
        return
    print(f"\n{result.report}")
    console.print(f"\nRound {result.number} is in {result.directory}: read {result.directory / 'report' / 'report.html'} and round.json.")
    console.print(f"The next one starts from its policy: instructlite round {run}")
