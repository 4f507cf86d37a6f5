"""How long each stage will take: the tokens that it reads, learns from and samples, by what was measured of this machine.

Not in it: downloads, language models that judge, side effects, and what the first stage takes to load the libraries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import Loop, kind_of
from ..data.parts import parts_of, sources_of
from ..data.records import as_groups, read_ptx
from ..models.memory import Shapes
from .calibration import Speed
from .devices import Device
from .lengths import ASSUMED_ANSWER, ASSUMED_PROMPT, Lengths, counter, rows_of
from .stages import Asked, asked_of, at_most

UNKNOWN = 1000
"""Rows that are planned of data that is not here."""
COUNTED = 1000  # rows of a part whose tokens are counted; the others are taken to be like them
EPOCHS = 3  # Trainer's default
ANCHORS = 256  # demonstrations that a reward model's scores are shifted by
SAMPLE = 2 * 64  # tokens that reward.policy_samples draws for a prompt


@dataclass(frozen=True)
class Part:
    """Rows of data: of each the tokens of its sequences, prompts included. scale: so many rows each of them stands for."""

    rows: Sequence[Sequence[int]]
    answers: float = 0
    """Tokens of all answers."""
    scale: float = 1.0

    @property
    def tokens(self) -> float:
        return self.scale * sum(map(sum, self.rows))

    @property
    def mean(self) -> float:
        """Tokens of a sequence."""
        return sum(map(sum, self.rows)) / sum(map(len, self.rows))

    @property
    def longest(self) -> int:
        return max(map(max, self.rows))

    def __len__(self) -> int:
        return round(self.scale * len(self.rows))

    def padded(self, batch: int, limit: int | None = None) -> float:
        """Tokens of batches of similar length, each as long as its longest sequence; rows beyond the limit are left out."""
        rows = sorted((row for row in self.rows if limit is None or max(row) <= limit), key=max)
        batches = (rows[start : start + batch] for start in range(0, len(rows), batch))
        return self.scale * sum(sum(map(len, part)) * max(part[-1]) for part in batches)

    @classmethod
    def of(cls, rows: list[dict], sequences: Callable[[dict], tuple[list[int], int]]) -> Part:
        some = rows[:: max(1, len(rows) // COUNTED)]
        counted = [sequences(row) for row in some]
        scale = len(rows) / len(some)
        return cls([own for own, _ in counted], scale * sum(answers for _, answers in counted), scale)


@dataclass(frozen=True)
class Duration:
    """seconds: of the stage, or, where its data is not here, for each 1,000 rows."""

    stage: str
    seconds: float
    known: bool

    def __str__(self) -> str:
        return in_words(self.seconds) + ("" if self.known else f" per {UNKNOWN:,} rows")


def in_words(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.0f} s"


def durations(loop: Loop, speed: Speed, device: Device, shapes: Shapes, lengths: Lengths) -> list[Duration]:
    """Of every stage. Answers are taken to be as long as the demonstrations', or as allowed where there are none here."""
    parts, known = parts_in(loop, lengths)
    found = []
    for stage in (*loop.trained, "report"):
        work = _Work(asked_of(stage, loop, device, shapes, lengths), speed, parts, loop)
        seconds, of_rows = _SECONDS[kind_of(stage)](work)
        found.append(Duration(stage, seconds, known or not of_rows))
    return found


