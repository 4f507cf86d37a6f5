"""What every step of preparing shares: a row with its place, and the count of what a step kept, changed and rejected.

A step judges a batch of rows: for each row None (kept, perhaps changed) or the reason why it goes. `Tally.run` counts, so that rows
in = rows kept + rows rejected holds for every step, and writes each rejected row with its reason.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType

from ...errors import InstructLiteError, find_function

BATCH = 512
EXAMPLES = 3


@dataclass(slots=True)
class Sample:
    """A record in the normal form of its kind, and where it came from: what a step works on."""

    record: dict
    kind: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def turns(self) -> list[dict]:
        """The messages of the prompt; none for texts."""
        return self.record.get("prompt", [])

    @property
    def prompt(self) -> str:
        """The prompt as one text; for texts the text itself."""
        return "\n".join(turn["content"] for turn in self.turns) if "prompt" in self.record else self.record["text"]

    @property
    def answers(self) -> list[str]:
        """All answers; those of a comparison with the chosen one first, those of a ranking as they stand."""
        return [self.record[key] for key in ("completion", "chosen", "rejected") if key in self.record] + self.record.get("responses", [])

    @property
    def best(self) -> str | None:
        """The answer that is held up as good: completion, chosen, or ranked first. A bad rejected answer is as it should be."""
        if "responses" in self.record:
            return min(zip(self.record["ranks"], self.record["responses"], strict=True), key=lambda pair: pair[0])[1]
        return self.record.get("completion", self.record.get("chosen"))


@dataclass
class StepCount:
    """What one step did."""

    name: str
    rows_in: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    changed: Counter[str] = field(default_factory=Counter)
    """Rows kept but changed, by what was done to them."""
    noticed: Counter[str] = field(default_factory=Counter)
    """Rows kept as they are, by what is worth knowing about them."""
    examples: dict[str, list[dict]] = field(default_factory=dict)
    """By reason, the first few: {place, text}."""

    def show(self, what: str, row: Sample, text: str) -> None:
        """Remember an example, if there is room for one."""
        shown = self.examples.setdefault(what, [])
        if len(shown) < EXAMPLES:
            shown.append({"place": row.place, "text": text})

    def to_dict(self) -> dict:
        counters = {name: dict(getattr(self, name).most_common()) for name in ("rejected", "changed", "noticed")}
        return {"name": self.name, "rows_in": self.rows_in, "kept": self.kept, **counters, "examples": self.examples}


Judge = Callable[[list[Sample], StepCount], list[str | None]]


class Tally:
    """The counts of all steps in their order, and the file of rejected rows. A context manager: closes the file."""

    def __init__(self, rejected: Path, conceal: Callable[[str], str] = lambda text: text):
        """conceal: what is done to text before a report shows it, or the rejected row is written (personal data)."""
        self.steps: dict[str, StepCount] = {}
        self.conceal = conceal
        self._file = rejected.open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def step(self, name: str) -> StepCount:
        return self.steps.setdefault(name, StepCount(name))

    def run(self, name: str, judge: Judge, rows: list[Sample]) -> list[Sample]:
        """The rows that the step keeps."""
        count = self.step(name)
        reasons = judge(rows, count)
        kept = []
        for row, reason in zip(rows, reasons, strict=True):
            if self.settle(count, row, reason):
                kept.append(row)
        return kept

    def settle(self, count: StepCount, row: Sample, reason: str | None) -> bool:
        """Count a row as kept or, with its reason, as rejected. What stands behind a colon in a reason is written, not counted by."""
        count.rows_in += 1
        if reason is None:
            count.kept += 1
            return True
        what = reason.partition(":")[0]
        count.rejected[what] += 1
        if len(count.examples.get(what, ())) < EXAMPLES:
            count.show(what, row, self.conceal(excerpt(row)))
        self.write_rejected(count.name, reason, row.file, row.line, row.record)
        return False

    def write_rejected(self, step: str, reason: str, file: str, line: int, row: object) -> None:
        entry = {"step": step, "reason": reason, "file": file, "line": line, "row": row}
        text = json.dumps(entry, ensure_ascii=False, default=str)
        # A row that could not be read may hold half characters, which UTF-8 cannot write: those stay \\u escapes.
        self._file.write((text if text.isascii() or _writable(text) else json.dumps(entry, default=str)) + "\n")


def each(judge: Callable[[Sample, StepCount], str | None]) -> Judge:
    """A step from a function of one row."""
    return lambda rows, count: [judge(row, count) for row in rows]


def batches(rows: Iterable[Sample], size: int = BATCH) -> Iterator[list[Sample]]:
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


def map_texts(record: Mapping, change: Callable[[str], str]) -> dict:
    """The record with every text of its prompt and answers changed; other columns stay as they are."""
    changed = dict(record)
    if "prompt" in record:
        changed["prompt"] = [{**turn, "content": change(turn["content"])} for turn in record["prompt"]]
    for key in ("completion", "chosen", "rejected", "text"):
        if isinstance(record.get(key), str):
            changed[key] = change(record[key])
    if "responses" in record:
        changed["responses"] = [change(text) for text in record["responses"]]
    return changed


def excerpt(row: Sample, characters: int = 160) -> str:
    """Last turn of the prompt and the best answer, cut short."""
    last = row.turns[-1]["content"] if row.turns else row.prompt
    parts = [" ".join(part.split()) for part in (last, row.best) if part]
    return " → ".join(part if len(part) <= characters else part[:characters] + "…" for part in parts)


def named_function(option: str, path: str) -> Callable:
    """The function that "module:function" names."""
    function = find_function(option, path)
    if function is None:
        raise InstructLiteError(f"{option}={path}: no such function (expected module:function)")
    return function


def _writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
