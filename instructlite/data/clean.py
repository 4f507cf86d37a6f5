"""The clean copy that `data check --fix DIR` writes: the good rows of each file, and the others with their reasons."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ..errors import InstructLiteError
from .formats import Row
from .schema import Fault

REJECTED = "rejected.jsonl"


class CleanCopy:
    """Files in a directory that appear all at once when the `with` block ends well, and not at all otherwise."""

    def __init__(self, directory: Path, files: Sequence[str | Path]):
        self.directory = directory
        self.targets: dict[str, Path] = {}
        for file in map(str, files):
            self.targets.setdefault(file, self._free_name(file))
        for target in [*self.targets.values(), directory / REJECTED]:
            if target.exists():
                raise InstructLiteError(f"{target} is there already (name an empty directory, or remove it)")
        self._open: dict[Path, TextIO] = {}

    def keep(self, file: str, record: dict) -> None:
        self._file(self.targets[file]).write(json.dumps(record, ensure_ascii=False) + "\n")

    def reject(self, row: Row | Fault, reason: str) -> None:
        about = {"file": row.file, "line": row.line, "rows": row.rows, "reason": reason}
        # ASCII, since what was rejected may hold half characters, which UTF-8 has no bytes for.
        self._file(self.directory / REJECTED).write(json.dumps(about)[:-1] + f', "row": {_as_json(row.raw)}}}\n')

    def __enter__(self) -> "CleanCopy":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for target, file in self._open.items():
            file.close()
            Path(file.name).replace(target) if kind is None else Path(file.name).unlink()

    def _file(self, target: Path) -> TextIO:
        if target not in self._open:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open[target] = target.with_name(f".{target.name}.part").open("w", encoding="utf-8", newline="\n")
        return self._open[target]

    def _free_name(self, file: str) -> Path:
        """mine.csv -> mine.jsonl; another mine -> mine-2.jsonl."""
        stem = re.sub(r"[^\w.-]+", "-", Path(file).name).strip("-.")
        stem = re.sub(r"\.(jsonl|json|csv|tsv|txt|parquet)$", "", stem) or "rows"
        taken = {*self.targets.values(), self.directory / REJECTED}
        names = (self.directory / f"{stem}{f'-{number}' if number > 1 else ''}.jsonl" for number in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)


def _as_json(raw: object) -> str:
    """The row as it was read. What JSON cannot hold (numbers that are not finite, nesting without end) goes in as text."""
    try:
        return json.dumps(raw, allow_nan=False)
    except (ValueError, RecursionError, TypeError):
        try:
            return json.dumps(repr(raw))
        except RecursionError:
            return json.dumps("(nested too deep to be written)")
