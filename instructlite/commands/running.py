"""`instructlite demo`, `run` and `recipes`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..training.work import is_main_process

if TYPE_CHECKING:
    from rich.table import Table

    from ..config import Loop
    from ..pipeline import StageRun

RESUME = "Let a stage that was interrupted go on from its last checkpoint."


def demo(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run the whole loop on the embedded 135M model and the starter data. A CPU is enough."""
    from ..config import load_loop

    run_stages(load_loop("smollm2-135m"), output, resume=resume)


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe, such as ppo.kl_coef=0.1.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/RECIPE")] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="One stage alone: data, sft, reward, judge, ppo, report, dpo.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run a recipe: data, SFT, reward model, judge, PPO, report; with also.dpo= DPO, too. What is done already is kept."""
    from ..config import load_loop

    run_stages(load_loop(recipe, overrides or []), output or Path("runs") / Path(recipe).stem, only, resume)


def show_recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, to copy it: instructlite recipes NAME > mine.yaml")
    ] = None,
) -> None:
    """List the recipes, or print one."""
    from ..config import recipe_path, recipes

    if name:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    known = recipes()
    width = max(map(len, known))
    for recipe, path in known.items():
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").partition(". ")[0]
        print(f"{recipe:{width}}  {title}")


def run_stages(loop: "Loop", output: Path, only: str | None = None, resume: bool = False) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.perf_counter()

    def say(line: str) -> None:
        if is_main_process():
            console.print(f"[{clock(time.perf_counter() - start)}] {line}")

    if only is None and is_main_process():
        from ..planning.plan import notices

        for line in notices(loop):
            say(line)
    say(f"{loop.model} into {output}: loading the libraries")
    from ..training.recipe import quiet_libraries

    quiet_libraries()
    from ..pipeline import run_loop

    result = run_loop(loop, output, only=only, isolate=True, resume=resume, say=say)
    if not is_main_process():
        return
    if result.report is not None:
        print(f"\n{result.report}")
    console.print()
    console.print(_stage_table(result.stages))
    console.print(f"\nAll of it is in {output}, its recipe in {output / 'recipe.yaml'}.")
    if any(stage.stage == "report" for stage in result.stages):
        console.print(f"Read {output / 'report' / 'report.html'}. Then, with your own data:")
        console.print(f"  instructlite run {output / 'recipe.yaml'} data.comparisons=mine.jsonl --output runs/mine")
    else:
        console.print(f"Next: instructlite run {output / 'recipe.yaml'} --output {output}")


def _stage_table(stages: "list[StageRun]") -> "Table":
    from rich.table import Table

    gpu = any(stage.peak_gpu_mb for stage in stages)
    table = Table("stage", "took", "peak memory", *(["on the GPU"] if gpu else []), "written to", box=None)
    for stage in stages:
        took = f"{clock(stage.seconds)}{' (before)' if stage.skipped else ''}"
        memory = [f"{peak:,.0f} MB" if peak else "-" for peak in (stage.peak_rss_mb, stage.peak_gpu_mb)]
        table.add_row(stage.stage, took, *memory[: 2 if gpu else 1], str(stage.path))
    return table


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
