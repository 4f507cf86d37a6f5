"""What data files are made of - JSONL, a JSON array, CSV, Parquet, a directory or Hub data set - read row by row in bounded memory.

A file is told by its content, not by its name. Here a row is whatever was parsed; formats.py says whether it is a record. JSON is
parsed by the standard library, because what lies above it names no line and lets repeated keys and NaN through.
"""

import base64
import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InstructLiteError
from .layouts import LAYOUTS
from .schema import Fault

MAX_LINE_BYTES = 8 * 2**20
STARTER = Path(__file__).parent / "starter"
_STARTER_FILES = {"texts": "prose.jsonl", "prompts": "comparisons.jsonl"}
_MAGIC = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip file"}
_FILE_ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zip"}
_READABLE = {".jsonl", ".csv", ".tsv", ".parquet"}
_SAVED = ("state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%-]+))?")
# What a CSV cell of these columns holds is JSON, since CSV has neither lists nor numbers.
_JSON_COLUMNS = {"messages", "conversations", "responses", "ranks", "ranking", "scores", "score", "history"}
_TEXT_OR_JSON_COLUMNS = {"prompt", "chosen", "rejected", "completion"}

Entries = Iterator[tuple[int, object]]
"""(line number, the parsed row or a Fault)."""


def entries(source: str | Path, kind: str | None) -> Entries:
    """The rows of a file, directory, Hub data set or "starter" as they are, or the Fault that is in their place."""
    if str(source) == "starter":
        if kind is None:
            raise InstructLiteError('"starter" has every kind of record: say which (kind="comparisons")')
        source = STARTER / _STARTER_FILES.get(kind, f"{kind}.jsonl")
    path = Path(source)
    hub = _HUB_ID.fullmatch(str(source))
    directory, _, split = str(source).rpartition(":")
    if path.is_dir() or (directory and Path(directory).is_dir() and not path.exists()):
        yield from _saved(*((path, "train") if path.is_dir() else (Path(directory), split)))
    elif hub and not path.parent.is_dir() and path.suffix.lower() not in _FILE_ENDINGS:
        yield from _hub(hub["id"], hub["split"] or "train")
    else:
        try:
            with path.open("rb") as handle:
                yield from _reader_for(handle, path)(handle)
        except OSError as error:
            yield 0, Fault(f"cannot be read: {error.strerror or error}")


def files_in(source: str | Path) -> list[Path] | None:
    """The data files of a directory (of one split, for `directory:split`), or None for what is no directory of files.

    Without a split those of train, if some are named so: test files are not to be trained on by chance.
    """
    path, split = Path(source), None
    if not path.is_dir():
        directory, _, split = str(source).rpartition(":")
        path = Path(directory)
        if not directory or not path.is_dir() or Path(source).exists():
            return None
    if any((path / name).is_file() for name in _SAVED):
        return None
    files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if _holds_rows(file))
    of_split = [file for file in files if (split or "train") in str(file.relative_to(path))]
    return of_split if split or of_split else files


def _holds_rows(file: Path) -> bool:
    """By its name; a .json file beside data is more often about them (dataset_info.json) than of them."""
    if file.suffix.lower() != ".json":
        return file.suffix.lower() in _READABLE and file.is_file() and not file.name.startswith(".")
    with file.open("rb") as handle:
        return handle.read(100).lstrip().startswith(b"[")


def _reader_for(handle: BinaryIO, path: Path) -> Callable[[BinaryIO], Entries]:
    head = handle.read(2**16)
    handle.seek(0)
    if fault := next((name for start, name in _MAGIC.items() if head.startswith(start)), None):
        return lambda _: iter([(0, Fault(f"is {fault}, expected UTF-8 text or Parquet (convert it)"))])
    if head.startswith(b"PAR1"):
        return _parquet
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"\[\s*(\{|\]|$)", start):
        return _json_array
    if re.match(rb"\{[ \t\r]*\n\s*[^{\s]", start):
        fault = Fault("is JSON over several lines, expected one object a line, or an array (jq -c . FILE > FILE.jsonl)")
        return lambda _: iter([(0, fault)])
    header = start.partition(b"\n")[0].decode("utf-8", "replace").strip()
    delimiter = _delimiter(header)
    if path.suffix.lower() in (".csv", ".tsv") or (delimiter and not start.startswith((b"{", b"["))):
        return lambda opened: _csv(opened, delimiter or ("\t" if path.suffix.lower() == ".tsv" else ","))
    return _jsonl


