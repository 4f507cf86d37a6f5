"""Demonstrations, comparisons, rankings, prompts and texts: read, checked, split, written.

A JSONL file is read line by line with the standard library's json, because what lies above it names no line and lets numbers,
nulls, empty answers and repeated keys through. Every fault is reported as `file:line: what is wrong (what to do)`, all at once,
before any model is loaded. Deduplicating, filtering and personal data are not done here: rows in, rows out.
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadRecords, InstructLiteError
from .formats import Fault, Row, rows, rows_in_memory
from .schema import KINDS, Kind

MAX_BAD_ROWS = 1000  # a file with more is the wrong file: reading stops, and memory stays bounded

NORMAL_KEYS = {
    "demonstrations": {"prompt", "completion"},
    "comparisons": {"prompt", "chosen", "rejected"},
    "rankings": {"prompt", "responses", "ranks"},
    "prompts": {"prompt"},
    "texts": {"text"},
}

Source = str | Path | Iterable


@dataclass
class FileReport:
    """What `check_file` found; printed, it is what `instructlite data check` shows."""

    path: str
    kind: str | None = None
    """None: no row's keys fit any kind."""
    rows: int = 0
    """Rows without a fault."""
    problems: list[str] = field(default_factory=list)
    """`file:line: what`, one for each bad row, or `file: what`."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing but stops nothing: extra keys, repeated rows."""

    def __str__(self) -> str:
        found = f"{len(self.problems):,} problem{'s' if len(self.problems) > 1 else ''}" if self.problems else "no problems"
        lines = [f"{self.path}: {self.rows:,} {self.kind or 'rows'}, {found}"]
        lines += str(BadRecords(self.problems)).splitlines() if self.problems else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def read_records(source: Source, kind: Kind | None = None) -> list[dict]:
    """Every record of `source` in the normal form of its kind, other columns kept; nothing at all if one row is bad.

    `source`: the path of a JSONL file, "starter" (needs `kind`), a data set on the Hub (`owner/name`, `owner/name:split`), rows,
    or a list of these. `kind` None: told from the keys, for each file by itself.

    The normal forms: demonstration {prompt, completion}, comparison {prompt, chosen, rejected}, ranking {prompt, responses, ranks;
    lowest best}, prompt {prompt}, text {text}. A prompt is a list of messages that ends with the user; all else is text.

    Raises BadRecords with all problems.
    """
    if kind not in (None, *KINDS):
        raise InstructLiteError(f"'{kind}' is no kind of record: {', '.join(KINDS)}")
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    records: list[dict] = []
    problems: list[str] = [] if sources else ["rows: there are none"]
    for number, item in enumerate(sources, 1):
        if isinstance(item, (str, Path)):
            report = FileReport(str(item), kind)
            records += _scan(rows(item, kind), report)
            problems += report.problems
        else:  # rows in memory may mix kinds (comparisons and rankings), so each is taken for what its own keys say
            report = FileReport("rows", kind)
            records += _scan(rows_in_memory([item], kind, number), report)
            problems += report.problems
    if problems:
        raise BadRecords(problems)
    return records


def read_ptx(source: Source) -> list[dict]:
    """What PPO-ptx takes: texts or demonstrations, each file told by its own keys; "starter" is its prose."""
    rows = read_records(source, "texts" if source == "starter" else None)
    if other := next((row for row in rows if "text" not in row and "completion" not in row), None):
        raise InstructLiteError(f"ptx_data: texts or demonstrations are wanted, and one row has the keys {', '.join(other)}")
    return rows


def check_file(path: str | Path, kind: Kind | None = None) -> FileReport:
    """Read a JSONL file once, in bounded memory, and report its kind, rows, problems and notes."""
    report = FileReport(str(path), kind)
    repeats = _Repeats()
    for record in _scan(rows(path, kind), report):
        repeats.add(record)
    report.notes += repeats.notes()
    return report


