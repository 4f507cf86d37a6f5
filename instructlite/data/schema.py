"""What one record must look like: the kinds, the layouts of keys they come in, and the way from each layout to the normal form.

Every check looks at one row alone and raises a Fault that says what is wrong and what to do; records.py adds file and line.
Nothing is coerced: a number where a text belongs is a fault.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["demonstrations", "comparisons", "rankings", "prompts", "texts"]
KINDS: tuple[str, ...] = get_args(Kind)
ROLES = ("system", "user", "assistant")
MAX_DEPTH = 50

_FOREIGN_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}
_TYPE_NAMES = {type(None): "null", bool: "true or false", str: "a text", list: "a list", dict: "an object"}
_TYPE_NAMES |= dict.fromkeys((int, float), "a number")
# Tab, line feed and carriage return are text; the other C0 controls and DEL are debris of some conversion.
_CONTROLS = {code: None for code in (*range(32), 127) if code not in (9, 10, 13)}
_CONTROL = re.compile("[" + re.escape("".join(map(chr, _CONTROLS))) + "]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Fault(ValueError):
    """What is wrong with one row, and what to do about it."""


@dataclass(frozen=True)
class Layout:
    """One way to write a kind of record: the keys that must be there."""

    kind: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(self.keys)})"

    def fit(self, row: Mapping) -> tuple[int, int]:
        """Larger fits better: a key counts 2, a misspelt one 1; then fewer missing keys win."""
        found = [2 if key in row else 1 if nearest(key, row) else 0 for key in self.keys]
        return sum(found), -found.count(0)


LAYOUTS = (
    Layout("demonstrations", ("messages",)),
    Layout("demonstrations", ("prompt", "completion")),
    Layout("comparisons", ("prompt", "chosen", "rejected")),
    Layout("comparisons", ("chosen", "rejected")),  # TRL's implicit prompt: two conversations that part at the last turn
    Layout("rankings", ("prompt", "responses", "ranks")),
    Layout("prompts", ("prompt",)),
    Layout("texts", ("text",)),
)


def nearest(key: str, candidates: Iterable) -> str | None:
    """The candidate that was probably meant to be `key`. 0.81 takes 'promt' for 'prompt' but leaves 'prompt_id' alone."""
    lowered = {name.lower(): name for name in candidates if isinstance(name, str)}
    close = difflib.get_close_matches(key, lowered, n=1, cutoff=0.81)
    return lowered[close[0]] if close else None


def best_layout(row: Mapping, kind: str | None = None) -> Layout | None:
    """The layout (of `kind`, if given) that the row's keys fit best. None: they fit none at all."""
    fits = {layout: layout.fit(row) for layout in LAYOUTS if kind in (None, layout.kind)}
    layout = max(fits, key=fits.__getitem__)
    return layout if fits[layout][0] else None


def normalise(row: Mapping, layout: Layout) -> dict:
    """The row in the normal form of its kind, with its other columns kept.

    Raises Fault.
    """
    _check_keys(row, layout)
    for key, value in row.items():
        if any(_SURROGATE.search(text) for text in _texts([key, value])):
            # It can neither be tokenized nor written as UTF-8.
            raise Fault(f"'{_printable(key)}' holds half of a character, such as \\ud800 alone (write the whole surrogate pair)")
    fields = _READERS[layout.keys](row)
    if layout.kind == "comparisons" and fields["chosen"].split() == fields["rejected"].split():
        raise Fault("'chosen' and 'rejected' are the same text (remove the row)")
    return {**fields, **{key: value for key, value in row.items() if key not in (*layout.keys, *fields)}}


def has_controls(row: Mapping, layout: Layout) -> bool:
    """True if the row's texts hold control characters (NUL and the like), which the normal form leaves out."""
    return any(_CONTROL.search(text) for text in _texts([row[key] for key in layout.keys]))


def _check_keys(row: Mapping, layout: Layout) -> None:
    missing = next((key for key in layout.keys if key not in row), None)
    if missing is None:
        return
    own = best_layout(row)
    # Only a row that is complete in another way is of another kind; any other row lacks a key.
    if own and not set(own.keys) <= set(layout.keys) and set(own.keys) <= set(row):
        raise Fault(f"has the keys of {own}, expected {layout} (keep each kind in its own file){_further_fault(row, own)}")
    spelt = nearest(missing, (key for key in row if key not in layout.keys))
    hint = f"rename '{_printable(spelt)}'" if spelt else _found(row)
    raise Fault(f"key '{missing}' is missing ({hint})")


def _further_fault(row: Mapping, layout: Layout) -> str:
    try:
        normalise(row, layout)
    except Fault as fault:
        return f"; and {fault}"
    return ""


def _found(row: Mapping) -> str:
    keys = [_printable(key) for key in list(row)[:8]]
    return f"found: {', '.join(keys) or 'no keys'}{', …' if len(row) > 8 else ''}"


def _printable(key: object) -> str:
    """A key as an error message can show it on any terminal: short, control and half characters escaped."""
    return repr(str(key))[1:-1][:40]