# --- JSONL and JSON arrays ---


def _jsonl(handle: BinaryIO) -> Entries:
    for number, line in _lines(handle):
        if isinstance(line, Fault):
            yield number, line
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _parsed_or_fault(line)


def _lines(handle: BinaryIO) -> Iterator[tuple[int, bytes | Fault]]:
    """Lines end at \\n only: str.splitlines would also cut at a U+2028 inside a text."""
    number = 0
    while line := handle.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        fault = _too_long("line")
        fault.raw = _excerpt(line)
        while line and not line.endswith(b"\n"):  # skip the rest without holding it
            line = handle.readline(2**20)
        yield number, fault


# A string, or a character that matters. The quote that ends the string is optional, so that one whose end is not in sight yet is
# found at once (group 1 is empty) and not by trying every shorter one.
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[{}\[\],]', re.DOTALL)
_OPENS = {b"}": b"{", b"]": b"["}


def _json_array(handle: BinaryIO) -> Entries:
    """The elements of one array, each parsed by itself, so that one is held at a time and every fault has a line.

    An element whose brackets do not match hides where it ends: it and the rest of the array are one Fault.
    """
    line, begin, scan, too_long = 1, 0, 0, 0  # too_long: the line where an element that is begins
    buffer, brackets = b"", [b"?"]  # before the array's own bracket
    while True:
        token = _STRUCTURE.search(buffer, scan)
        if token is None or token[1] == b"":
            scan = token.start() if token else len(buffer)
            if len(buffer) - scan > MAX_LINE_BYTES or not (more := handle.read(2**20)):
                break
            if scan - begin > MAX_LINE_BYTES:  # its lines count, its text is let go
                too_long = too_long or line + _lead(buffer[begin:])
                line, begin = line + buffer.count(b"\n", begin, scan), scan
            buffer, scan, begin = buffer[begin:] + more, scan - begin, 0
            continue
        mark, scan = token[0], token.end()
        if mark in (b"{", b"["):
            brackets.append(mark)
            if len(brackets) == 2:
                line, begin = line + buffer.count(b"\n", begin, scan), scan
        elif mark in _OPENS and brackets.pop() != _OPENS[mark]:
            break
        elif (mark == b"," and len(brackets) == 2) or len(brackets) == 1:
            text = buffer[begin : token.start()]
            last = mark == b"]"
            if not last or text.strip() or too_long:
                yield too_long or line + _lead(text), _too_long("object") if too_long else _parsed_or_fault(text)
            line, begin, too_long = line + text.count(b"\n"), scan, 0
            if last:
                yield from _after(handle, buffer[scan:], line)
                return
    rest = buffer[begin:]
    fault = Fault("the array is broken here: brackets or quotes that do not match, and the rest cannot be told apart (mend it)")
    fault.raw = _excerpt(rest)
    yield too_long or line + _lead(rest), fault


def _after(handle: BinaryIO, rest: bytes, line: int) -> Entries:
    while not rest.strip() and (more := handle.read(2**20)):
        line, rest = line + rest.count(b"\n"), more
    if rest.strip():
        fault = Fault("the array has ended, and more follows (one array, or one object a line)")
        fault.raw = _excerpt(rest)
        yield line + _lead(rest), fault


def _lead(text: bytes) -> int:
    """Line breaks before the first thing that can be seen."""
    return text[: len(text) - len(text.lstrip())].count(b"\n")


def _excerpt(text: bytes) -> str:
    return text[:1000].decode("utf-8", "backslashreplace")


def _too_long(what: str) -> Fault:
    return Fault(f"the {what} is longer than {MAX_LINE_BYTES // 2**20} MB (is it one record?)")


