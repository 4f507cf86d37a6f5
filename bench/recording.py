"""What every bench program writes beside its numbers. Loads nothing heavy: a parent process must add nothing to its children's memory."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {"cpu": (names or [platform.machine()])[0], "cores": os.cpu_count(), "memory_gb": memory, "system": platform.system()}


def write(path: Path, results: dict[str, Any]) -> None:
    """Results with date and machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": date.today().isoformat(), "machine": machine()}
    path.write_text(json.dumps(about | results, indent=2) + "\n", encoding="utf-8")