def _texts(value: object) -> Iterator[str]:
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


def _expect(value: object, kind: type, where: str, expected: str) -> None:
    if not isinstance(value, kind):
        raise Fault(f"{where} is {_TYPE_NAMES.get(type(value), type(value).__name__)}, expected {expected}")


def _text(value: object, where: str, expected: str = "a text") -> str:
    _expect(value, str, where, expected)
    cleaned = value.translate(_CONTROLS)
    if not cleaned.strip():
        raise Fault(f"{where} is empty (fill it or remove the row)")
    return cleaned


def _messages(value: object, where: str, last: str) -> list[dict]:
    """A system message or none, then user and assistant in turn, the `last` one of that role. Turns are counted from 1."""
    _expect(value, list, where, "a list of messages")
    turns: list[dict] = []
    for number, message in enumerate(value, 1):
        turn = f"{where}, turn {number}"
        _expect(message, Mapping, turn, "an object with 'role' and 'content'")
        for key in ("role", "content"):
            if key not in message:
                raise Fault(f"{turn}: key '{key}' is missing ({_found(message)})")
        _check_role(message["role"], turn, turns)
        turns.append({"role": message["role"], "content": _text(message["content"], f"{turn}: 'content'")})
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
        raise Fault(f"{turn}: unknown role '{_printable(role)}' ({hint})")
    previous = before[-1]["role"] if before else None
    due = "assistant" if previous == "user" else "user"
    if role != due and not (role == "system" and previous is None):
        raise Fault(f"{turn}: {role} {f'follows {previous}' if previous else 'comes first'}, expected {due}")


def _prompt(row: Mapping) -> list[dict]:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return _messages(prompt, "'prompt'", last="user")
    return [{"role": "user", "content": _text(prompt, "'prompt'", "a text or a list of messages")}]


def _answer(value: object, where: str) -> str:
    if not isinstance(value, list):
        return _text(value, where, "a text or a list with one message of the assistant")
    if len(value) != 1:
        raise Fault(f"{where} has {len(value)} messages, expected one of the assistant")
    message = value[0]
    _expect(message, Mapping, f"{where}, turn 1", "an object with 'role' and 'content'")
    if message.get("role") != "assistant" or "content" not in message:
        raise Fault(f"{where}, turn 1: expected the role 'assistant' and 'content'")
    return _text(message["content"], f"{where}, turn 1: 'content'")


def _from_messages(row: Mapping) -> dict:
    turns = _messages(row["messages"], "'messages'", last="assistant")
    return {"prompt": turns[:-1], "completion": turns[-1]["content"]}


def _from_conversations(row: Mapping) -> dict:
    for name in ("chosen", "rejected"):
        _expect(row[name], list, f"'{name}' without a 'prompt'", "a list of messages")
    chosen, rejected = (_messages(row[name], f"'{name}'", last="assistant") for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Fault("'chosen' and 'rejected' differ before their last turn, so that they have no prompt in common (add 'prompt')")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _ranking(row: Mapping) -> dict:
    prompt, (responses, ranks) = _prompt(row), (row["responses"], row["ranks"])
    _expect(responses, list, "'responses'", "a list of texts")
    _expect(ranks, list, "'ranks'", "a list of numbers, the lowest the best")
    if len(responses) < 2:
        raise Fault(f"a ranking needs at least 2 responses, this one has {len(responses)} (remove the row)")
    if len(ranks) != len(responses):
        raise Fault(f"{len(responses)} 'responses' but {len(ranks)} 'ranks' (one rank for each response)")
    for number, rank in enumerate(ranks, 1):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
            raise Fault(f"rank {number} is {_TYPE_NAMES.get(type(rank), 'no number')} ({_printable(rank)}), expected a finite number")
    if len(set(ranks)) == 1:
        raise Fault("all responses are tied: nothing can be learned from this ranking (remove the row)")
    answers = [_answer(response, f"response {number}") for number, response in enumerate(responses, 1)]
    known: dict[tuple[str, ...], int] = {}
    for number, (answer, rank) in enumerate(zip(answers, ranks, strict=True), 1):
        first = known.setdefault(tuple(answer.split()), number)
        if ranks[first - 1] != rank:
            raise Fault(f"responses {first} and {number} are the same text with different ranks (remove one)")
    return {"prompt": prompt, "responses": answers, "ranks": list(ranks)}


_READERS = {
    ("messages",): _from_messages,
    ("prompt", "completion"): lambda row: {"prompt": _prompt(row), "completion": _answer(row["completion"], "'completion'")},
    ("prompt", "chosen", "rejected"): lambda row: {
        "prompt": _prompt(row),
        "chosen": _answer(row["chosen"], "'chosen'"),
        "rejected": _answer(row["rejected"], "'rejected'"),
    },
    ("chosen", "rejected"): _from_conversations,
    ("prompt", "responses", "ranks"): _ranking,
    ("prompt",): lambda row: {"prompt": _prompt(row)},
    ("text",): lambda row: {"text": _text(row["text"], "'text'")},
}
