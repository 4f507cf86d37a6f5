"""`instructlite plan`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InstructLiteError

if TYPE_CHECKING:
    from rich.table import Table

    from ..planning.plan import Plan


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name (instructlite recipes) or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options over the recipe.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the card, such as 24GB.", show_default="this machine")] = None,
    gpus: Annotated[int, typer.Option(help="So many of them.", min=1)] = 1,
    bases: Annotated[bool, typer.Option("--bases", help="Also: which bases would fit which cards with these settings.")] = False,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Load the base and measure, in about a minute, how fast this machine is."),
    ] = False,
) -> None:
    """Say before anything is loaded or downloaded what memory, disk and time a recipe needs, and what to change if it does not fit."""
    from rich.console import Console

    from ..config import load_loop
    from ..planning.devices import card, this_device
    from ..planning.plan import bases_that_fit
    from ..planning.plan import plan as plan_of

    if calibrate and gpu:
        raise InstructLiteError("--calibrate measures this machine, --gpu plans for another one: give one of them")
    loop = load_loop(recipe, overrides or [], complete=False)
    device = card(gpu, gpus) if gpu else this_device(gpus)
    if calibrate:
        from ..training.recipe import quiet_libraries

        quiet_libraries()
    planned = plan_of(loop, device, here=gpu is None, measure=calibrate)
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
    table = Table("GB", *parts, "at the peak", "peak", "", *(["time"] if planned.durations else []), box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in planned.stages:
        fixed = [f"{stage.parts[part] / gigabyte:.2f}" for part in parts]
        phase = stage.largest_phase
        verdict = "fits" if stage.fits else "does not fit"
        peak = f"{stage.phases[phase] / gigabyte:.2f} to {phase}", f"{stage.peak / gigabyte:.2f}"
        table.add_row(stage.stage, *fixed, *peak, verdict, *([str(planned.durations[stage.stage])] if planned.durations else []))
    Console(soft_wrap=True, highlight=False, width=120).print(table)
    print(planned.lengths)
    print(_time(planned))
    print(f"Disk for checkpoints and adapters: {planned.disk / gigabyte:.2f} GB, and the base's weights where they are not here yet.")
    for stage, changes in planned.changes.items():
        print(f"{stage} would fit with: {' '.join(changes)}" if changes else f"{stage}: nothing here makes it fit; take a smaller base")


def _time(planned: "Plan") -> str:
    if planned.speed is not None:
        return f"Time: {planned.duration}, as measured on this machine: {planned.speed}."
    if not planned.fits:
        return "Time: not calibrated: to be measured (--calibrate), it has to fit."
    return "Time: not calibrated: add --calibrate" + (" on the machine that it is to run on." if planned.device.gpu else ".")


def _bases_table(rows: list) -> "Table":
    from rich import box
    from rich.table import Table

    cards = list(rows[0][2])
    table = Table("base", "parameters", *map(str, cards), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, parameters, fits in rows:
        table.add_row(name, f"{parameters / 1e9:.2f} B", *(fits[size] or "-" for size in cards))
    return table
