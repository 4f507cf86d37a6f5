"""All candidates of a report against one another, as language models judge their answers: a table of strengths, and every pair.

It reads the report's answers.jsonl, so that judging needs neither the models nor torch, and can be done again with another judge.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.generating.completer import Messages
from ..data.generating.pairwise import Pair, Verdicts
from ..errors import InstructLiteError
from . import statistics
from .judges import LanguageModelJudge, preference

Contest = tuple[str, str, int]  # candidate, candidate, number of the prompt


def tournament(answers: str | Path, judges: Sequence[LanguageModelJudge], *, decoding: str = "sampled", seed: int = 0) -> dict[str, Any]:
    """Every pair of candidates, judged in both orders by every judge on all prompts.

    answers: answers.jsonl of `evaluate`. Returns for each judge the strengths (Bradley & Terry, log-odds, the strongest first)
    and for each pair what `preference` says; and Krippendorff's alpha between the
    judges where there are several.
    """
    contests, pairs = _contests(answers, decoding)
    names = list(dict.fromkeys(itertools.chain(*((a, b) for a, b, _ in contests))))
    verdicts = [judge.compare(pairs) for judge in judges]
    outcomes = np.array([[np.nan if known is None else known for known in found.outcomes] for found in verdicts])
    agreed = statistics.agreement(outcomes, seed=seed) if len(judges) > 1 else None
    return {
        "decoding": decoding,
        "candidates": names,
        "judges": [
            {
                "judge": judge.name,
                "strengths": _strengths(contests, names, row, seed),
                "pairs": [_pair(a, b, contests, pairs, found, seed) for a, b in itertools.combinations(names, 2)],
            }
            for judge, found, row in zip(judges, verdicts, outcomes, strict=True)
        ],
        "agreement": None if agreed is None else {"alpha": agreed.value, "low": agreed.low, "high": agreed.high},
    }


def _contests(path: str | Path, decoding: str) -> tuple[list[Contest], list[Pair]]:
    contests, pairs = [], []
    for number, (prompt, answers) in enumerate(_read(path)):
        texts: dict[str, list[str]] = {}
        for answer in answers:
            if answer["decoding"] == decoding:
                texts.setdefault(answer["candidate"], []).append(answer["text"])
        for a, b in itertools.combinations(texts, 2):
            contests += [(a, b, number)] * min(len(texts[a]), len(texts[b]))
            pairs += [Pair(prompt, *both) for both in zip(texts[a], texts[b], strict=False)]
    if not pairs:
        raise InstructLiteError(f"{path}: no prompt has '{decoding}' answers of two candidates")
    return contests, pairs


def _read(path: str | Path) -> list[tuple[Messages, list[dict]]]:
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["prompt"], row["answers"]) for row in rows]
    except OSError as error:
        raise InstructLiteError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InstructLiteError(f"{path}: is no answers.jsonl of a report ({error}); run instructlite evaluate") from error


def _strengths(contests: list[Contest], names: list[str], outcomes: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Empty where the verdicts that came do not connect all candidates."""
    first, second = (np.array([names.index(contest[side]) for contest in contests]) for side in (0, 1))
    try:
        found = statistics.bradley_terry(first, second, outcomes, np.array([number for *_, number in contests]), len(names), seed=seed)
    except ValueError:
        return []
    rows = [{"candidate": name, "strength": s.value, "low": s.low, "high": s.high} for name, s in zip(names, found, strict=True)]
    return sorted(rows, key=lambda row: -row["strength"])


def _pair(a: str, b: str, contests: list[Contest], pairs: list[Pair], verdicts: Verdicts, seed: int) -> dict[str, Any]:
    rows = [i for i, contest in enumerate(contests) if contest[:2] == (a, b)]
    own = [pairs[i] for i in rows]
    parts = ("first_order", "second_order", "same", "created")
    found = replace(verdicts, **{part: [getattr(verdicts, part)[i] for i in rows] for part in parts})
    return {"a": a, "b": b, **preference(own, found, seed=seed)}