def as_groups(records: Iterable[Mapping]) -> list[dict]:
    """Comparisons and rankings as one: {prompt, responses, ranks}, the lowest rank best, ties allowed.

    A comparison is a ranking of K = 2. One group is one element of a batch, so that the pairs of a prompt are never parted.
    """
    groups = []
    for number, record in enumerate(records, 1):
        if "responses" in record and "ranks" in record:
            group = {"responses": list(record["responses"]), "ranks": list(record["ranks"])}
        elif "chosen" in record and "rejected" in record:
            group = {"responses": [record["chosen"], record["rejected"]], "ranks": [0, 1]}
        else:
            raise InstructLiteError(f"record {number} is neither a comparison nor a ranking (found: {', '.join(record)})")
        groups.append({"prompt": record["prompt"], **group})
    return groups


def split_by_prompt(records: list[dict], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[dict]]:
    """Parts of the records such that no prompt is in two of them.

    Rows whose conversations open alike (first user turn, case and white space aside) stay together, so a part may be some rows
    off. Fractions that sum to less than 1 leave rows out; an int is a number of rows. The same rows and seed always give the same
    parts, whatever the order of the rows.
    """
    sizes = {name: share if isinstance(share, int) else share * len(records) for name, share in fractions.items()}
    if min(sizes.values(), default=0) < 0 or sum(sizes.values()) > len(records) + 1e-6:
        raise InstructLiteError(f"the parts {dict(fractions)} do not fit into {len(records)} rows")
    openings = [opening(record) for record in records]
    rows = Counter(openings)
    order = sorted(rows)
    random.Random(seed).shuffle(order)
    ends = list(itertools.accumulate(sizes.values()))
    part_of: dict[str, str] = {}
    taken = 0
    for first in order:
        part = next((name for name, end in zip(sizes, ends, strict=True) if taken < round(end)), None)
        if part is None:
            break
        part_of[first] = part
        taken += rows[first]
    parts = {name: [record for record, first in zip(records, openings, strict=True) if part_of.get(first) == name] for name in sizes}
    for name, part in parts.items():
        if sizes[name] > 0 and not part:
            raise InstructLiteError(f"nothing is left for '{name}': {len(records)} rows with {len(rows)} different prompts are too few")
    return parts


def write_records(path: str | Path, records: Iterable[Mapping]) -> None:
    """One JSON object a line, UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def data_hash(records: Iterable[Mapping]) -> str:
    """sha256 over the records as canonical JSON: the order of rows counts, that of keys does not."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()


def _scan(items: Iterable[Row | Fault], report: FileReport) -> Iterator[dict]:
    """The good rows in normal form; faults, kind and notes go into the report."""
    extra: dict[str, None] = {}
    cleaned = 0
    for item in items:
        if isinstance(item, Fault):
            report.problems.append(item.problem)
            if len(report.problems) >= MAX_BAD_ROWS:
                report.problems.append(f"{report.path}: stopped after {MAX_BAD_ROWS} bad rows")
                return
            continue
        report.kind = item.kind
        report.rows += 1
        cleaned += item.cleaned
        if len(extra) < 20:
            extra.update(dict.fromkeys(map(str, item.record.keys() - NORMAL_KEYS[item.kind])))
        yield item.record
    if extra:
        report.notes.append(f"extra keys kept: {', '.join(sorted(extra))}")
    if cleaned:
        report.notes.append(f"rows with control characters, which are taken out: {cleaned:,}")


class _Repeats:
    """Counts copied rows, and pairs that prefer the other way round, among the first million."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.copies = self.contradictions = 0

    def add(self, record: Mapping) -> None:
        if len(self.seen) >= 1_000_000:
            return
        prompt, pair = record.get("prompt"), (record.get("chosen"), record.get("rejected"))
        others = [record.get(key) for key in ("completion", "responses", "ranks", "text")]
        key, swapped = (hash(json.dumps([prompt, sides, others])) for sides in (pair, pair[::-1]))
        self.copies += key in self.seen
        self.contradictions += swapped in self.seen and swapped != key
        self.seen.add(key)

    def notes(self) -> list[str]:
        counts = {"rows that repeat an earlier one": self.copies, "pairs that contradict an earlier one": self.contradictions}
        return [f"{what}: {count:,}" for what, count in counts.items() if count]


def opening(record: Mapping) -> str:
    """What tells one prompt from another: the first user turn, or the text, case and white space aside."""
    first = next((turn["content"] for turn in record["prompt"] if turn["role"] == "user"), "") if "prompt" in record else record["text"]
    return " ".join(first.casefold().split())
