"""Answers, scores and log-probabilities of the roles of a model, each computed once and kept on disk.

Kept under a hash of all that decides it: the weights of base and adapter, tokens, decoding, seed. So an evaluation that was killed goes
on, and one more candidate or judge costs only itself. What changes a result by rounding alone, such as the size of batches, is
not in the hash.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InstructLiteError
from ..models.roles import RoleModel
from ..models.sampling import Sampling
from ..models.sampling import Sequence as Tokens
from ..progress import progress
from .workers import Workers, computed

FILE = "kept.sqlite"
MEANING = 1
"""To be raised when the same key would come to mean something else."""
_AT_ONCE = 8  # batches between two savings of scores and log-probabilities


class Kept:
    """Values (JSON) by key in an SQLite file; None keeps them in memory. What was put survives kill -9."""

    def __init__(self, path: Path | None):
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=60)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT)")
        except (sqlite3.Error, OSError) as error:
            raise InstructLiteError(f"{path}: nothing can be kept there ({error}); remove it or choose another place") from error

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values that are there."""
        found, wanted = {}, list(keys)
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            rows = self.database.execute(f"SELECT key, value FROM kept WHERE key IN ({', '.join('?' * len(part))})", part)
            found |= {key: json.loads(value) for key, value in rows}
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """All of them or none."""
        self.database.execute("BEGIN IMMEDIATE")
        self.database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", [(key, json.dumps(v)) for key, v in values.items()])
        self.database.execute("COMMIT")


@dataclass(frozen=True)
class Asked:
    """One answer to be drawn, the `number`-th to its prompt. name: whose it is; it decides nothing, a candidate may be called anything."""

    name: str
    role: str | None
    prompt: tuple[int, ...]
    number: int
    draws: int = 1
    """Of so many answers one is kept: best-of-n draws others than the adapter that it is compared with."""


Phase = Callable[[str, int, int], Any]
"""(label, rows, rows that are kept) -> a context that yields `advance`."""