def parts_in(loop: Loop, lengths: Lengths) -> tuple[dict[str, Part], bool]:
    """The pipeline's files, and whether they are those of data that is here."""
    count = counter(loop.model)

    def single(row: Mapping[str, Any]) -> tuple[list[int], int]:
        answer = count(row["completion"])
        return [count(row["prompt"]) + answer], answer

    def group(row: Mapping[str, Any]) -> tuple[list[int], int]:
        prompt, answers = count(row["prompt"]), [*map(count, row["responses"])]
        return [prompt + answer for answer in answers], sum(answers)

    def prompt(row: Mapping[str, Any]) -> tuple[list[int], int]:
        return [count(row["prompt"])], 0

    def text(row: Mapping[str, Any]) -> tuple[list[int], int]:
        return ([count(row["text"])], 0) if "text" in row else single(row)

    rows = {name: rows_of(*source) for name, source in sources_of(loop.data).items()}
    if any(own is None for own in rows.values()):
        return _assumed(lengths), False
    texts = {stage: rows_of(source, None, read_ptx) or [] for stage, source in loop.texts.items() if source != "demonstrations"}
    parts = parts_of(loop.data, rows | texts, loop.texts)
    found = {name: Part.of(parts[name], single) for name in ("demonstrations", "heldout_demonstrations")}
    found |= {name: Part.of(as_groups(parts[name]), group) for name in ("reward", "judge", "heldout")}
    found |= {name: Part.of(parts[name], prompt) for name in ("prompts", "heldout_prompts")}
    return found | {stage: Part.of(parts[stage], text) for stage in loop.texts if parts[stage]}, True


def _assumed(lengths: Lengths) -> dict[str, Part]:
    prompt, answer = lengths.prompt or ASSUMED_PROMPT, lengths.completion or lengths.answer or ASSUMED_ANSWER
    one, two = (Part([[prompt + answer] * k], k * UNKNOWN * answer, UNKNOWN) for k in (1, lengths.answers))
    alone = Part([[prompt]], 0, UNKNOWN)
    held = {"heldout_demonstrations": one, "heldout": two, "heldout_prompts": alone}
    return {"demonstrations": one, "reward": two, "judge": two, "prompts": alone, **held}


@dataclass(frozen=True)
class _Work:
    """What a stage goes through."""

    asked: Asked
    speed: Speed
    parts: Mapping[str, Part]
    loop: Loop

    @cached_property
    def training(self) -> dict[str, Any]:
        return self.asked.training

    @property
    def batch(self) -> int:
        """Rows of a step, over all processes."""
        return self.training["per_device_train_batch_size"] * self.training["gradient_accumulation_steps"] * self.asked.device.count

    def passes(self, rows: int) -> float:
        """How often the rows are gone through."""
        steps = self.training.get("max_steps", -1)
        return steps * self.batch / rows if steps > 0 else self.training.get("num_train_epochs", EPOCHS)

    def learning(self, part: Part, heads: float = 0) -> float:
        """Seconds of TRL's training on these rows. heads: how often a token of the answers goes through the head."""
        speed = self.speed
        again = speed.read if self.asked.checkpointing else 0.0
        tokens = part.padded(self.training["per_device_train_batch_size"], self.training["max_length"])
        seconds = tokens * (speed.lower + speed.train + again) + heads * part.answers * speed.head_learnt
        return self.passes(len(part)) * seconds / self.asked.device.count

    def reading(self, part: Part, heads: float = 0) -> float:
        tokens = part.padded(self.training["per_device_eval_batch_size"], self.training["max_length"])
        return tokens * (self.speed.lower + self.speed.read) + heads * part.answers * self.speed.head

    def answer(self, longest: int) -> float:
        """Tokens of an answer that may have so many."""
        part = self.parts["demonstrations"]
        return min(longest, part.answers / len(part))


def _sft(work: _Work) -> tuple[float, bool]:
    train, held = work.parts["demonstrations"], work.parts["heldout_demonstrations"]
    return work.speed.load + work.learning(train, heads=1) + 2 * work.reading(held, heads=1), _by_rows(work)


def _reward(work: _Work) -> tuple[float, bool]:
    train, held, shown = work.parts[work.asked.stage], work.parts["heldout"], work.parts["demonstrations"]
    options, speed = work.asked.options, work.speed
    seconds = speed.load + work.learning(train) + work.reading(held) + work.reading(shown) * min(1, ANCHORS / len(shown))
    if share := options.get("policy_samples"):
        seconds += speed.load + share * len(train) * SAMPLE * speed.sample
    return seconds * (options["ensemble"] if work.asked.stage == "reward" else 1), _by_rows(work)


