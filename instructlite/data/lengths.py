"""Rows that are too long for training, by a model's own tokenizer and without torch. tokens.py also counts what the template adds."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..errors import InstructLiteError

_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]

_ANSWERS = {"demonstrations": ["completion"], "comparisons": ["chosen", "rejected"]}


class LengthLimit:
    """Tokens of prompt and answers, without those of the chat template, so that a row has at least as many."""

    def __init__(self, model: str, max_length: int | None):
        from tokenizers import Tokenizer  # comes with transformers, loads no torch

        if max_length is None:
            raise InstructLiteError("to count tokens give both: --tokenizer MODEL --max-length 1024")
        self.max_length = max_length
        directory = _directory(model)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise InstructLiteError(f"{model}: no tokenizer.json (give a model's directory, an adapter, or a name on the Hub)")
        if not (directory / "chat_template.jinja").is_file() and not _object(directory / "tokenizer_config.json").get("chat_template"):
            raise InstructLiteError(
                f"{model}: its tokenizer has no chat template (give one in the recipe: chat_template: chatml, plain, or a file)"
            )
        _object(file)  # what tokenizers raises for broken JSON is a bare Exception
        self._encode = Tokenizer.from_file(str(file)).encode
        self._count = lru_cache(1000)(lambda text: len(self._encode(text, add_special_tokens=False).ids))  # prompts come again

    def too_long(self, record: Mapping, kind: str) -> str | None:
        """Which part of the row is beyond `max_length`, or None."""
        turns = [{"content": record["text"]}] if kind == "texts" else record["prompt"]
        prompt = sum(self._count(turn["content"]) for turn in turns)
        if prompt >= self.max_length:
            return f"its prompt alone has {prompt:,} tokens, and max_length is {self.max_length:,}"
        answers = {key: record[key] for key in _ANSWERS.get(kind, ())}
        if kind == "rankings":
            answers = {f"response {number}": text for number, text in enumerate(record["responses"], 1)}
        lengths = {name: prompt + self._count(text) + 1 for name, text in answers.items()}  # 1: the token that ends the turn
        name = max(lengths, key=lengths.__getitem__, default=None)
        if name is None or lengths[name] <= self.max_length:
            return None
        return f"its prompt ({prompt:,} tokens) and '{name}' ({lengths[name] - prompt:,}) are longer than max_length={self.max_length:,}"


def _directory(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InstructLiteError(f"{model}: no such directory, and the tokenizer cannot be had from the Hub: {reason}") from error


def _object(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise InstructLiteError(f"{file}: broken JSON: {error}") from error
    return content if isinstance(content, dict) else {}
