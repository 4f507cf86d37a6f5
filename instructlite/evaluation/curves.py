"""The course of a PPO run, from what its recipe left in the adapter's directory: metrics.jsonl, and the warnings in run.json.

Here curves are drawn as text: what a glance needs, and it shows wherever Markdown does. plots.py draws them for the HTML page.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from ..models.manifest import Adapter

SHOWN = {
    "objective/score": "score (what PPO maximises)",
    "watch/score": "score of the reward model that only watches",
    "objective/kl": "KL to the reference, nats an answer",
    "objective/entropy": "entropy, nats a token",
    "rollout/length_mean": "length, tokens",
    "rollout/eos_missing_frac": "answers that do not end",
    "rollout/score_length_corr": "correlation of score and length",
    "reward/ensemble_std": "disagreement of the ensemble",
    "watch/outlier_frac": "answers unlike the first rollout's, to the reward model",
    "policy/clip_frac": "clipped tokens",
    "value/explained_variance": "explained variance of the critic",
    "policy/loss": "loss of the policy",
    "value/loss": "loss of the critic",
    "ptx/loss": "loss on the mixed-in texts, nats a token",
}
POINTS = 40
BARS = "▁▂▃▄▅▆▇█"


def training_of(name: str, adapter: Adapter) -> dict[str, Any] | None:
    """The candidate's name, logged cycles, curves {metric: at most 40 means of neighbouring cycles} and warnings; None if not PPO's."""
    path = adapter.path / "metrics.jsonl"
    if not path.is_file():
        return None
    logs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    curves = {metric: [log[metric] for log in logs if log.get(metric) is not None] for metric in SHOWN}
    if not curves["objective/score"]:
        return None
    shown = {metric: means(values, POINTS) for metric, values in curves.items() if values}
    return {"candidate": name, "cycles": len(curves["objective/score"]), "curves": shown, "health": adapter.metrics.get("health", {})}


def means(values: Sequence[float], points: int) -> list[float]:
    """The values, or where there are more than so many, the means of as many runs of neighbours, equally long but for one."""
    edges = [round(i * len(values) / min(points, len(values))) for i in range(min(points, len(values)) + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def sparkline(values: Sequence[float]) -> str:
    """One bar a value, from the least to the greatest; all in the middle where nothing changes."""
    low, high = min(values), max(values)
    if math.isclose(low, high):
        return BARS[3] * len(values)
    return "".join(BARS[min(int(8 * (value - low) / (high - low)), 7)] for value in values)
