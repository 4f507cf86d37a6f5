"""Where a recipe is to run, and what a process takes there beside its tensors."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import InstructLiteError

# On a CPU, fitted to recorded peaks of the 135M model (bench/plan_vs_measured.py): what importing torch, transformers, TRL and PEFT takes,
# how much more than the tensors of a phase the allocator holds, and the kernels that oneDNN compiles and keeps for a batch shape.
LIBRARIES, KEPT_BY_ALLOCATOR, KERNELS = 0.55e9, 1.43, 12e6
MOST_SHAPES = 80  # different batch shapes of a PPO run, whose answers end anywhere; its cache then drops old kernels
# On a GPU, assumed: the context with cuBLAS's workspace, and the gaps between the allocator's blocks.
CONTEXT, GAPS = 0.7e9, 1.08
CARDS = (8, 12, 16, 24, 48, 80)


@dataclass(frozen=True)
class Device:
    """Where it is to run. bytes: of one card, or of this machine's memory."""

    gpu: bool
    bytes: float
    count: int = 1

    def needed(self, persistent: float, transient: float, batch_shapes: int = 0) -> float:
        """Bytes that a process takes with such tensors, in batches of so many different shapes."""
        if self.gpu:
            return CONTEXT + GAPS * (persistent + transient)
        return LIBRARIES + persistent + KEPT_BY_ALLOCATOR * transient + KERNELS * batch_shapes

    def __str__(self) -> str:
        cards = "a GPU" if self.count == 1 else f"each of {self.count} GPUs"
        return f"{cards} of {self.bytes / 1e9:.0f} GB" if self.gpu else f"this machine's CPU with {self.bytes / 1e9:.0f} GB"


def this_device(gpus: int = 1) -> Device:
    """The first NVIDIA card, as its driver tells, or this machine's memory."""
    found = _of_first_card("memory.total")
    if found.isdigit():
        return Device(True, int(found) * 2**20, gpus)
    return Device(False, psutil.virtual_memory().total)


def _of_first_card(what: str) -> str:
    """What NVIDIA's driver says; "" without a card."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return ""
    query = [smi, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found.partition("\n")[0].strip()


def device_name() -> str:
    """Of what computes here: the card, or the processor and how many threads of it are used."""
    if found := _of_first_card("name"):
        return found
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    threads = os.environ.get("OMP_NUM_THREADS") or len(psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else [])
    return f"{model[1] if model else platform.processor()}, {threads or os.cpu_count()} threads"


def card(size: str, gpus: int = 1) -> Device:
    """A GPU given as text: 24GB, 24, 40GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", size, re.IGNORECASE)
    if found is None:
        raise InstructLiteError(f"--gpu {size}: give the memory of the card, such as 24GB")
    return Device(True, float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else 1e9), gpus)
