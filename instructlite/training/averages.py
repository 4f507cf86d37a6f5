"""Means of what is noted between two logs: over tokens where a value is per token, and over the processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from accelerate import PartialState
from accelerate.utils import gather_object

MAXIMA = ("policy/ratio_max", "rollout/length_max", "rollout/logp_mismatch")  # the largest is shown, not the mean


class Averages(dict[str, list[float]]):
    """{name: [sum, weight]}; plain numbers in a plain dict, so that a checkpoint can hold it as JSON."""

    def note(self, name: str, value: float, weight: float = 1.0) -> None:
        """weight: how many tokens (or whatever) `value` is the mean of."""
        if name in MAXIMA:
            self[name] = [max(value, self.get(name, [-math.inf])[0]), 1.0]
        else:
            total, before = self.get(name, (0.0, 0.0))
            self[name] = [total + value * weight, before + weight]

    def everywhere(self) -> Averages:
        """Those of all processes together; to be called on each of them, and the same on each."""
        if PartialState().num_processes == 1:
            return self
        together = Averages()
        # Name by name, not as one tensor: what a reward function or a memory check notes may be one process's alone.
        for one in gather_object([dict(self)]):
            together.merge(one)
        return together

    def merge(self, other: Mapping[str, list[float]]) -> None:
        for name, (total, weight) in other.items():
            self.note(name, total / weight, weight)

    def means(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.items()}
