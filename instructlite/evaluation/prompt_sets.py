"""The prompts that side effects are measured on: small licensed sets in sets/ (SOURCES.md says what they are), or files of one's own.

A set names its prompts; where people answered them, their answers are references, and where rows have a use case it makes the rows
"by category".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.preparing.mixture import category
from ..data.preparing.steps import Sample
from ..data.records import Source, read_records
from ..errors import InstructLiteError

SHIPPED = Path(__file__).parent / "sets"
Row = dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """Prompts under the name that the report has for them; a row: prompt (messages), category, completion (None: nobody's)."""

    name: str
    rows: list[Row]

    @property
    def prompts(self) -> list[list[dict]]:
        return [row["prompt"] for row in self.rows]

    @property
    def categories(self) -> list[str]:
        return [row["category"] for row in self.rows]

    @property
    def references(self) -> list[str] | None:
        """People's answers, one a prompt; None where not every prompt has one."""
        found = [row["completion"] for row in self.rows]
        return None if None in found else found


def prompt_set(name: str, source: Source, *, answered: bool = False) -> PromptSet:
    """Read prompts, or demonstrations if `answered`. Rows without a category of their own are classified (mixture.py)."""
    kind = "demonstrations" if answered else "prompts"
    records = read_records(source, kind)
    return PromptSet(
        name,
        [{"prompt": row["prompt"], "completion": row.get("completion"), "category": category_in(row, kind)} for row in records],
    )


def category_in(row: Row, kind: str) -> str:
    """The use case that a row names, or else the likeliest one."""
    return category(Sample(row, kind, "", 0))[0]


def shipped(name: str) -> PromptSet:
    """ "red-team" (opening messages that tempt, a sixth of them harmless) or "closed-domain" (questions to a given passage, answered)."""
    return prompt_set(name, SHIPPED / f"{name.replace('-', '_')}.jsonl", answered=name == "closed-domain")


def prose(source: Source | None = None) -> list[str]:
    """Texts for the perplexity; None: the shipped ones."""
    return [row["text"] for row in read_records(SHIPPED / "prose.jsonl" if source is None else source, "texts")]


def multiple_choice(source: Source | None = None) -> list[Row]:
    """TruthfulQA's rows: question, best_answer, incorrect_answers; None: the shipped ones.

    Raises InstructLiteError with the number of a row that has not all three.
    """
    rows = source
    if source is None or isinstance(source, (str, Path)):
        path = SHIPPED / "truthfulqa.jsonl" if source is None else Path(source)
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InstructLiteError(f"{path}: no multiple-choice questions can be read from it ({error})") from error
    for number, row in enumerate(rows, 1):
        if not _is_question(row):
            raise InstructLiteError(f"multiple choice, row {number}: expected question, best_answer and a list incorrect_answers")
    return list(rows)


def _is_question(row: Any) -> bool:
    wrong = row.get("incorrect_answers") if isinstance(row, dict) else None
    texts = [row.get("question"), row.get("best_answer"), *wrong] if isinstance(wrong, Sequence) and wrong else [None]
    return not isinstance(wrong, str) and all(isinstance(text, str) and text for text in texts)
