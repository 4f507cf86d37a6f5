"""Rows that say the same: exact copies, near-duplicates, prompts alike enough to stay in one split, preferences that contradict.

Exact copies are noticed as rows pass. For the rest a row leaves behind some hundred bytes - MinHash signatures (Broder 1997) of its
prompt, its answers and both - in `Fingerprints`, and the groups are found when all rows are known: rows that share a band of a signature
come together by sorting, so that time grows as n log n and memory as n, whatever the texts' length. Paraphrases are not found.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import require
from ..repeats import Table
from ..schema import annotator_of
from .steps import Sample, StepCount

SLOTS = 64  # of a signature, 16 bits each; the estimate's standard error is at most 1 / (2 √64) = 0.06
BAND = 4  # slots that must all agree for two rows to be compared: 64 bits, so that a band is one integer
LIKE_PROMPTS = 0.7
"""Prompts at least this alike stay in one split; a pair of this likeness is found with probability 1 - (1 - 0.7⁴)¹⁶ = 0.988."""
LIKE_PARTS = 0.4
"""In near-duplicates, prompt and answers must each be this alike: one long prompt with two short answers is no duplicate."""

# Thai, Chinese and Japanese have no blanks between words: there each character is one.
_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+")
_SEED = 1


def folded(text: str) -> str:
    """Case and white space aside."""
    return " ".join(text.casefold().split())


def key64(*parts: Any) -> int:
    """A hash of 64 bits that is the same in every process, unlike Python's own."""
    digest = hashlib.blake2b(json.dumps(parts, ensure_ascii=True, separators=(",", ":")).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def exact_duplicates() -> Callable[[Sample, StepCount], str | None]:
    """Rows whose texts are those of an earlier row of their kind and annotator, case and white space aside. The same judgement of two
    people is two votes, not a copy."""
    places = Table(most=1 << 40)
    files: dict[str, int] = {}

    def judge(sample: Sample, count: StepCount) -> str | None:
        turns = [(turn["role"], folded(turn["content"])) for turn in sample.turns] or folded(sample.prompt)
        key = key64(sample.kind, turns, [folded(answer) for answer in sample.answers], sample.record.get("ranks"), _annotator(sample))
        first = places.get(key)
        if first is not None:
            file, line = divmod(first, 1 << 40)
            return f"exact duplicate: of {list(files)[file]}:{line}"
        places.add(key, (files.setdefault(sample.file, len(files)) << 40) + sample.line)
        return None

    return judge


class Fingerprints:
    """What is remembered of every row that came through the first steps, in arrays: about 400 bytes a row."""

    def __init__(self, near: bool) -> None:
        """near: signatures too, for which rensa must be installed. Without them only equal prompts stay together."""
        self.near = near
        self._minhash = require("rensa", "data").RMinHash if near else None
        self._chunks: dict[str, list[np.ndarray]] = {name: [] for name in ("whole", "prompt", "answers")}
        self.kinds, self.directions = array("B"), array("B")
        self.openings, self.prompts, self.pairs, self.annotators = (array("Q") for _ in range(4))
        self.annotators_named: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, rows: list[Sample], kinds: tuple[str, ...]) -> None:
        for sample in rows:
            turns = [(turn["role"], folded(turn["content"])) for turn in sample.turns] or folded(sample.prompt)
            first = next((text for role, text in turns if role == "user"), "") if sample.turns else turns
            pair = (folded(sample.record["chosen"]), folded(sample.record["rejected"])) if sample.kind == "comparisons" else None
            self.kinds.append(kinds.index(sample.kind))
            self.openings.append(key64(first))
            self.prompts.append(key64(turns))
            self.pairs.append(key64(turns, sorted(pair)) if pair else 0)
            self.directions.append(bool(pair and pair[0] > pair[1]))
            self.annotators.append(self.annotators_named.setdefault(_annotator(sample), len(self.annotators_named)))
        if self._minhash and rows:
            parts = [_shingled(sample) for sample in rows]
            for name, sets in zip(self._chunks, zip(*parts, strict=True), strict=True):
                signatures = self._minhash.digests_from_token_sets(list(sets), SLOTS, _SEED)
                self._chunks[name].append(np.array(signatures, dtype=np.uint32).astype(np.uint16))

    def signatures(self, name: str) -> np.ndarray:
        """(rows, SLOTS); the chunks are given up for it."""
        chunks = self._chunks[name]
        if len(chunks) > 1:
            joined = np.empty((len(self), SLOTS), np.uint16)
            start = 0
            while chunks:
                chunk = chunks.pop(0)
                joined[start : start + len(chunk)] = chunk
                start += len(chunk)
            chunks.append(joined)
        return chunks[0] if chunks else np.empty((0, SLOTS), np.uint16)


