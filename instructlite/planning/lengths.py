"""How long the rows of a recipe's data are, as far as its files can be read here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EMBEDDED, REQUIRED, Loop, cache_directory
from ..data.parts import by_answer_length
from ..data.records import as_groups, characters, read_ptx, read_records

ASSUMED_PROMPT, ASSUMED_ANSWER = 512, 512
"""Tokens, where neither data nor options say."""
LARGEST_READ = 50_000_000  # bytes of a data file that is looked at for its lengths
PER_TURN = 5  # tokens that a chat template puts around a message, about


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest rows; of what is not known, None."""

    demonstration: int | None = None
    completion: int | None = None
    compared: int | None = None
    answer: int | None = None
    """Of what is compared, without its prompt."""
    judged: int | None = None
    answers: int = 2
    """Of one prompt, compared with each other: more than two in rankings."""
    prompt: int | None = None
    ptx: int | None = None

    def __str__(self) -> str:
        rows = {"demonstrations": self.demonstration, "comparisons": self.compared, "prompts": self.prompt}
        said = (f"{name} {tokens or '?'}" for name, tokens in rows.items())
        unknown = f" ? is planned as long as the options allow, a prompt as {ASSUMED_PROMPT}." if None in rows.values() else ""
        return f"Longest rows in tokens: {', '.join(said)}.{unknown}"


def lengths_of(loop: Loop) -> Lengths:
    """The longest rows of the data files that can be read here, counted as the tokenizer does if it is here, too."""
    data, count = loop.data, counter(loop.model)
    demonstrations = rows_of(data.demonstrations, "demonstrations")
    compared = rows_of(data.comparisons, "comparisons")
    groups = [*as_groups(compared or []), *as_groups(rows_of(data.rankings, "rankings") or [])]
    short, _ = by_answer_length(groups, data.answer_characters or None)
    prompts = rows_of(data.prompts, "prompts") or groups
    prompts = [row for row in prompts if not data.prompt_characters or characters(row["prompt"]) <= data.prompt_characters]
    sources = loop.texts.values()
    texts = [row for source in sources for row in (demonstrations if source == "demonstrations" else rows_of(source, None, read_ptx)) or []]

    def group_length(group: Mapping[str, Any]) -> int:
        return count(group["prompt"]) + max(map(count, group["responses"]))

    return Lengths(
        demonstration=_longest(demonstrations, lambda row: count(row["prompt"]) + count(row["completion"])),
        completion=_longest(demonstrations, lambda row: count(row["completion"])),
        compared=_longest(short, group_length),
        answer=_longest(short, lambda group: max(map(count, group["responses"]))),
        judged=_longest(groups, group_length),
        answers=max((len(group["responses"]) for group in groups), default=2),
        prompt=_longest(prompts, lambda row: count(row["prompt"])),
        ptx=_longest(texts, lambda row: count(row["text"] if "text" in row else row["completion"])),
    )


def rows_of(source: Any, kind: str | None, read: Callable[..., list[dict]] = read_records) -> list[dict] | None:
    """The rows of files that are here; None if there are none, or they are on the Hub or too large to be read for this."""
    sources = source if isinstance(source, list) else [source]
    if source in (None, REQUIRED) or any(one != "starter" and not os.path.isfile(one) for one in sources):
        return None
    if sum(os.path.getsize(one) for one in sources if one != "starter") > LARGEST_READ:
        return None
    return read(source) if read is read_ptx else read(source, kind)


def _longest(rows: list[dict] | None, length: Callable[[dict], int]) -> int | None:
    """Length of the longest row; only those with the most characters are counted in tokens."""
    if not rows:
        return None
    return max(map(length, sorted(rows, key=lambda row: len(json.dumps(row)), reverse=True)[:32]))


def counter(model: str) -> Callable[[str | list[dict[str, str]]], int]:
    """Counts tokens of a text, or of a conversation with its template; by characters / 4 where the tokenizer is not here."""
    path = _tokenizer(model)
    if path is None:
        text_length: Callable[[str], int] = lambda text: math.ceil(len(text) / 4)  # noqa: E731
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        text_length = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)  # noqa: E731

    def count(content: str | list[dict[str, str]]) -> int:
        if isinstance(content, str):
            return text_length(content) + 1  # the token that ends it
        return sum(text_length(turn["content"]) + PER_TURN for turn in content) + PER_TURN

    return count


def _tokenizer(model: str) -> Path | None:
    here = [*cache_directory().glob(f"{EMBEDDED}-*/tokenizer.json")] if model == EMBEDDED else [Path(model) / "tokenizer.json"]
    if found := next((path for path in here if path.is_file()), None):
        return found
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None
