"""The use cases of a data set: measured against InstructGPT's, and rows sampled towards a mix.

A row's `category` says its use case. Where it has none, a small linear model looks at the prompt's words: trained on Dolly's prompts by
bench/mixture_model.py; its agreement with held-out labels (made by rule themselves) stands in the report. Two use cases too rare there
are told by rule: a conversation of several turns is chat, and a prompt that opens with a word such as "rephrase" is a rewrite.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...errors import InstructLiteError
from .steps import Sample

INSTRUCTGPT = {
    "generation": 0.456,
    "open_qa": 0.124,
    "brainstorming": 0.112,
    "chat": 0.084,
    "rewrite": 0.066,
    "summarization": 0.042,
    "classification": 0.035,
    "other": 0.035,
    "closed_qa": 0.026,
    "extract": 0.019,
}
"""Shares of use cases among the prompts of InstructGPT's API users (Ouyang et al. 2022, table 1)."""
SAME_AS = {"creative_writing": "generation", "general_qa": "open_qa", "information_extraction": "extract", "summarisation": "summarization"}
"""Names that Dolly and others give to these use cases."""
MODEL_FILE = Path(__file__).parent / "use_cases.json"

_WORD = re.compile(r"[a-z']+|\?|:")
_REWRITE = re.compile(
    r"\s*(?:please |can you |could you )*(?:rewrite|re-write|rephrase|paraphrase|reword|proofread|translate|"
    r"(?:correct|fix|improve) (?:the |this |my )?(?:grammar|spelling|text|sentence|paragraph|wording)|"
    r"(?:make|turn|convert|change) (?:this|the following|these)\b)",
    re.IGNORECASE,
)
_OPENING_WORDS = 30


def use_case_features(sample: Sample) -> list[str]:
    """Words and word pairs of the last user turn's opening, the first two marked; how long it is; whether a passage follows."""
    text = sample.turns[-1]["content"] if sample.turns else sample.prompt
    question, _, passage = text.partition("\n\n")
    words = _WORD.findall(question.casefold())[:_OPENING_WORDS]
    found = {f"first:{' '.join(words[:1])}", f"opens:{' '.join(words[:2])}", *words, *(f"{a} {b}" for a, b in pairwise(words))}
    found.add(f"passage:{len(passage.split()) // 10 > 0}")
    found.add(f"length:{min(len(words) // 6, 5)}")
    found.add("ends:?" if question.rstrip().endswith("?") else "ends:.")
    return sorted(found)


def category_of(features: Iterable[str], model: Mapping | None = None) -> str:
    """The likeliest use case by the linear model."""
    model = model or _model()
    scores = list(model["intercepts"])
    for feature in features:
        if weights := model["weights"].get(feature):
            scores = [score + weight for score, weight in zip(scores, weights, strict=True)]
    return model["labels"][scores.index(max(scores))]


def category(sample: Sample) -> tuple[str, bool]:
    """The use case of a row, and whether the row itself says so."""
    own = sample.record.get("category")
    if isinstance(own, str) and own.strip():
        name = own.strip().casefold().replace(" ", "_").replace("-", "_")
        return SAME_AS.get(name, name), True
    if any(turn["role"] == "assistant" for turn in sample.turns):
        return "chat", False
    if _REWRITE.match(sample.turns[-1]["content"] if sample.turns else sample.prompt):
        return "rewrite", False
    return category_of(use_case_features(sample)), False


def classifier_accuracy() -> dict:
    """What bench/mixture_model.py measured: {trained_on, heldout, accuracy, recall}."""
    return _model()["about"]


def distance(counts: Mapping[str, float], target: Mapping[str, float]) -> float:
    """Total variation: the share of rows that would have to be of another use case."""
    total = sum(counts.values())
    if not total:
        return 0.0
    return sum(abs(counts.get(name, 0) / total - target.get(name, 0)) for name in {*counts, *target}) / 2