def _dpo(work: _Work) -> tuple[float, bool]:
    """The reference reads what the policy learns from."""
    train, held, speed = work.parts["reward"], work.parts["heldout"], work.speed
    reference = work.passes(len(train)) * (train.tokens * (speed.lower + speed.read) + train.answers * speed.head)
    return speed.load + work.learning(train, heads=1) + reference + 2 * work.reading(held, heads=1), _by_rows(work)


def _ppo(work: _Work) -> tuple[float, bool]:
    training, speed, asked = work.training, work.speed, work.asked
    prompts, epochs = work.parts["prompts"], training.get("num_ppo_epochs", 4)
    rollout, response = asked.rollout, training["response_length"]
    answer, steps = work.answer(response), training.get("max_steps", -1)
    padded = at_most(training.get("max_prompt_length"), prompts.longest, ASSUMED_PROMPT) + response
    tokens = rollout * (min(prompts.mean + answer, padded) if asked.padding_free else padded)
    if episodes := training.get("total_episodes"):
        cycles = episodes / (rollout * asked.device.count)
    elif steps > 0:
        cycles = steps / (epochs * training["num_mini_batches"])
    else:
        cycles = training.get("num_train_epochs", EPOCHS) * len(prompts) / (rollout * asked.device.count)
    roles = 3 + asked.options["ensemble"] + (asked.options.get("watch_reward") is not None)  # policy, reference, value and rewards
    passes = roles + 2 * epochs  # of which the policy and the value learn in each epoch
    lower = tokens * speed.shared * (1 if training["share_lower_layers"] else passes)
    learnt = 2 * epochs * tokens * (speed.learn + (speed.upper if asked.checkpointing else 0.0))
    heads = rollout * answer * (2 * speed.head + epochs * speed.head_learnt)
    # A batch of answers takes as long as its longest, which is rarely shorter than is allowed.
    seconds = rollout * response * speed.sample + lower + roles * tokens * speed.upper + learnt + heads
    if texts := work.parts.get(asked.stage):
        tokens = epochs * rollout * min(texts.mean, ASSUMED_PROMPT)
        seconds += tokens * (speed.shared + speed.learn + speed.head_learnt)
    return speed.load + cycles * seconds, not (episodes or steps > 0)


def _report(work: _Work) -> tuple[float, bool]:
    """Everybody answers; two reward models, the ensemble's others beside them, read what was answered."""
    options, speed, asked = work.loop.evaluation, work.speed, work.asked
    prompts, held = work.parts["heldout_prompts"], work.parts["heldout_demonstrations"]
    count, policies = min(len(prompts), options.prompts or len(prompts)), asked.options["policies"]
    candidates = options.candidates or ["base", "sft", *work.loop.also, "ppo"]
    draws = sum(int(found[1]) if (found := re.match(r"best-of-(\d+)", name)) else 1 for name in candidates)
    sampled, greedy = count * options.samples, count * len(candidates) * options.greedy
    answer = work.answer(options.max_new_tokens)
    width = prompts.mean + answer
    sampling = (sampled * draws + greedy) * options.max_new_tokens * speed.answer
    scoring = (sampled * draws + greedy) * width * (speed.lower + (1 + asked.options["ensemble"]) * speed.score)
    kl = (policies - 1) * sampled * (width * (speed.lower + 2 * speed.score) + 2 * answer * speed.head)
    perplexity = held.tokens * (speed.lower + len(candidates) * speed.score) + len(candidates) * held.answers * speed.head
    return speed.load + sampling + scoring + kl + perplexity, options.prompts is None


def _by_rows(work: _Work) -> bool:
    """Whether more rows take longer."""
    return work.training.get("max_steps", -1) <= 0


_SECONDS: dict[str, Callable[[_Work], tuple[float, bool]]] = {
    "sft": _sft, "reward": _reward, "judge": _reward, "dpo": _dpo, "ppo": _ppo, "report": _report
}  # fmt: skip
