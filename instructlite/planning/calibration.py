"""How fast this machine computes with a base and its adapters: measured once by measuring.py, kept in a small file, read without torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import Loop, cache_directory
from ..models.memory import Shapes
from .devices import Device, device_name
from .lengths import Lengths
from .stages import asked_of

FILE = "calibration.json"


@dataclass(frozen=True)
class Speed:
    """Seconds a token. PPO computes its adapters under autocast, and packed where `padding_free`; the others on a CPU neither."""

    lower: float
    """Through the layers below all adapters, once for all roles; 0 where there are none."""
    read: float
    """Through the others, without a gradient, in a training batch of SFT or reward model."""
    train: float
    """Through them and back."""
    shared: float
    """As `lower`, by PPO."""
    upper: float
    """As `read`, by PPO."""
    learn: float
    """As `train`, by PPO."""
    score: float
    """As `read`, in evaluation's larger batches."""
    head: float
    """From the last hidden state to the log-probability of a token."""
    head_learnt: float
    sample: float
    """Of an answer, in PPO's batches."""
    answer: float
    """Of an answer in evaluation, where candidates share the batches."""
    load: float
    """Seconds, once a stage."""

    def __str__(self) -> str:
        forward, training = 1 / (self.lower + self.read), 1 / (self.lower + self.train)
        return f"forward {forward:,.0f}, training {training:,.0f}, sampling {1 / self.sample:,.0f} tokens a second"


def key_of(loop: Loop, shapes: Shapes, lengths: Lengths, device: Device) -> str:
    """What decides the speed."""
    asked = asked_of("ppo", loop, device, shapes, lengths)
    lora = asked.options["lora"]
    what = {
        "model": loop.model, "quantization": loop.quantization, "dtype": loop.dtype, "device": device_name(),
        "lora": [lora.r, lora.targets, lora.top_layers], "padding_free": asked.padding_free,
        "batches": [asked.micro_batch, asked.generated_at_once, loop.evaluation.batch_size],
    }  # fmt: skip
    return json.dumps(what, sort_keys=True)


def speed_of(key: str) -> Speed | None:
    """What was measured here; None: nothing was, or by another version."""
    try:
        return Speed(**_kept()[key])
    except (KeyError, TypeError):
        return None


def keep(key: str, speed: Speed) -> Path:
    path = cache_directory() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_text(json.dumps(_kept() | {key: asdict(speed)}, indent=2) + "\n", encoding="utf-8")
    staging.replace(path)
    return path


def _kept() -> dict[str, dict[str, float]]:
    path = cache_directory() / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
