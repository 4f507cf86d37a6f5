"""Self-instruct (Wang et al. 2023): new instructions from seed tasks, kept if they are unlike all others, then answered.

As in the paper: examples are 6 seeds and 2 of the new ones, and a new one may have at most ROUGE-L 0.7 with any other.
"""

import random
import re
from collections import Counter

from ...errors import InstructLiteError, require
from .completer import Messages
from .synthetic import Asking, Generated, fault_of, instruction_of

SEEDS_SHOWN, NEW_SHOWN = 6, 2
AT_ONCE = 4
"""Requests for new tasks in one round; all see the same pool."""
BARREN_ROUNDS = 5
_ITEM = re.compile(r"^\s*\**\d+[.)]\**\s+", re.MULTILINE)
# What a model of text alone cannot do (the paper's list, shortened).
_NOT_TEXT = re.compile(r"\b(image|picture|photo|graph|diagram|flowchart|plot|map|video|audio|draw|file)s?\b", re.IGNORECASE)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def self_instruct(
    asking: Asking, rows: list[dict], *, count: int = 100, per_request: int = 8, novelty: float = 0.7, answers: bool = True
) -> Generated:
    """`count` new instructions; with `answers` demonstrations, else prompts. novelty: the highest ROUGE-L with any other one."""
    seeds = list(dict.fromkeys(filter(None, map(instruction_of, rows))))
    if not seeds:
        raise InstructLiteError("self-instruct: no row has a prompt of a single turn to serve as a seed task")
    result = Generated(asking.method, "demonstrations" if answers else "prompts")
    pool = Pool(seeds, novelty)
    new: dict[str, dict] = {}  # instruction -> provenance
    barren = number = 0
    while len(new) < count and barren < BARREN_ROUNDS:
        before = len(new)
        shown = [_examples(asking, seeds, list(new), number * AT_ONCE + i, per_request) for i in range(AT_ONCE)]
        for answer in asking.ask(shown, f"new tasks, {len(new)} of {count} so far", draw=number):
            for proposal in _proposals(answer.text or "", answer.truncated):
                reason = _unfit(proposal) or pool.too_near(proposal)
                if reason:
                    result.reject(reason, instruction=proposal)
                elif len(new) < count:
                    pool.add(proposal)
                    new[proposal] = asking.provenance(answer.created)
        number += 1
        barren = 0 if len(new) > before else barren + 1
    if len(new) < count:
        result.notes.append(f"only {len(new):,} of {count:,} tasks: {BARREN_ROUNDS} rounds in a row brought nothing new")
    result.measured = {"seeds": len(seeds), "rounds": number, "instructions": len(new)}
    _write_rows(asking, result, new, answers)
    return result


def _write_rows(asking: Asking, result: Generated, new: dict[str, dict], answers: bool) -> None:
    prompts: list[Messages] = [[{"role": "user", "content": instruction}] for instruction in new]
    if not answers:
        result.rows = [{"prompt": prompt, "provenance": new[prompt[0]["content"]]} for prompt in prompts]
        return
    for prompt, answer in zip(prompts, asking.ask(prompts, "answers"), strict=True):
        origin = new[prompt[0]["content"]]
        if reason := fault_of(answer):
            result.reject(reason, instruction=prompt[0]["content"])
        else:
            result.rows.append({"prompt": prompt, "completion": answer.text, "provenance": origin})


def _examples(asking: Asking, seeds: list[str], new: list[str], draw: int, per_request: int) -> Messages:
    chance = random.Random(f"{asking.seed} {draw}")
    shown = chance.sample(new, min(NEW_SHOWN, len(new)))
    shown = chance.sample(seeds, min(SEEDS_SHOWN + NEW_SHOWN - len(shown), len(seeds))) + shown
    chance.shuffle(shown)
    listed = "\n".join(f"{number}. {' '.join(task.split())}" for number, task in enumerate(shown, 1))
    first, last = len(shown) + 1, len(shown) + per_request
    return asking.prompts.message("propose", number=str(per_request), first=str(first), last=str(last), examples=listed)


def _proposals(text: str, truncated: bool) -> list[str]:
    """The items of a numbered list; of one that was cut off, not the last."""
    items = [" ".join(item.split()) for item in _ITEM.split(text)[1:]]
    return [item for item in (items[:-1] if truncated else items) if item]


def _unfit(instruction: str) -> str | None:
    words = len(_TOKEN.findall(instruction))
    if not 3 < words <= 150:
        return "task too short or too long"
    if _NOT_TEXT.search(instruction):
        return "task needs more than text"
    return None


class Tokens:
    """Words for ROUGE in any language; rouge-score's own tokenizer keeps a-z and digits only, and all else would be novel."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


class Pool:
    """All instructions so far, and the ROUGE-L of a new one with the nearest of them."""

    def __init__(self, instructions: list[str], novelty: float):
        self.novelty, self.tokens = novelty, Tokens()
        self.scorer = require("rouge_score.rouge_scorer", "data").RougeScorer(["rougeL"], tokenizer=self.tokens)
        self.members: list[tuple[str, Counter]] = []
        for instruction in instructions:
            self.add(instruction)

    def add(self, instruction: str) -> None:
        self.members.append((instruction, Counter(self.tokens.tokenize(instruction))))

    def too_near(self, instruction: str) -> str | None:
        """The reason to refuse it. Words in common bound ROUGE-L from above, so that few members are scored at all."""
        words = Counter(self.tokens.tokenize(instruction))
        for other, its_words in self.members:
            bound = 2 * (words & its_words).total() / max(1, words.total() + its_words.total())
            if bound > self.novelty and self.scorer.score(other, instruction)["rougeL"].fmeasure > self.novelty:
                return "task too near to another"
        return None
