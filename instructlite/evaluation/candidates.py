"""Who answers: the base alone, the base with demonstrations or a text in its prompt, adapters, the best of several answers, merged models.

Written as text: "base", "few-shot:4" (so many demonstrations stand before the prompt), "context" (the row's own text does),
"best-of-4" (of the first adapter's answers, the one that the training reward model scores highest) or "best-of-4:NAME" (of
another candidate's), and paths, Adapters or Hub repositories.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import InstructLiteError
from ..models.manifest import Adapter, is_adapter, unused

Model = str | Path | Adapter
Messages = list[dict[str, str]]
Kind = Literal["base", "few-shot", "context", "adapter", "best-of-n", "merged"]

_SPELLED = re.compile(r"(few-shot|best-of)(?:[-:](\d+)(?::(.+))?)?")
SHOTS = 4
WITH_CONTEXT = "{context}\n\n{prompt}"


@dataclass(frozen=True)
class Candidate:
    """One who answers. role: what its adapter is loaded as, None for the base alone."""

    name: str
    kind: Kind = "base"
    adapter: Adapter | None = None
    role: str | None = None
    n: int | None = None
    """Demonstrations of few-shot, answers that best-of-n is chosen from."""
    of: str | None = None
    """Whose answers best-of-n is chosen from."""
    path: Path | None = None
    """A merged model's directory."""

    @property
    def draws(self) -> int:
        """Answers drawn for each one that is kept."""
        return self.n if self.kind == "best-of-n" and self.n else 1

    def to_dict(self) -> dict[str, Any]:
        """What it is, for its row in the report."""
        best = self.kind == "best-of-n"
        return {
            "name": self.name,
            "adapter": self.adapter.sha256 if self.adapter else None,
            "kind": self.kind,
            "n": self.n,
            "of": self.of,
            # The KL to whom the answers are drawn from: exact for continuous scores, else an upper bound (Beirami et al. 2024).
            "analytic_kl": math.log(self.n) - (self.n - 1) / self.n if best else None,
            "stage": None if best else self.record.get("recipe"),
        }

    @property
    def record(self) -> dict[str, Any]:
        """run.json of the run that trained it; empty if there is none."""
        file = self.adapter.path / "run.json" if self.adapter else None
        return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}

    def cost(self) -> dict[str, Any] | None:
        """What training it took, for the report's costs; None where that is not known."""
        record = {} if self.kind == "best-of-n" else self.record
        if "seconds" not in record:
            return None
        tokens = record.get("metrics", {}).get("tokens")
        named = {"candidate": self.name, "stage": record.get("recipe")}
        return {**named, "seconds": record["seconds"], "peak_rss_mb": record.get("peak_rss_mb"), "tokens": tokens}


def candidates_of(given: Model | Sequence[Model] | Mapping[str, Model]) -> list[Candidate]:
    """Candidates from what a user may give, in that order, each under a name of its own, or under that of {name: candidate}.

    Raises InstructLiteError for reward adapters, and for a best-of-n of nobody.
    """
    named = dict(given) if isinstance(given, Mapping) else {}
    listed = [given] if isinstance(given, (str, Path, Adapter)) else list(named.values() or given)
    if not listed:
        raise InstructLiteError('candidates: there are none; pass adapters, "base", or both')
    found: list[Candidate] = []
    # Roles have names of their own: PEFT takes no dots in them, torch no names of its own methods ("train", "eval").
    for number, one in enumerate(listed):
        candidate = _candidate(one, f"candidate{number}")
        names = [other.name for other in found]
        found.append(replace(candidate, name=[*named][number] if named else unused(candidate.name, names)))
    return [_drawing(candidate, found) if candidate.kind == "best-of-n" else candidate for candidate in found]


def _candidate(given: Model, role: str) -> Candidate:
    if given == "base":
        return Candidate("base")
    if given == "context":
        return Candidate("context", "context")
    spelled = _SPELLED.fullmatch(given) if isinstance(given, str) else None
    if spelled:
        kind, number, of = spelled.groups()
        n = int(number or SHOTS)
        if n < 1 or (of and kind == "few-shot"):
            raise InstructLiteError(f"{given}: such a candidate is written few-shot:4, best-of-4 or best-of-4:NAME")
        if kind == "few-shot":
            return Candidate(f"few-shot:{n}", "few-shot", n=n)
        return Candidate(f"best-of-{n}" + (f":{of}" if of else ""), "best-of-n", n=n, of=of)
    if isinstance(given, (str, Path)) and not is_adapter(given) and (Path(given) / "config.json").is_file():
        return Candidate(Path(given).resolve().name, "merged", path=Path(given))
    adapter = Adapter.load(given)
    if adapter.role != "policy":
        raise InstructLiteError(f"{adapter}: a {adapter.role} adapter cannot answer; pass adapters of SFT, DPO or PPO as candidates")
    return Candidate(adapter.name, "adapter", adapter, role)


def _drawing(candidate: Candidate, others: Sequence[Candidate]) -> Candidate:
    """Best-of-n with the adapter it draws from."""
    able = [other for other in others if other.kind in ("adapter", "base")]
    wanted = [other for other in able if (other.name == candidate.of if candidate.of else other.adapter is not None)]
    if not wanted:
        among = ", ".join(other.name for other in able) or "none"
        raise InstructLiteError(
            f"{candidate.name}: {candidate.of or 'an adapter'} is not among the candidates that it can draw from: {among}"
        )
    return replace(candidate, adapter=wanted[0].adapter, role=wanted[0].role, of=wanted[0].name)


@dataclass
class Prompting:
    """How candidates are asked: what stands in the conversation besides the prompt. demonstrations: those that few-shot shows, in order."""

    encode: Callable[[Messages], list[int]]
    longest: float
    """Tokens that a prompt may have."""
    demonstrations: list[dict]

    @classmethod
    def of(cls, encode: Callable[[Messages], list[int]], longest: float, rows: Sequence[dict], seed: int) -> Prompting:
        """rows: demonstrations to choose from, whichever the seed says."""
        return cls(encode, longest, random.Random(seed).sample(list(rows), len(rows)))

    def ids(self, candidate: Candidate, row: dict) -> list[int]:
        """The tokens that a candidate goes on from."""
        if candidate.kind == "few-shot":
            return self._with_shots(row["prompt"], candidate.n)
        if candidate.kind == "context" and row.get("context"):
            return self._with_context(row["prompt"], row["context"])
        return self.encode(row["prompt"])

    def _with_shots(self, prompt: Messages, n: int) -> list[int]:
        """The last ones are left out where not all fit, and none is the prompt's own."""
        opening = prompt[:1] if prompt[0]["role"] == "system" else []
        others = [row for row in self.demonstrations[: n + 1] if row["prompt"] != prompt][:n]
        turns = [[*row["prompt"], {"role": "assistant", "content": row["completion"]}] for row in others]
        for shown in range(len(turns), -1, -1):
            before = [turn for part in turns[:shown] for turn in part if turn["role"] != "system"]
            ids = self.encode([*opening, *before, *prompt[len(opening) :]])
            if len(ids) <= self.longest:
                break
        return ids

    def _with_context(self, prompt: Messages, context: str) -> list[int]:
        """The text stands before the last question; its end is left out where it does not fit."""
        *earlier, last = prompt
        while context:
            content = WITH_CONTEXT.format(context=context, prompt=last["content"])
            ids = self.encode([*earlier, {**last, "content": content}])
            if len(ids) <= self.longest:
                return ids
            context = context[: int(len(context) * min(0.95, self.longest / len(ids)))]
        return self.encode(prompt)
