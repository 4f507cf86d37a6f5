"""Answers of a policy to be voted on: drawn batch by batch into a file, so that what was killed goes on where it was, and put up.

Each answer comes with what the reward model gives it: the queue asks first about what that is unsure of, and afterwards it is seen how
far it agreed with the voters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import BaseOptions
from ..data.records import read_records
from ..errors import InstructLiteError
from ..models.base import base_of
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from ..models.sampling import Sampling, generate, score
from ..progress import progress
from ..training.work import write_text
from .ballots import Answer, Candidate
from .store import Store


@dataclass(frozen=True)
class Drawing:
    """How the answers are drawn. The same drawing of the same prompts gives the same answers, also after a kill."""

    answers: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int


def draw_answers(path: Path, prompts: Path, policy: Path, reward: Path, drawing: Drawing) -> int:
    """Write {prompt, category, answers: [{text, tokens, ended, scores}]} for each prompt, equal and empty answers left out.

    Lines that are in the file already are kept. Gives the number of prompts that are too long for the model's context.
    """
    adapter, members = Adapter.load(policy), Adapter.load(reward).members
    judges = {f"reward{number}": member for number, member in enumerate(members)}
    model = RoleModel.load(base_of(adapter, BaseOptions()), {"policy": adapter, **judges})
    rows, too_long = _fitting(model, read_records(prompts, "prompts"), drawing.max_new_tokens)
    size = max(1, drawing.batch_size // drawing.answers)
    done = _whole_batches(path, size, len(rows))
    with progress("round: answers", len(rows), done) as advance, path.open("a", encoding="utf-8") as file:
        for start in range(done, len(rows), size):
            batch = rows[start : start + size]
            file.writelines(json.dumps(line) + "\n" for line in _batch(model, judges, batch, drawing, start))
            file.flush()
            os.fsync(file.fileno())
            advance(len(batch))
    return too_long


def _fitting(model: RoleModel, records: Sequence[dict], new_tokens: int) -> tuple[list[tuple[dict, list[int]]], int]:
    """Records with the tokens of their prompts, short ones first (similar lengths share a batch), and how many are too long."""
    encoded = [(record, model.base.encode_prompt(record["prompt"])) for record in records]
    fitting = sorted((row for row in encoded if len(row[1]) + new_tokens <= model.base.context), key=lambda row: len(row[1]))
    return fitting, len(encoded) - len(fitting)


def _whole_batches(path: Path, size: int, rows: int) -> int:
    """How many prompts of the file are done; what was being written when the process was killed is cut off."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    done = len(whole) if len(whole) == rows else len(whole) // size * size
    write_text(path, "".join(whole[:done]))
    return done


def _batch(model: RoleModel, judges: dict[str, Adapter], batch: list[tuple[dict, list[int]]], drawing: Drawing, start: int) -> list[dict]:
    prompts = [ids for _, ids in batch for _ in range(drawing.answers)]
    sampling = Sampling(drawing.max_new_tokens, drawing.temperature)
    drawn = generate(model, prompts, "policy", sampling, seed=1_000_003 * drawing.seed + start, batch_size=len(prompts))
    texts = [model.base.decode(ids) for ids in drawn]
    # As the text that is voted on, which ends: not as the tokens of one that was cut off.
    sequences = [(prompt, model.base.encode_completion(text)) for prompt, text in zip(prompts, texts, strict=True)]
    scores = score(model, list(judges), sequences, batch_size=len(prompts)).tolist()
    names = [f"reward {adapter.sha256[:8]}" for adapter in judges.values()]
    found = iter(zip(drawn, texts, *scores, strict=True))
    lines = []
    for record, _ in batch:
        answers: dict[str, dict] = {}
        for ids, text, *given in islice(found, drawing.answers):
            said = {"text": text, "tokens": len(ids), "ended": ids[-1] in model.base.stop_ids}
            if text.strip():
                answers.setdefault(text.strip(), said | {"scores": dict(zip(names, given, strict=True))})
        category = record.get("category")
        lines.append(
            {"prompt": record["prompt"], "category": category if isinstance(category, str) else None, "answers": [*answers.values()]}
        )
    return lines


def put_up(store: Store, path: Path, policy: Path, name: str, drawing: Drawing) -> list[int]:
    """The drawn answers as items of the store, in one transaction; a second time they are the same items.

    Prompts with fewer than two different answers give none.
    """
    adapter = Adapter.load(policy)
    candidate = Candidate(name, adapter.base_id, adapter.sha256)
    how = {key: value for key, value in asdict(drawing).items() if key in ("max_new_tokens", "temperature")}
    items = []
    with store.writing():
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if len(line["answers"]) < 2:
                continue
            answers = [Answer(candidate, answer["text"], how, drawing.seed) for answer in line["answers"]]
            item = store.add_item(line["prompt"], answers, use_case=line["category"])
            items.append(item.id)
            for judge, scores in _by_judge(line["answers"]).items():
                store.add_scores(judge, dict(zip(item.answers, scores, strict=True)))
    if not items:
        raise InstructLiteError(f"{path}: no prompt has two different answers to compare; raise round.temperature or round.answers")
    return items


def _by_judge(answers: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {judge: [answer["scores"][judge] for answer in answers] for judge in answers[0]["scores"]}
