"""`instructlite evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InstructLiteError


def evaluate(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER", help="A run, or adapters and Hub repositories to compare; 'base' is the base."),
    ],
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts (JSONL).", show_default="the run's")] = None,
    judge: Annotated[str | None, typer.Option(help="A reward adapter that PPO did not see.", show_default="the run's")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt from each candidate.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Where report.html, report.md and report.json go.", show_default="RUN/report")] = None,
) -> None:
    """Write the report of a run anew, or compare adapters of one base."""
    from ..commands.running import run_stages
    from ..config import load_loop

    run_directory = Path(candidates[0])
    is_run = len(candidates) == 1 and (run_directory / "recipe.yaml").is_file()
    if is_run and prompts is judge is output is None:
        given = [] if samples is None else [f"evaluation.samples={samples}"]
        run_stages(load_loop(run_directory / "recipe.yaml", given), run_directory, "report")
        return
    if is_run:
        candidates = ["base", str(run_directory / "sft"), str(run_directory / "ppo")]
        prompts, judge = prompts or run_directory / "data" / "heldout_prompts.jsonl", judge or str(run_directory / "judge")
    if prompts is None or judge is None or output is None:
        raise InstructLiteError("to compare adapters, give --prompts FILE, --judge ADAPTER and --output DIRECTORY for the report")
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    from ..evaluation.compare import evaluate as compare

    options = {} if samples is None else {"samples": samples}
    print(compare(candidates, data=prompts, judge=judge, output_dir=output, **options))
    print(f"\nWritten: {output / 'report.html'}, with report.md and report.json beside it")