def _parsed_or_fault(text: bytes) -> object:
    try:
        return _parsed(text)
    except Fault as fault:
        fault.raw = text.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
        return fault


def _parsed(line: bytes) -> object:
    """The JSON value of one line of UTF-8.

    Raises Fault: not UTF-8, not JSON, a key given twice, or a number that is not finite.
    """
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} (0x{line[error.start]:02x})"
        raise Fault(f"{byte} is not UTF-8 (Latin-1, perhaps: save the file as UTF-8)") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        runs_out = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        place = f"column {error.colno}" + (f" of its line {error.lineno}" if error.lineno > 1 else "")
        near = text[max(error.pos - 40, 0) :][:60].strip()
        raise Fault(f"broken JSON at {place}: {error.msg}{' (is the line cut?)' if runs_out else ''}, at … {near!r}") from None
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


# --- CSV, Parquet, what datasets loads ---


def _delimiter(header: str) -> str | None:
    """The one that cuts the header into the keys of some layout."""
    fitting = [mark for mark in ",;\t" if any(set(layout.keys) <= set(_cells(header, mark)) for layout in LAYOUTS)]
    return fitting[0] if fitting else None


def _cells(header: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"') for cell in header.split(delimiter)]


def _csv(handle: BinaryIO, delimiter: str) -> Entries:
    """A header, then rows. A line may break inside quotes; bytes that are not UTF-8 come through as surrogates and are named then."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(handle, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = _header(cells)
                    continue
                yield number, _csv_row(header, cells)
            except csv.Error as error:
                yield number, Fault(f"broken CSV: {error} (a quote that is not closed or not doubled?)")
            except Fault as fault:
                if header is None:
                    yield 0, fault
                    return
                fault.raw = dict(itertools.zip_longest(header, cells[: len(header)]))
                yield number, fault


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise Fault(f"the column {twice!r} is there twice (name the columns in the first line, each once)")
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict:
    if len(cells) != len(header):
        raise Fault(f"has {len(cells)} cells, and the header {len(header)} (a text with separators or line breaks needs quotes)")
    row: dict = {}
    for name, cell in zip(header, cells, strict=True):
        if bad := next((char for char in cell if "\udc80" <= char <= "\udcff"), None):
            raise Fault(f"'{name}': byte 0x{ord(bad) - 0xDC00:02x} is not UTF-8 (Latin-1, perhaps: save the file as UTF-8)")
        is_json = name in _JSON_COLUMNS or (name in _TEXT_OR_JSON_COLUMNS and cell.startswith("[{"))
        try:
            row[name] = _parsed(cell.encode()) if is_json else cell
        except Fault as fault:
            raise Fault(f"'{name}': {fault}") from None
    return row


def _parquet(handle: BinaryIO) -> Entries:
    import pyarrow  # comes with datasets; half a second that JSONL does not wait for
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(handle).iter_batches(batch_size=500):
            for row in batch.to_pylist():
                number += 1
                yield number, _plain(row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        yield number + 1 if number else 0, Fault(f"the Parquet file is damaged{' from here on' if number else ''}: {reason}")


def _plain(value: Any) -> Any:
    """Arrow's values as JSON has them: times in ISO 8601, bytes in base64, NaN - pandas' gap - as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _saved(path: Path, split: str) -> Entries:
    """What `Dataset.save_to_disk` wrote."""
    if not any((path / name).is_file() for name in _SAVED):
        yield 0, Fault("cannot be read: is a directory without data")
        return
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        yield 0, Fault(f"cannot be read: {' '.join(str(error).split())[:200]}")
        return
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            yield 0, Fault(f"has no split '{split}', but {', '.join(loaded)} (name one: {path}:{next(iter(loaded), 'train')})")
            return
        loaded = loaded[split]
    yield from ((number, _plain(row)) for number, row in enumerate(loaded, 1))


def _hub(name: str, split: str) -> Entries:
    from datasets import load_dataset  # only who names a data set waits for this import
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InstructLiteError(f"{name}: no such file, and the data set cannot be had from the Hub: {reason}") from error
    yield from ((number, _plain(row)) for number, row in enumerate(loaded, 1))
