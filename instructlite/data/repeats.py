"""Rows seen before, in 16 bytes each: an open-addressing table of 64-bit hashes, since a set of Python numbers takes five times as much.

It tells exact copies (white space and case count); near-duplicates are prepare's.
"""

from array import array
from collections.abc import Mapping

from .schema import annotator_of

_MASK = 2**64 - 1
_LINE_BITS, _FILE_BITS = 36, 12  # and 16 bits for the hash of the order in which the answers stand


class Table:
    """64-bit key -> 64-bit value, for as many as `most` keys; later ones are not kept."""

    def __init__(self, most: int = 10_000_000):
        self.most = most
        self.count = 0
        self._keys, self._values = _zeros(2**12), _zeros(2**12)

    def get(self, key: int) -> int | None:
        place = self._place(key & _MASK or 1)
        return self._values[place] if self._keys[place] else None

    def add(self, key: int, value: int) -> None:
        """Keep the value of a new key; the first value of a key stays."""
        key = key & _MASK or 1  # 0 marks an empty place
        place = self._place(key)
        if self._keys[place] or self.count >= self.most:
            return
        self._keys[place], self._values[place] = key, value
        self.count += 1
        if self.count > 0.6 * len(self._keys):
            self._grow()

    def _place(self, key: int) -> int:
        keys = self._keys
        last = len(keys) - 1
        place = key & last
        while keys[place] not in (0, key):
            place = (place + 1) & last
        return place

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._keys, self._values = _zeros(2 * len(keys)), _zeros(2 * len(keys))
        for key, value in zip(keys, values, strict=True):
            if key:
                place = self._place(key)
                self._keys[place], self._values[place] = key, value


class Repeats:
    """Copied rows, and judgements that contradict an earlier one of the same annotator, with the place of the earlier one.

    Two annotators who judge the same are two rows, and two who judge otherwise disagree, which is no fault.
    """

    def __init__(self) -> None:
        self.files: list[str] = []
        self._table = Table()

    def seen(self, record: Mapping, kind: str, file: str, line: int) -> tuple[str, str] | None:
        """("repeats" or "contradicts", file:line of the earlier row), or None for a row that is new."""
        what, order = _judged(record, kind)
        key = hash((*what, annotator_of(record)))
        order = hash(order) & 0xFFFF
        earlier = self._table.get(key)
        if earlier is None:
            if file not in self.files[-1:] and len(self.files) < 2**_FILE_BITS:
                self.files.append(file)
            self._table.add(key, (order << _FILE_BITS | len(self.files) - 1) << _LINE_BITS | min(line, 2**_LINE_BITS - 1))
            return None
        place = f"{self.files[(earlier >> _LINE_BITS) & (2**_FILE_BITS - 1)]}:{earlier & (2**_LINE_BITS - 1)}"
        return "repeats" if earlier >> (_LINE_BITS + _FILE_BITS) == order else "contradicts", place

    @property
    def full(self) -> bool:
        return self._table.count >= self._table.most


def prompt_key(record: Mapping, kind: str) -> tuple[str, ...]:
    """Roles and contents of the prompt's turns; for texts the text."""
    if kind == "texts":
        return (record["text"],)
    return tuple(part for turn in record["prompt"] for part in (turn["role"], turn["content"]))


def _judged(record: Mapping, kind: str) -> tuple[tuple, tuple]:
    """What the row is about, and what it says of it."""
    prompt = prompt_key(record, kind)
    if kind == "comparisons":
        pair = (record["chosen"], record["rejected"])
        return (prompt, *sorted(pair)), pair
    if kind == "rankings":
        ranks = record["ranks"]
        places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
        order = sorted((response, places[rank]) for response, rank in zip(record["responses"], ranks, strict=True))
        return (prompt, *(response for response, _ in order)), tuple(place for _, place in order)
    return (prompt, record["completion"] if kind == "demonstrations" else None), ()


def _zeros(length: int) -> array:
    return array("Q", bytes(8 * length))
