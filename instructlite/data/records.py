"""Demonstrations, comparisons, rankings, prompts and texts: read, checked, split, written.

A JSONL file is read line by line with the standard library's json, because what lies above it names no line and lets numbers,
nulls, empty answers and repeated keys through. Every fault is reported as `file:line: what is wrong (what to do)`, all at once,
before any model is loaded. Deduplicating, filtering and personal data are not done here: rows in, rows out.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import BadRecords, InstructLiteError
from .schema import KINDS, LAYOUTS, Fault, Kind, Layout, best_layout, has_controls, normalise

MAX_LINE_BYTES = 8 * 2**20
MAX_BAD_ROWS = 1000  # a file with more is the wrong file: reading stops, and memory stays bounded
STARTER = Path(__file__).parent / "starter"
_STARTER_FILES = {"texts": "prose.jsonl", "prompts": "comparisons.jsonl"}
_MAGIC = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PAR1": "a Parquet file", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip file"}
_FILE_ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zip"}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%-]+))?")

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
            records += _scan(_entries(item, report), report)
            problems += _finish(report).problems
        else:  # rows in memory may mix kinds (comparisons and rankings), so each is taken for what its own keys say
            report = FileReport("rows", kind)
            records += _scan([(number, item)], report)
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
    for record in _scan(_entries(path, report), report):
        repeats.add(record)
    report.notes += repeats.notes()
    return _finish(report)


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


def _scan(entries: Iterable[tuple[int, object]], report: FileReport) -> Iterator[dict]:
    """The good rows in normal form; faults, kind and notes go into the report."""
    entries = iter(entries)
    head = list(itertools.islice(entries, 32))  # the kind is told from several rows, since the first may be the broken one
    layout = _most_common_layout((row for _, row in head), report.kind)
    report.kind = layout.kind if layout else report.kind
    extra: dict[str, None] = {}
    cleaned = 0
    for number, row in itertools.chain(head, entries):
        try:
            if isinstance(row, Fault):
                raise row
            if not isinstance(row, Mapping):
                raise Fault("the row is not an object: expected {…} with named values")
            if layout is None:
                layout = best_layout(row)
                report.kind = layout.kind if layout else None
            if layout is None:
                known = "; ".join(map(str, LAYOUTS))
                raise Fault(f"the keys {', '.join(map(repr, list(row)[:8]))} fit no kind of record (known: {known})")
            record = normalise(row, layout)
        except Fault as fault:
            report.problems.append(f"{report.path}:{number}: {fault}")
            if len(report.problems) >= MAX_BAD_ROWS:
                report.problems.append(f"{report.path}: stopped after {MAX_BAD_ROWS} bad rows")
                return
            continue
        report.rows += 1
        cleaned += has_controls(row, layout)
        if len(extra) < 20:
            extra.update(dict.fromkeys(map(str, row.keys() - set(layout.keys))))
        yield record
    if extra:
        report.notes.append(f"extra keys kept: {', '.join(sorted(extra))}")
    if cleaned:
        report.notes.append(f"rows with control characters, which are taken out: {cleaned:,}")


def _most_common_layout(rows: Iterable[object], kind: str | None) -> Layout | None:
    layouts = Counter(best_layout(row, kind) for row in rows if isinstance(row, Mapping))
    layouts.pop(None, None)
    if layouts:
        return layouts.most_common(1)[0][0]
    return next((layout for layout in LAYOUTS if layout.kind == kind), None)


def _finish(report: FileReport) -> FileReport:
    if not report.rows and not report.problems:
        report.problems.append(f"{report.path}: the file has no rows")
    return report


def _entries(path: str | Path, report: FileReport) -> Iterator[tuple[int, object]]:
    """(line number, row or Fault) of a file, the starter data or a Hub data set; what ails the whole file goes into the report."""
    if str(path) == "starter":
        if report.kind is None:
            raise InstructLiteError('"starter" has every kind of record: say which (kind="comparisons")')
        path = STARTER / _STARTER_FILES.get(report.kind, f"{report.kind}.jsonl")
    file = Path(path)
    hub = _HUB_ID.fullmatch(str(path))
    if hub and not file.parent.is_dir() and file.suffix.lower() not in _FILE_ENDINGS:
        yield from _hub_rows(hub["id"], hub["split"] or "train")
        return
    try:
        with file.open("rb") as handle:
            magic = handle.read(4)
            handle.seek(0)
            fault = next((name for start, name in _MAGIC.items() if magic.startswith(start)), None)
            if fault:
                report.problems.append(f"{path}: is {fault}, expected UTF-8 JSONL: one JSON object a line (convert it)")
                return
            yield from _parsed_lines(handle, report)
    except OSError as error:
        report.problems.append(f"{path}: cannot be read: {error.strerror or error}")


def _hub_rows(name: str, split: str) -> Iterator[tuple[int, object]]:
    from datasets import load_dataset  # only who names a data set of the Hub waits for this import

    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InstructLiteError(f"{name}: no such file, and the data set cannot be had from the Hub: {reason}") from error
    yield from enumerate(rows, 1)


def _parsed_lines(handle: BinaryIO, report: FileReport) -> Iterator[tuple[int, object]]:
    first = True
    for number, line in _lines(handle):
        if isinstance(line, Fault):
            yield number, line
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            report.problems.append(f"{report.path}: is a JSON array, expected JSONL: one object a line (jq -c '.[]' FILE > FILE.jsonl)")
            return
        first = False
        try:
            row = _parsed(line)
        except Fault as fault:
            yield number, fault
        else:
            yield number, row


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes | Fault]]:
    """Lines end at \\n only: str.splitlines would also cut at a U+2028 inside a text."""
    number = 0
    while line := handle.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):  # skip the rest without holding it
            line = handle.readline(2**20)
        yield number, Fault(f"the line is longer than {MAX_LINE_BYTES // 2**20} MB (is it one record?)")


def _parsed(line: bytes) -> object:
    """The JSON value of one line of UTF-8.

    Raises Fault: not UTF-8, not JSON, a key given twice, or a number that is not finite.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} (0x{line[error.start]:02x})"
        raise Fault(f"{byte} is not UTF-8 (Latin-1, perhaps: save the file as UTF-8)") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        runs_out = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        near = text[max(error.pos - 40, 0) :][:60].strip()
        raise Fault(f"broken JSON at column {error.colno}: {error.msg}{' (is the line cut?)' if runs_out else ''}, at … {near!r}") from None
    except RecursionError:
        raise Fault("is nested too deep for JSON") from None
    except Fault:
        raise
    except ValueError as error:  # int() refuses numbers of more than 4,300 digits
        raise Fault(f"holds a number that cannot be read ({' '.join(str(error).split())[:60]})") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Fault(f"key {key!r} is given twice: which one counts?")
    return row


def _refuse_number(literal: str) -> float:
    raise Fault(f"holds {literal}, which is no finite number")


def _finite(literal: str) -> float:
    return value if math.isfinite(value := float(literal)) else _refuse_number(literal)


# strict=False: a raw tab or carriage return inside a text is common and harmless.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite)


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
