"""Demonstrations, comparisons, rankings, prompts and texts: whole files for training, split, written.

formats.py reads and checks; here nothing is returned if one row is bad, so that nothing is trained on what is left of a file.
Deduplicating, filtering and personal data are not done here: rows in, rows out.
"""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import BadRecords, InstructLiteError
from .formats import rows, rows_in_memory
from .schema import KINDS, Fault, Kind

MAX_BAD_ROWS = 1000  # a file with more is the wrong file: reading stops, and memory stays bounded

Source = str | Path | Iterable


def read_records(source: Source, kind: Kind | None = None) -> list[dict]:
    """Every record of `source` in the normal form of its kind, other columns kept; nothing at all if one row is bad.

    `source`: whatever `formats.rows` reads (files, directories, data sets of the Hub, "starter"), rows, or a list of these. `kind` None:
    told from the keys, for each file by itself. The normal forms stand in layouts.py.

    Raises BadRecords with all problems.
    """
    if kind not in (None, *KINDS):
        raise InstructLiteError(f"'{kind}' is no kind of record: {', '.join(KINDS)}")
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    records: list[dict] = []
    problems: list[str] = [] if sources else ["rows: there are none"]
    for number, item in enumerate(sources, 1):
        in_file = isinstance(item, (str, Path))  # rows in memory may mix kinds, so each is taken for what its own keys say
        file_problems: list[str] = []
        for row in rows(item, kind) if in_file else rows_in_memory([item], kind, number):
            if not isinstance(row, Fault):
                records.append(row.record)
                continue
            file_problems.append(row.problem)
            if len(file_problems) == MAX_BAD_ROWS:
                file_problems.append(f"{item}: stopped after {MAX_BAD_ROWS} bad rows")
                break
        problems += file_problems
    if problems:
        raise BadRecords(problems)
    return records


def read_ptx(source: Source) -> list[dict]:
    """What PPO-ptx takes: texts or demonstrations, each file told by its own keys; "starter" is its prose."""
    rows = read_records(source, "texts" if source == "starter" else None)
    if other := next((row for row in rows if "text" not in row and "completion" not in row), None):
        raise InstructLiteError(f"ptx_data: texts or demonstrations are wanted, and one row has the keys {', '.join(other)}")
    return rows


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


def characters(prompt: Sequence[Mapping[str, str]]) -> int:
    """Of all turns of a conversation."""
    return sum(len(turn["content"]) for turn in prompt)


def opening(record: Mapping) -> str:
    """What tells one prompt from another: the first user turn, or the text, case and white space aside."""
    first = next((turn["content"] for turn in record["prompt"] if turn["role"] == "user"), "") if "prompt" in record else record["text"]
    return " ".join(first.casefold().split())
