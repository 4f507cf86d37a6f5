"""Token statistics with the tokenizer and template of the model that will be trained, and what training will cut off.

Only who names a model waits for transformers to load.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np

from .steps import Sample


@dataclass
class TokenLengths:
    """Tokens of one kind of rows; the longest answer counts."""

    max_length: int
    prompt: array = field(default_factory=lambda: array("L"))
    total: array = field(default_factory=lambda: array("L"))
    same: int = 0
    """Rows whose answers differ only behind max_length: nothing to learn from."""

    def to_dict(self) -> dict:
        prompt, total = np.array(self.prompt), np.array(self.total)
        return {
            "rows": len(total),
            "prompt": quantiles(prompt),
            "total": quantiles(total),
            "tokens": int(total.sum()),
            "max_length": self.max_length,
            "cut": int((total > self.max_length).sum()),
            "no_room_for_an_answer": int((prompt >= self.max_length).sum()),
            "same_when_cut": self.same,
        }


class TokenStatistics:
    """Counts what the template makes of each row."""

    def __init__(self, model: str, max_length: int, chat_template: str | None = None) -> None:
        from ...models.base import encode_prompt, load_tokenizer

        self.tokenizer, self.encode_prompt, self.max_length = load_tokenizer(model, chat_template), encode_prompt, max_length
        self.lengths: dict[str, TokenLengths] = {}

    def add(self, sample: Sample) -> None:
        prompt = self.encode_prompt(self.tokenizer, sample.turns) if sample.turns else self._tokens(sample.prompt)
        answers = [self._tokens(answer) for answer in sample.answers]
        lengths = self.lengths.setdefault(sample.kind, TokenLengths(self.max_length))
        lengths.prompt.append(len(prompt))
        lengths.total.append(len(prompt) + max((len(answer) + 1 for answer in answers), default=0))  # 1: the token that ends the turn
        room = max(self.max_length - len(prompt), 0)
        lengths.same += len(answers) > 1 and len({tuple(answer[:room]) for answer in answers}) == 1

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {name: int(np.quantile(values, share)) for name, share in {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1}.items()}