class KeptModel:
    """A RoleModel that computes nothing twice."""

    def __init__(
        self, model: RoleModel, kept: Kept, batch_size: int, phase: Phase = progress, *, workers: Workers | None = None,
        merged: str | None = None,
    ):  # fmt: skip
        """workers: the processes that share the work. merged: whose model it is for them, where it is not the base with all adapters."""
        self.model, self.kept, self.batch_size, self.phase = model, kept, batch_size, phase
        self.workers, self.merged = workers, merged
        base = model.base
        self.identity = [MEANING, base.fingerprint, base.quantization, base.dtype, base.tokenizer_sha256, base.template_sha256]

    def answers(self, asked: Sequence[Asked], sampling: Sampling, seed: int, label: str) -> list[list[int]]:
        """Token ids, in mixed batches; each answer has random numbers of its own, from all that decides it (its key).

        So different weights draw independently of each other, as win rates over all pairs of two candidates' answers assume:
        with common random numbers a policy would meet its own answers, changed a little, and the rate would be that of such pairs.
        Equal weights asked the same are one policy: one set of answers, and an exact draw.
        """
        keys = [self._answer_key(one, sampling, seed) for one in asked]
        known = self.kept.get(keys)
        open_rows = {key: one for key, one in zip(keys, asked, strict=True) if key not in known}
        names = sorted(open_rows, key=lambda key: len(open_rows[key].prompt))  # similar lengths share a batch: less padding
        with self.phase(label, len(set(keys)), len(known)) as advance:
            for part in self._portions(names, self.batch_size):
                rows = [(open_rows[key].prompt, open_rows[key].role, int(key[:15], 16)) for key in part]
                new = dict(zip(part, self._compute("answers", rows, **asdict(sampling)), strict=True))
                self.kept.put(new)
                known |= new
                advance(len(part))
        return [known[key] for key in keys]

    def _compute(self, what: str, rows: Sequence[tuple], **options: Any) -> list:
        """See `computed`."""
        if self.workers is None:
            return computed(self.model, what, rows, self.batch_size, options)
        return self.workers.compute(self.merged, lambda merged: self.model, what, rows, self.batch_size, options)

    def _portions(self, rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        """What is computed between two savings: `size` rows for each process."""
        size *= self.workers.processes if self.workers else 1
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def scores(self, roles: Sequence[str], sequences: Sequence[Tokens], label: str) -> dict[str, list[float]]:
        """By role the scores of all (prompt ids, answer ids), read at the answer's last token, as PPO reads its reward model.

        Equal sequences are scored once: in batches of other lengths they would differ in the last bits, and a tie would
        count as a win.
        """

        def compute(wanted: list[str], part: list[tuple]) -> list[list[float]]:
            found = self._compute("scores", part, roles=wanted)
            for role, own in zip(wanted, zip(*found, strict=True), strict=True):
                if not all(abs(value) < float("inf") for value in own):
                    raise InstructLiteError(f"{self.model.sources[role]}: its scores are not finite; train the reward model again")
            return found

        return self._by_role("score", list(roles), sequences, label, compute)

    def log_probs(
        self, roles: Sequence[str | None], sequences: Sequence[Tokens], label: str, *, temperature: float = 1.0
    ) -> dict[str | None, list[Tensor]]:
        """By role the log-probabilities of the tokens of each completion, in nats."""

        def compute(wanted: list[str | None], part: list[tuple]) -> list[list[list[float]]]:
            return self._compute("log_probs", part, roles=wanted, temperature=temperature)

        found = self._by_role(f"log-probabilities at {temperature:g}", list(roles), sequences, label, compute)
        return {role: [torch.tensor(row) for row in own] for role, own in found.items()}

    def _by_role(self, what: str, roles: list, sequences: Sequence[Tokens], label: str, compute: Callable[[list, list], list]) -> dict:
        """compute(roles, sequences) -> (sequences, roles) of values, for what is not kept; roles that lack the same together."""
        keys = {role: [self._key(what, role, prompt, answer) for prompt, answer in sequences] for role in roles}
        known = self.kept.get({key for own in keys.values() for key in own})
        missing = {}  # sequence -> {role: key}
        for number, sequence in enumerate(sequences):
            lacking = {role: keys[role][number] for role in roles if keys[role][number] not in known}
            if lacking:
                missing[tuple(sequence[0]), tuple(sequence[1])] = lacking
        total = len({(tuple(prompt), tuple(answer)) for prompt, answer in sequences})
        with self.phase(label, total, total - len(missing)) as advance:
            for wanted, rows in _together(missing):
                for part in self._portions(rows, _AT_ONCE * self.batch_size):
                    values = compute(wanted, part)
                    new = {
                        missing[row][role]: value
                        for row, own in zip(part, values, strict=True)
                        for role, value in zip(wanted, own, strict=True)
                    }
                    self.kept.put(new)
                    known |= new
                    advance(len(part))
        return {role: [known[key] for key in own] for role, own in keys.items()}

    def _answer_key(self, one: Asked, sampling: Sampling, seed: int) -> str:
        drawn = [] if sampling.temperature == 0 else [one.draws, one.number, seed]
        return self._key("answer", one.role, one.prompt, [asdict(sampling), *drawn])

    def _key(self, what: str, role: str | None, prompt: Sequence[int], rest: Sequence[Any]) -> str:
        adapter = self.model.sources.get(role)
        weights = [adapter.sha256, adapter.manifest.score_bias] if adapter else []
        content = json.dumps([what, self.identity, weights, list(prompt), list(rest)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _together(missing: Mapping[tuple, Mapping]) -> Iterator[tuple[list, list[tuple]]]:
    """(roles, sequences by length)."""
    groups: dict[tuple, list[tuple]] = {}
    for sequence, lacking in missing.items():
        groups.setdefault(tuple(lacking), []).append(sequence)
    for roles, part in groups.items():
        yield list(roles), sorted(part, key=lambda sequence: len(sequence[0]) + len(sequence[1]))
