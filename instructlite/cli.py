"""The verbs of the command line. What is heavy is imported inside a command, so that `--help` answers at once.

A user's mistake is one line on stderr and exit code 2; `--debug` shows the traceback. A run that SIGTERM or Ctrl-C stopped has
saved, says the command that goes on, and exits with 143 or 130.
"""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .errors import BadRecords, InstructLiteError
from .training.interrupt import Interruption
from .training.work import is_main_process, launched

if TYPE_CHECKING:
    from rich.table import Table

    from .config import Loop
    from .pipeline import StageRun
    from .planning import Plan

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data files.")
app.add_typer(data_app, name="data")

RESUME = "Let a stage that was interrupted go on from its last checkpoint."


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command, turn a user's mistake into one line. `--debug` may stand anywhere on the line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        with Interruption(_again(given)) if given[:1] in (["run"], ["demo"], ["evaluate"]) else nullcontext():
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
    command = shlex.join(["instructlite", *given, *([] if given[0] == "evaluate" or "--resume" in given else ["--resume"])])
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run the whole loop on the embedded 135M model and the starter data. A CPU is enough."""
    from .config import load_loop

    _run(load_loop("smollm2-135m"), output, resume=resume)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe, such as ppo.kl_coef=0.1.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory.", show_default="runs/RECIPE")] = None,
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="One stage alone: data, sft, reward, judge, ppo or report.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
) -> None:
    """Run a recipe: data, SFT, reward model, judge, PPO, report. What is done already is kept."""
    from .config import load_loop

    _run(load_loop(recipe, overrides or []), output or Path("runs") / Path(recipe).stem, only, resume)


@app.command("recipes")
def show_recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, to copy it: instructlite recipes NAME > mine.yaml")
    ] = None,
) -> None:
    """List the recipes, or print one."""
    from .config import recipe_path, recipes

    if name:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    known = recipes()
    width = max(map(len, known))
    for recipe, path in known.items():
        title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").partition(". ")[0]
        print(f"{recipe:{width}}  {title}")


@data_app.command("check")
def data_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="JSONL files.")],
    kind: Annotated[
        str | None, typer.Option(help="demonstrations, comparisons, rankings, prompts or texts.", show_default="told from the keys")
    ] = None,
) -> None:
    """Name every broken line of JSONL files; exit code 2 if there is one."""
    from .data.records import KINDS, check_file

    if kind not in (None, *KINDS):
        raise InstructLiteError(f"--kind {kind}: choose {', '.join(KINDS)}")
    reports = [check_file(file, kind) for file in files]
    for report in reports:
        print(report)
    if any(report.problems for report in reports):
        raise typer.Exit(2)


@app.command()
def evaluate(
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="RUN|ADAPTER", help="A run, or adapters and Hub repositories to compare; 'base' is the base."),
    ],
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts (JSONL).", show_default="the run's")] = None,
    judge: Annotated[str | None, typer.Option(help="A reward adapter that PPO did not see.", show_default="the run's")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each prompt from each candidate.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Where report.md and report.json go.", show_default="RUN/report")] = None,
) -> None:
    """Write the report of a run anew, or compare adapters of one base."""
    from .config import load_loop

    run_directory = Path(candidates[0])
    is_run = len(candidates) == 1 and (run_directory / "recipe.yaml").is_file()
    if is_run and prompts is judge is output is None:
        given = [] if samples is None else [f"evaluation.samples={samples}"]
        _run(load_loop(run_directory / "recipe.yaml", given), run_directory, "report")
        return
    if is_run:
        candidates = ["base", str(run_directory / "sft"), str(run_directory / "ppo")]
        prompts, judge = prompts or run_directory / "data" / "heldout_prompts.jsonl", judge or str(run_directory / "judge")
    if prompts is None or judge is None or output is None:
        raise InstructLiteError("to compare adapters, give --prompts FILE, --judge ADAPTER and --output DIRECTORY for the report")
    from .training.recipe import quiet_libraries

    quiet_libraries()
    from .evaluation.compare import evaluate as compare

    options = {} if samples is None else {"samples": samples}
    print(compare(candidates, data=prompts, judge=judge, output_dir=output, **options))
    print(f"\nWritten: {output / 'report.md'} and {output / 'report.json'}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the card, such as 24GB.", show_default="this machine")] = None,
    gpus: Annotated[int, typer.Option(help="So many of them.", min=1)] = 1,
    bases: Annotated[bool, typer.Option("--bases", help="Also: which bases would fit which cards with these settings.")] = False,
) -> None:
    """Say before anything is loaded or downloaded what memory and disk a recipe needs, and what to change if it does not fit."""
    from rich.console import Console

    from .config import load_loop
    from .planning import bases_that_fit, card, this_device
    from .planning import plan as plan_of

    loop = load_loop(recipe, overrides or [], complete=False)
    planned = plan_of(loop, card(gpu, gpus) if gpu else this_device(gpus))
    _print_plan(recipe, planned)
    if bases:
        print("\nThe same settings on other bases: the most precise weights that fit a card of so many GB")
        Console(soft_wrap=True, highlight=False, width=120).print(_bases_table(bases_that_fit(loop)))
    if not planned.fits:
        raise typer.Exit(1)


def _print_plan(recipe: str, planned: "Plan") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    loop, gigabyte = planned.loop, 1e9
    weights = "" if loop.quantization == "none" else f", {loop.quantization}"
    print(f"{recipe}: {loop.model}{weights} on {planned.device}")
    parts = list(planned.stages[0].parts)
    table = Table("GB", *parts, "at the peak", "peak", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in planned.stages:
        fixed = [f"{stage.parts[part] / gigabyte:.2f}" for part in parts]
        phase = stage.largest_phase
        verdict = "fits" if stage.fits else "does not fit"
        table.add_row(stage.stage, *fixed, f"{stage.phases[phase] / gigabyte:.2f} to {phase}", f"{stage.peak / gigabyte:.2f}", verdict)
    Console(soft_wrap=True, highlight=False, width=120).print(table)
    print(planned.lengths)
    print(f"Disk for checkpoints and adapters: {planned.disk / gigabyte:.2f} GB, and the base's weights where they are not here yet.")
    for stage, changes in planned.changes.items():
        print(f"{stage} would fit with: {' '.join(changes)}" if changes else f"{stage}: nothing here makes it fit; take a smaller base")


def _bases_table(rows: list) -> "Table":
    from rich import box
    from rich.table import Table

    cards = list(rows[0][2])
    table = Table("base", "parameters", *map(str, cards), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, parameters, fits in rows:
        table.add_row(name, f"{parameters / 1e9:.2f} B", *(fits[size] or "-" for size in cards))
    return table


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run directory with all of its adapters, or one adapter.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else the repository is private.")] = False,
    report: Annotated[Path | None, typer.Option(help="The report's directory.", show_default="RUN/report")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Where others find the base, if it is a directory here.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the adapters, as the Hub writes it, such as apache-2.0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before more than 1 GB is sent.")] = False,
) -> None:
    """Push a run or an adapter to the Hugging Face Hub, with a card. The token is that of HF_TOKEN or `hf auth login`."""
    import huggingface_hub

    from .sharing.hub import push_to_hub

    huggingface_hub.logging.set_verbosity_error()  # what happened is said below
    options = {"private": not public, "report": report, "base_model": base_model, "license": license}
    planned = push_to_hub(source, repo, **options, dry_run=True)
    print(planned)
    if dry_run:
        print(f"\nNothing was sent. The card:\n\n{planned.card}")
        return
    if planned.total > 1e9 and not yes and not typer.confirm("That is more than 1 GB. Go on?"):
        raise typer.Exit(1)
    done = push_to_hub(source, repo, **options)
    print(f"\n{'Pushed' if done.changed else 'Nothing had changed'}: {done.url} (commit {done.commit})")


def _run(loop: "Loop", output: Path, only: str | None = None, resume: bool = False) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    start = time.perf_counter()

    def say(line: str) -> None:
        if is_main_process():
            console.print(f"[{_clock(time.perf_counter() - start)}] {line}")

    if only is None and is_main_process():
        from .planning import doubts

        for line in doubts(loop):
            say(f"memory: {line}")
    say(f"{loop.model} into {output}: loading the libraries")
    from .training.recipe import quiet_libraries

    quiet_libraries()
    from .pipeline import run_loop

    result = run_loop(loop, output, only=only, isolate=True, resume=resume, say=say)
    if not is_main_process():
        return
    if result.report is not None:
        print(f"\n{result.report}")
    console.print()
    console.print(_stage_table(result.stages))
    console.print(f"\nAll of it is in {output}, its recipe in {output / 'recipe.yaml'}.")
    if any(stage.stage == "report" for stage in result.stages):
        console.print(f"Read {output / 'report' / 'report.md'}. Then, with your own data:")
        console.print(f"  instructlite run {output / 'recipe.yaml'} data.comparisons=mine.jsonl --output runs/mine")
    else:
        console.print(f"Next: instructlite run {output / 'recipe.yaml'} --output {output}")


def _stage_table(stages: "list[StageRun]") -> "Table":
    from rich.table import Table

    gpu = any(stage.peak_gpu_mb for stage in stages)
    table = Table("stage", "took", "peak memory", *(["on the GPU"] if gpu else []), "written to", box=None)
    for stage in stages:
        took = f"{_clock(stage.seconds)}{' (before)' if stage.skipped else ''}"
        memory = [f"{peak:,.0f} MB" if peak else "-" for peak in (stage.peak_rss_mb, stage.peak_gpu_mb)]
        table.add_row(stage.stage, took, *memory[: 2 if gpu else 1], str(stage.path))
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
