"""evaluate() over a run directory: candidates and judges by the names of its stages, prompts and demonstrations from its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.manifest import NAME, adapters_in
from .candidates import SHOTS

if TYPE_CHECKING:
    from .report import Report

PROMPTS, HELDOUT_DEMONSTRATIONS = "heldout_prompts.jsonl", "heldout_demonstrations.jsonl"
DEMONSTRATIONS, COMPARISONS = "demonstrations.jsonl", "heldout.jsonl"
JUDGES = ("judge", "reward")
"""The judge comes first and leads; the reward model beside it shows what was optimised."""


def policies(run: Path) -> list[str]:
    """The stages of a run that answer: SFT first, PPO last, since the last one is what the report's first words are about."""
    return [name for name, adapter in adapters_in(run).items() if adapter.role == "policy"]


def all_candidates(run: Path) -> list[str]:
    """Every candidate that a run has material for: prompting, best-of-n, and its policies."""
    first, *others = policies(run) or ["sft"]
    return ["base", f"few-shot:{SHOTS}", first, f"best-of-{SHOTS}", *others]


def in_run(run: Path, name: str) -> str:
    """The directory of a stage of the run; whatever is none as it is."""
    return str(run / name) if (run / name / NAME).is_file() else name


def evaluate_run(
    run: str | Path,
    *,
    candidates: Sequence[str] | None = None,
    judges: Sequence[Any] | None = None,
    output_dir: str | Path | None = None,
    **options: Any,
) -> Report:
    """The report of a run: its policies and the base unless others are named, judged by its judge and its reward model.

    candidates, judges: names of stages, or whatever `evaluate` takes. output_dir None: `report` in the run. options: as of `evaluate`.
    """
    from .compare import evaluate

    run = Path(run)
    data = run / "data"
    files = {"heldout_demonstrations": HELDOUT_DEMONSTRATIONS, "demonstrations": DEMONSTRATIONS, "comparisons": COMPARISONS}
    given = {name: data / file for name, file in files.items() if (data / file).is_file()}
    if (run / "reward" / NAME).is_file():
        given["reward"] = run / "reward"
    return evaluate(
        [in_run(run, name) for name in candidates or ["base", *policies(run)]],
        judge=[in_run(run, one) if isinstance(one, str) else one for one in judges or JUDGES],
        output_dir=output_dir or run / "report",
        **{"data": data / PROMPTS, **given, **options},
    )
