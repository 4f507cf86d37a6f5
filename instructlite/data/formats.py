"""The one reader of data files: every row of a file, one by one in bounded memory, as a Row or as a Fault that names its line.

    for item in rows("mine.csv"):
        if isinstance(item, Fault):
            item.problem          # 'mine.csv:7: 'completion' is empty (fill it or remove the row)'
        else:
            item.record           # the normal form of its kind (layouts.py), all other columns kept

Files are told by their content, not by their name: JSONL, a JSON array, CSV (TSV, or with semicolons), Parquet; a directory that
`datasets` saved or can load; a data set on the Hub as `owner/name` or `owner/name:split`; "starter". The format of the rows (`FORMATS`:
messages, alpaca, sharegpt, hh-rlhf, oasst-trees, likert, ...) is told from the keys of the first 32; all rows of a file are of one.

Every row of the file is accounted for: the sum of `item.rows` over all that comes out is the number of rows read. Only three layouts
have other numbers than 1 there, those that part or join rows. Lines count from 1; in CSV it is the line where the row begins, in a JSON
array the one where the object begins, in Parquet and Hub data sets the number of the row.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InstructLiteError
from .containers import Entries, entries, files_in
from .layouts import FORMATS, LAYOUTS, Layout, best_layout, check, join, normalise
from .schema import Fault, has_controls

MAX_JOINED = 1000  # rows that become one ranking or tree; more is a file that is not what it seems


@dataclass
class Row:
    """One record and where it came from."""

    file: str
    line: int
    kind: str
    """demonstrations, comparisons, rankings, prompts or texts."""
    format: str
    """The name of the layout its keys have, one of FORMATS."""
    record: dict
    """The normal form of its kind, and every other column as it was."""
    raw: object
    """The row as it was read; a list of rows where several became one record."""
    rows: int = 1
    """Rows of the file it accounts for: K for K that were joined, 0 for each record of a tree but the first."""
    cleaned: bool = False
    """True if control characters (NUL and the like) were taken out of its texts."""


def rows(source: str | Path, kind: str | None = None, format: str | None = None) -> Iterator[Row | Fault]:
    """Every row of a file, directory, Hub data set or "starter" (needs `kind`). `kind` and `format` None: told from the keys.

    A fault of the whole file (no rows, cannot be read, UTF-16, ...) is a Fault with line 0 and `rows` 0.
    """
    if format not in (None, *FORMATS):
        raise InstructLiteError(f"'{format}' is no format of rows: {', '.join(FORMATS)}")
    for part in files_in(source) or ():  # of a directory each file has its own format
        yield from rows(part, kind, format)
    if files_in(source):
        return
    file, empty = str(source), True
    for item in _converted(file, entries(source, kind), kind, format):
        empty = False
        yield item
    if empty:
        yield Fault("the file has no rows").at(file, 0, rows=0)


def rows_in_memory(items: Iterable[object], kind: str | None = None, start: int = 1) -> Iterator[Row | Fault]:
    """The same for rows that are in memory already, numbered from `start`; each is taken for what its own keys say."""
    for number, item in enumerate(items, start):
        yield from _converted("rows", iter([(number, item)]), kind, None)


def _converted(file: str, read: Entries, kind: str | None, format: str | None) -> Iterator[Row | Fault]:
    head = list(itertools.islice(read, 32))  # the kind is told from several rows, since the first may be the broken one
    layout = _layout_of((row for _, row in head), kind, format)
    told = False  # the kinds there are, once
    held: list[tuple[int, Mapping]] = []  # rows that a layout with `join` reads together
    for number, row in itertools.chain(head, read):
        try:
            row = _object(row)
            if layout is None:
                layout = best_layout(row, kind)
            if layout is None:
                known = "" if told else f" (known: {'; '.join(dict.fromkeys(map(str, LAYOUTS)))})"
                told = True
                raise Fault(f"the keys {', '.join(map(repr, list(row)[:8]))} fit no kind of record{known}")
            suspect = check(row, layout)
            if not layout.join:
                cleaned = suspect and _cleaned([row], layout)
                for place, record in enumerate(normalise(row, layout)):
                    yield Row(file, number, layout.kind, layout.name, record, row, int(place == 0), cleaned)
                continue
        except Fault as fault:
            yield fault.at(file, number, row if fault.raw is None else fault.raw, rows=int(number > 0))
            continue
        if held and (layout.join(held[0][1]) != layout.join(row) or len(held) >= MAX_JOINED):
            yield from _joined(file, held, layout)
            held = []
        held.append((number, row))
    if held and layout:
        yield from _joined(file, held, layout)


def _object(row: object) -> Mapping:
    if isinstance(row, Fault):
        raise row
    if not isinstance(row, Mapping):
        raise Fault("the row is not an object: expected {…} with named values")
    return row


def _joined(file: str, held: list[tuple[int, Mapping]], layout: Layout) -> Iterator[Row | Fault]:
    first, members = held[0][0], [row for _, row in held]
    try:
        records = join(members, layout)
    except Fault as fault:
        lines = f"with the rows down to line {held[-1][0]}: " if len(held) > 1 else ""
        yield Fault(f"{lines}{fault}").at(file, first, members, rows=len(members))
        return
    for place, record in enumerate(records):
        yield Row(file, first, layout.kind, layout.name, record, members, 0 if place else len(members), _cleaned(members, layout))


def _cleaned(members: list[Mapping], layout: Layout) -> bool:
    return has_controls([row.get(key) for row in members for key in (*layout.keys, *layout.optional)])


def _layout_of(head: Iterable[object], kind: str | None, format: str | None) -> Layout | None:
    named = [layout for layout in LAYOUTS if kind in (None, layout.kind) and format in (None, layout.name)]
    if format:
        if not named:
            raise InstructLiteError(f"the format '{format}' has no {kind}")
        return named[0]
    fitting = Counter(best_layout(row, kind) for row in head if isinstance(row, Mapping))
    fitting.pop(None, None)
    if fitting:
        return fitting.most_common(1)[0][0]
    return named[0] if kind else None
