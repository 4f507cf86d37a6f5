"""What the values of one record must look like: texts, messages, prompts, answers, numbers. layouts.py puts rows together from them.

Every check looks at one value alone and raises a Fault that says what is wrong and what to do; formats.py adds file and line.
Nothing is coerced: a number where a text belongs is a fault.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

Kind = Literal["demonstrations", "comparisons", "rankings", "prompts", "texts"]
KINDS: tuple[str, ...] = get_args(Kind)
ROLES = ("system", "user", "assistant")
MAX_DEPTH = 50
ANNOTATOR_KEYS = ("annotator", "annotator_id", "labeler", "labeller", "worker", "worker_id")

_FOREIGN_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_TYPE_NAMES = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object", bytes: "bytes"}
_TYPE_NAMES |= dict.fromkeys((int, float), "a number")
# Tab, line feed and carriage return are text; the other C0 controls and DEL are debris of some conversion.
_CONTROLS = {code: None for code in (*range(32), 127) if code not in (9, 10, 13)}
_CONTROL = re.compile("[" + re.escape("".join(map(chr, _CONTROLS))) + "]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Fault(ValueError):
    """What is wrong with one row, and what to do about it; with the row's place, once a reader has put it there."""

    file: str = ""
    line: int = 0
    """0: the file as a whole."""
    rows: int = 1
    """Rows of the file that are lost with it: 0 for a fault of the whole file, K for K rows that were to become one record."""
    raw: object = None
    """The row as it was read, or as much of its text as can be kept."""

    def at(self, file: str, line: int, raw: object = None, rows: int = 1) -> "Fault":
        self.file, self.line, self.raw, self.rows = file, line, raw, rows
        return self

    @property
    def problem(self) -> str:
        """`file:line: what`, or `file: what`."""
        return f"{self.file}:{self.line}: {self}" if self.line else f"{self.file}: {self}"


def nearest(key: str, candidates: Iterable) -> str | None:
    """The candidate that was probably meant to be `key`. 0.81 takes 'promt' for 'prompt' but leaves 'prompt_id' alone."""
    lowered = {name.lower(): name for name in candidates if isinstance(name, str)}
    close = difflib.get_close_matches(key, lowered, n=1, cutoff=0.81)
    return lowered[close[0]] if close else None


def found(row: Mapping) -> str:
    keys = [printable(key) for key in list(row)[:8]]
    return f"found: {', '.join(keys) or 'no keys'}{', …' if len(row) > 8 else ''}"


def printable(key: object) -> str:
    """A key as an error message can show it on any terminal: short, control and half characters escaped."""
    return repr(str(key))[1:-1][:40]


def texts_in(value: object) -> Iterator[str]:
    """Every text inside a JSON value, keys too. A loop, not a recursion: the nesting is the user's."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise Fault(f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            stack.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            stack.extend((part, depth + 1) for part in item)


def expect(value: object, kind: type, where: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise Fault(f"{where} is {_TYPE_NAMES.get(type(value), type(value).__name__)}, expected {expected}")


def text(value: object, where: str, expected: str = "a text") -> str:
    expect(value, str, where, expected)
    cleaned = value.translate(_CONTROLS) if _CONTROL.search(value) else value  # the search is much the faster of the two
    if not cleaned.strip():
        raise Fault(f"{where} is empty (fill it or remove the row)")
    return cleaned


def messages(value: object, where: str, last: str, keys: tuple[str, str] = ("role", "content"), roles: Mapping | None = None) -> list[dict]:
    """A system message or none, then user and assistant in turn, the `last` one of that role. Turns are counted from 1.

    `keys`, `roles`: other names of 'role' and 'content', and of the roles, as ShareGPT has them.
    """
    expect(value, list, where, "a list of messages")
    turns: list[dict] = []
    for number, message in enumerate(value, 1):
        turn = f"{where}, turn {number}"
        expect(message, Mapping, turn, f"an object with '{keys[0]}' and '{keys[1]}'")
        for key in keys:
            if key not in message:
                raise Fault(f"{turn}: key '{key}' is missing ({found(message)})")
        role = message[keys[0]]
        role = roles.get(role, role) if roles and isinstance(role, str) else role
        _check_role(role, turn, turns)
        turns.append({"role": role, "content": text(message[keys[1]], f"{turn}: '{keys[1]}'")})
    if not turns:
        raise Fault(f"{where} has no messages (fill it or remove the row)")
    if turns[-1]["role"] != last:
        raise Fault(f"{where} ends with turn {len(turns)} of the {turns[-1]['role']}, expected one of the {last}")
    return turns


def _check_role(role: object, turn: str, before: list[dict]) -> None:
    if role not in ROLES:
        name = str(role).lower()
        meant = _FOREIGN_ROLES.get(name) or nearest(name, ROLES)
        hint = f"did you mean '{meant}'?" if meant else f"known: {', '.join(ROLES)}"
        raise Fault(f"{turn}: unknown role '{printable(role)}' ({hint})")
    previous = before[-1]["role"] if before else None
    due = "assistant" if previous == "user" else "user"
    if role != due and not (role == "system" and previous is None):
        raise Fault(f"{turn}: {role} {f'follows {previous}' if previous else 'comes first'}, expected {due}")


def prompt_of(row: Mapping) -> list[dict]:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return messages(prompt, "'prompt'", last="user")
    return [{"role": "user", "content": text(prompt, "'prompt'", "a text or a list of messages")}]


def answer(value: object, where: str) -> str:
    if not isinstance(value, list):
        return text(value, where, "a text or a list with one message of the assistant")
    if len(value) != 1:
        raise Fault(f"{where} has {len(value)} messages, expected one of the assistant")
    message = value[0]
    expect(message, Mapping, f"{where}, turn 1", "an object with 'role' and 'content'")
    if message.get("role") != "assistant" or "content" not in message:
        raise Fault(f"{where}, turn 1: expected the role 'assistant' and 'content'")
    return text(message["content"], f"{where}, turn 1: 'content'")


def number(value: object, where: str) -> float:
    # An int of hundreds of digits is not finite either: as a float it would overflow.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -sys.float_info.max <= value <= sys.float_info.max:
        raise Fault(f"{where} is {_TYPE_NAMES.get(type(value), 'no number')} ({printable(value)}), expected a finite number")
    return value


def check_characters(row: Mapping) -> bool:
    """True if there may be control characters in the row.

    Raises Fault if a surrogate stands alone anywhere in it, which can neither be tokenized nor written as UTF-8, or if it is nested
    without end. Looking at each text in Python takes five times as long as writing the whole row in C, which tells the good rows.
    """
    try:
        written = json.dumps(row, ensure_ascii=False)
        written.encode()
        if written.count("[") + written.count("{") <= MAX_DEPTH:
            return "\\u00" in written or "\x7f" in written
    except (ValueError, TypeError, RecursionError):  # UnicodeEncodeError is a ValueError
        pass
    for key, value in row.items():
        if any(_SURROGATE.search(part) for part in texts_in([key, value])):
            raise Fault(f"'{printable(key)}' holds half of a character, such as \\ud800 alone (write the whole surrogate pair)")
    return True


def has_controls(value: object) -> bool:
    """True if there are control characters (NUL and the like) in a JSON value; the normal form leaves them out."""
    return any(_CONTROL.search(part) for part in texts_in(value))


def annotator_of(record: Mapping) -> str | None:
    """Who judged or wrote the row, by the first of the usual columns that is filled."""
    return next((str(record[key]) for key in ANNOTATOR_KEYS if record.get(key) not in (None, "")), None)