def read_mix(given: str | Mapping[str, float] | None) -> dict[str, float] | None:
    """A mix by name ("instructgpt"), as {use case: share}, or as a JSON or YAML file of that; the shares are made to sum to 1."""
    if given is None:
        return None
    if given == "instructgpt":
        mix = INSTRUCTGPT
    elif isinstance(given, Mapping):
        mix = given
    else:
        import yaml

        try:
            mix = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise InstructLiteError(f"mix={given}: neither 'instructgpt' nor a file of shares ({str(error).splitlines()[0]})") from error
    shares = list(mix.values()) if isinstance(mix, Mapping) else []
    if not shares or not all(type(share) in (int, float) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise InstructLiteError(f"mix={given}: expected the share of each use case, such as {{generation: 0.5, open_qa: 0.5}}")
    return {str(name): share / sum(shares) for name, share in mix.items()}


def towards(counts: Mapping[str, int], target: Mapping[str, float], tolerance: float) -> dict[str, int]:
    """How many rows of each use case to keep: as many rows in all as can be had with a distance of at most `tolerance` to the target.

    No row is taken twice. Use cases that have no rows cannot be had at all; where that alone is farther than the tolerance, the
    distance among the others has to keep it.
    """
    present = {name: share for name, share in target.items() if counts.get(name)}
    if not present:
        return dict.fromkeys(counts, 0)
    target = {name: share / sum(present.values()) for name, share in present.items()}
    low, high = 0.0, float(sum(counts.values()))
    if distance(counts, target) > tolerance:
        while high - low > 0.5:  # the distance grows with the number of rows asked for
            middle = (low + high) / 2
            if distance(_allot(counts, target, middle), target) <= tolerance + 1e-9:
                low = middle
            else:
                high = middle
    else:
        low = high
    return {name: round(rows) for name, rows in _allot(counts, target, low).items()}


def _allot(counts: Mapping[str, int], target: Mapping[str, float], rows: float) -> dict[str, float]:
    """`rows` rows by the target's shares. What a use case lacks goes to those that have more, and at last to those not wanted."""
    taken: dict[str, float] = dict.fromkeys(counts, 0.0)
    unwanted = {name: number for name, number in counts.items() if number and not target.get(name)}
    for wanted in ({name: share for name, share in target.items() if share}, unwanted):
        left, open_ = rows - sum(taken.values()), dict(wanted)
        while open_ and left > 1e-9:
            weight = sum(open_.values())
            full = [name for name, share in open_.items() if counts[name] <= left * share / weight]
            if not full:
                taken |= {name: left * share / weight for name, share in open_.items()}
                break
            taken |= {name: float(counts[name]) for name in full}
            left -= sum(counts[name] for name in full)
            open_ = {name: share for name, share in open_.items() if name not in full}
    return taken


def choose(categories: np.ndarray, order_keys: np.ndarray, kept: np.ndarray, quota: Mapping[int, int]) -> np.ndarray:
    """Which of the kept rows go because their use case has more than its quota; order_keys decide which."""
    surplus = np.zeros(len(kept), bool)
    for number, limit in quota.items():
        rows = np.flatnonzero(kept & (categories == number))
        surplus[rows[np.argsort(order_keys[rows], kind="stable")][limit:]] = True
    return surplus


class Categories:
    """Names of use cases as small numbers, in the order in which they came."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.told = Counter[str]()
        """Rows that said so themselves ("given") or were classified ("classified")."""

    def number(self, sample: Sample) -> int:
        name, given = category(sample)
        self.told["given" if given else "classified"] += 1
        if name not in self.names:
            if len(self.names) == 255:  # a column with free text is no category
                name = "other"
            if name not in self.names:
                self.names.append(name)
        return self.names.index(name)


@cache
def _model() -> dict:
    return json.loads(MODEL_FILE.read_text(encoding="utf-8"))