def near_duplicates(prints: Fingerprints, threshold: float) -> np.ndarray:
    """For each row the number of an earlier row that it nearly repeats, itself if there is none.

    threshold: least share of common words and word pairs (Jaccard) of prompt and answers together.
    """
    number = len(prints)
    earlier = np.arange(number)
    if not prints.near or number < 2:
        return earlier
    whole, prompt, answers = (prints.signatures(name) for name in ("whole", "prompt", "answers"))
    kinds, annotators = np.frombuffer(prints.kinds, np.uint8), np.frombuffer(prints.annotators, np.uint64)
    salt = (annotators * np.uint64(256) + kinds) * np.uint64(0x9E3779B97F4A7C15)  # rows of different people or kinds never share a band
    for late, early in _candidates(whole, salt):
        alike = _similarity(whole, late, early) >= threshold
        alike &= _similarity(prompt, late, early) >= LIKE_PARTS
        alike &= _similarity(answers, late, early) >= LIKE_PARTS
        np.minimum.at(earlier, late[alike], early[alike])
    return earlier


def prompt_clusters(prints: Fingerprints, earlier: np.ndarray) -> np.ndarray:
    """For each row the number of its cluster, which is that of the cluster's first row.

    In one cluster: near-duplicates (`earlier`), rows whose conversations open alike, rows with one prompt, rows whose prompts are alike
    (LIKE_PROMPTS), and what hangs together through these.
    """
    joined = Unions(len(prints))
    repeats = np.flatnonzero(earlier != np.arange(len(prints)))
    joined.join(repeats, earlier[repeats])
    for keys in (prints.openings, prints.prompts):
        late, early = _neighbours(np.frombuffer(keys, np.uint64))
        joined.join(late, early)
    if prints.near and len(prints) > 1:
        prompt = prints.signatures("prompt")
        for late, early in _candidates(prompt, np.zeros(len(prints), np.uint64)):
            alike = _similarity(prompt, late, early) >= LIKE_PROMPTS
            joined.join(late[alike], early[alike])
    return joined.roots()


def contradictions(prints: Fingerprints, kept: np.ndarray) -> tuple[np.ndarray, int]:
    """Which rows lose against the opposite preference, and how many pairs are contested.

    The majority of the annotators stands; where there is none, all rows of the pair lose.
    """
    pairs = np.frombuffer(prints.pairs, np.uint64)
    asked = np.flatnonzero(kept & (pairs != 0))
    lost = np.zeros(len(prints), bool)
    if not len(asked):
        return lost, 0
    swapped = np.frombuffer(prints.directions, np.uint8)[asked]
    _, unit = np.unique(pairs[asked], return_inverse=True)
    votes = np.stack([np.bincount(unit, 1 - swapped), np.bincount(unit, swapped)], axis=1)
    contested = votes.min(axis=1) > 0
    own, other = votes[unit, swapped], votes[unit, 1 - swapped]
    lost[asked] = contested[unit] & (own <= other)
    return lost, int(contested.sum())


class Unions:
    """Union-find; the smallest number of a set is its root."""

    def __init__(self, number: int) -> None:
        self.parent = array("q", range(number))

    def join(self, some: Iterable[int], others: Iterable[int]) -> None:
        for one, other in zip(np.asarray(some).tolist(), np.asarray(others).tolist(), strict=True):
            one, other = self._root(one), self._root(other)
            if one != other:
                self.parent[max(one, other)] = min(one, other)

    def _root(self, item: int) -> int:
        parent = self.parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def roots(self) -> np.ndarray:
        roots = np.array(self.parent)
        while (roots != roots[roots]).any():
            roots = roots[roots]
        return roots


def words_of(text: str) -> list[str]:
    """Words, case and punctuation aside; where there are none, what stands between blanks."""
    return _WORD.findall(text.casefold()) or text.split()


def shingles(text: str, tag: str = "") -> list[str]:
    """Words and word pairs. The pairs know the order; the words keep a short text with one typo alike."""
    words = [tag + word for word in words_of(text)]
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def _annotator(sample: Sample) -> str:
    return annotator_of(sample.record) or ""


def _shingled(sample: Sample) -> tuple[list[str], list[str], list[str]]:
    """Of everything, the prompt and the answers. Answers carry their rank: a preference the other way round is another row."""
    prompt = shingles(sample.prompt)
    ranks = sample.record.get("ranks", range(len(sample.answers)))
    answers = [shingle for rank, answer in zip(ranks, sample.answers, strict=True) for shingle in shingles(answer, f"{rank}:")]
    return prompt + answers, prompt, answers


def _candidates(signatures: np.ndarray, salt: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Pairs (later, earlier) that share a band, one band at a time. Within a group each row meets the first and the one before it,
    not all: the work stays linear even if every row is alike."""
    bands = np.ascontiguousarray(signatures).view(np.uint64)
    for band in range(SLOTS // BAND):
        keys = bands[:, band] ^ salt
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        new = np.r_[True, ranked[1:] != ranked[:-1]]
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        before = np.r_[order[:1], order[:-1]]
        later = ~new
        yield order[later], first[later]
        second = later & (before != first)
        yield order[second], before[second]


def _neighbours(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (later, earlier) of neighbours among rows with the same key."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return order[1:][same], order[:-1][same]


def _similarity(signatures: np.ndarray, some: np.ndarray, others: np.ndarray, block: int = 1 << 16) -> np.ndarray:
    """Estimated Jaccard similarity of pairs of rows, a block of pairs at a time."""
    alike = np.empty(len(some), np.float32)
    for start in range(0, len(some), block):
        part = slice(start, start + block)
        alike[part] = (signatures[some[part]] == signatures[others[part]]).mean(axis=1, dtype=np.float32)
    return alike
