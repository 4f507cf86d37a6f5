"""Will it fit, and how long will it take? From the recipe alone: no weights are read and no torch is loaded.

Peak memory of each stage and phase, and disk: the arithmetic is models/memory.py. Time: only where it was measured on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..config import Loop
from ..errors import InstructLiteError
from ..models.memory import Shapes
from .advice import changes_of
from .bases import BASES, shapes_of
from .calibration import Speed, keep, key_of, speed_of
from .devices import CARDS, Device, this_device
from .lengths import Lengths, lengths_of
from .stages import StagePlan, asked_of, stage_plan
from .timing import Duration, durations, in_words


@dataclass(frozen=True)
class Plan:
    loop: Loop
    device: Device
    lengths: Lengths
    stages: list[StagePlan]
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Of stages that do not fit: options that make them fit; empty if none does."""
    speed: Speed | None = None
    """Measured for this recipe on this machine; None: not measured, or planned for another one."""
    durations: dict[str, Duration] = field(default_factory=dict)
    """Of the stages, where the speed is known."""

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages)

    @property
    def peak(self) -> float:
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    @property
    def duration(self) -> str:
        """Of all stages together, and of each."""
        each = ", ".join(f"{stage} {one}" for stage, one in self.durations.items())
        known = all(one.known for one in self.durations.values())
        return f"about {in_words(sum(one.seconds for one in self.durations.values()))} ({each})" if known else f"about {each}"


def plan(
    loop: Loop, device: Device, *, shapes: Shapes | None = None, lengths: Lengths | None = None, here: bool = False, measure: bool = False
) -> Plan:
    """Peak memory of every stage, and what to change where one does not fit; how long each takes, where this machine's speed is known.

    shapes: of the base; None: known, or from its config.json here or on the Hub. lengths: None: from the data files that can be read here.
    here: `device` is this machine's. measure: measure its speed now, which loads the base, and keep it; not where it does not fit.
    """
    shapes = shapes or shapes_of(loop.model, loop.revision)
    lengths = lengths or lengths_of(loop)
    stages = [stage_plan(name, loop, device, shapes, lengths) for name in (*loop.trained, "report")]
    changes = {stage.stage: changes_of(stage.stage, loop, device, shapes, lengths) for stage in stages if not stage.fits}
    planned = Plan(loop, device, lengths, stages, changes)
    if not here:
        return planned
    key = key_of(loop, shapes, lengths, device)
    if measure and planned.fits:
        from .measuring import measure as measured

        keep(key, measured(loop, asked_of("ppo", loop, device, shapes, lengths)))
    if (speed := speed_of(key)) is None:
        return planned
    return replace(planned, speed=speed, durations={one.stage: one for one in durations(loop, speed, device, shapes, lengths)})


def notices(loop: Loop) -> list[str]:
    """For who is about to run it on this machine: a line for each stage that will not fit, and how long it will take where that is known.

    None where the base is not known yet.
    """
    try:
        planned = plan(loop, this_device(), here=True)
    except InstructLiteError:
        return []  # whoever loads the base or reads the data says what is wrong
    lines = [
        f"memory: {stage.stage} will need about {stage.peak / 1e9:.1f} GB, too much for {planned.device}"
        + (f"; it should fit with {' '.join(changes)}" if (changes := planned.changes[stage.stage]) else "")
        for stage in planned.stages
        if not stage.fits
    ]
    return [*lines, f"time: {planned.duration} as measured on this machine"] if planned.durations else lines


def bases_that_fit(loop: Loop, lengths: Lengths | None = None) -> list[tuple[str, float, dict[int, str]]]:
    """For each known base its parameters and, for each size of card, how the recipe's settings fit there: "bf16", "nf4" or ""."""
    rows, lengths = [], lengths or lengths_of(loop)
    for name, shapes in BASES.items():
        fits = {}
        for gigabytes in CARDS:
            ways = (("none", "bf16"), ("nf4", "nf4"))
            device = Device(True, gigabytes * 1e9)
            fitting = (word for way, word in ways if _fits(replace(loop, quantization=way), device, shapes, lengths))
            fits[gigabytes] = next(fitting, "")
        rows.append((name, shapes.parameters, fits))
    return rows


def _fits(loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> bool:
    return all(stage_plan(name, loop, device, shapes, lengths).fits for name in (*loop.trained, "report"))
