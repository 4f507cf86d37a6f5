"""Batched generation, scores and log-probabilities of the roles of one base; rows of a batch may have different roles.

Generation starts from a blank generation config: what a model's own file asks for (top_k 20, repetition penalty 1.05 …)
would make the sampled distribution differ from the one PPO scores. Log-probabilities never come from generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import InstructLiteError
from . import memory
from .logprobs import token_log_probs
from .roles import RoleModel

Sequence = tuple[list[int], list[int]]  # prompt ids, completion ids
Progress = Callable[[int], None]  # called with the number of rows just finished


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution as it is."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # "not (…)" refuses NaN, too
        for name, value, fits, expected in (
            ("max_new_tokens", self.max_new_tokens, lambda n: n >= 1, "a whole number from 1"),
            ("temperature", self.temperature, lambda t: 0 <= t < math.inf, "a number from 0 (greedy)"),
            ("top_k", self.top_k, lambda k: k >= 0, "a whole number from 0 (all tokens)"),
            ("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0, at most 1"),
        ):
            kind = int if name in ("max_new_tokens", "top_k") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise InstructLiteError(f"{name}={str(value)[:40]}: expected {expected}")


def generate(
    model: RoleModel,
    prompts: list[list[int]],
    roles: list[str | None] | str | None,
    sampling: Sampling,
    *,
    stop_ids: list[int] | None = None,
    seed: int | list[int] = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[int]]:
    """One answer a prompt, as token ids up to and including the first stop token (or `max_new_tokens` of them).

    roles: one for all, or one a prompt (None = the base alone), then answered in mixed batches. The random state of the
    caller is left untouched; the same seed gives the same answers for the same batches. One seed a prompt gives each answer
    random numbers of its own, so that what is drawn beside it changes nothing but rounding.
    """
    stop_ids = stop_ids or model.base.stop_ids
    per_row = roles if isinstance(roles, list) else [roles] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths share a batch: less padding
    answers: list[list[int]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _ready_to_generate(model), torch.no_grad():
        torch.manual_seed(seed if isinstance(seed, int) else 0)
        for rows in _batches(order, batch_size):
            ids, attention = left_pad([prompts[i] for i in rows], model.base.pad_id, model.device)
            points = None if isinstance(seed, int) else _points([seed[i] for i in rows], sampling, model.device)
            output = _generate_batch(
                model, ids, attention, [per_row[i] for i in rows], _config(model, sampling, stop_ids), _drawn(sampling, points)
            )
            for i, row in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = until_stop(row, stop_ids)
            if progress:
                progress(len(rows))
    return answers


def bytes_per_answer(model: RoleModel, length: int) -> int:
    """What a row of a batch takes while `generate` runs, for `length` tokens, prompt and answer."""
    return memory.answer(memory.Shapes.of(model.base.model.config.get_text_config()), memory.SIZES[model.base.dtype], length)


def _generate_batch(
    model: RoleModel, ids: Tensor, attention: Tensor, roles: list[str | None], config: GenerationConfig, drawn: LogitsProcessorList
) -> Tensor:
    with model.precision(), model.active(roles[0]) if len(set(roles)) == 1 else model.mixed(roles):
        return model.generate(input_ids=ids, attention_mask=attention, generation_config=config, logits_processor=drawn)


def _config(model: RoleModel, sampling: Sampling, stop_ids: list[int]) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=stop_ids, pad_token_id=model.base.pad_id,
        bos_token_id=model.base.tokenizer.bos_token_id, repetition_penalty=1.0, use_cache=True,
    )  # fmt: skip


def _points(seeds: list[int], sampling: Sampling, device: torch.device) -> Tensor:
    """(batch, max_new_tokens) random numbers of each row's own."""
    drawn = [torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(device)


def _drawn(sampling: Sampling, points: Tensor | None = None) -> LogitsProcessorList:
    """What turns a greedy search into sampling: transformers' own filters, then the draw. Empty for greedy answers."""
    return LogitsProcessorList([*_filters(sampling), Draw(points)] if sampling.temperature else [])


def _filters(sampling: Sampling) -> LogitsProcessorList:
    filters: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        filters.append(TemperatureLogitsWarper(float(sampling.temperature)))  # it refuses whole numbers
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        filters.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(filters)


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn from softmax(scores)."""

    def __init__(self, points: Tensor | None = None):
        """points: the random numbers (batch, tokens); None draws them when they are wanted, with the random state of the thread."""
        self.points, self.drawn = points, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.points is None:
            points = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        else:
            points = self.points[:, self.drawn, None]
            self.drawn += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_at(points, scores), 0.0)


def drawn_at(points: Tensor, scores: Tensor) -> Tensor:
    """Tokens (rows, 1) where the distribution functions of softmax(scores) pass `points`, fp64 (rows, 1) in [0, 1).

    One random number a row; `torch.multinomial`, which sampling in transformers uses, makes one for each token of the
    vocabulary: a tenth of the time of generation on a CPU when measured. Sums are in fp64, or rare tokens would be lost.
    """
    cumulative = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)  # right: never a token of probability 0


def next_tokens(scores: Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> list[int]:
    """One token for each row of fp32 scores (rows, vocabulary), each drawn in its own way with one number of its own CPU generator."""
    tokens = scores.argmax(-1)
    for sampling in dict.fromkeys(samplings):
        if sampling.temperature == 0:
            continue
        rows = [i for i, other in enumerate(samplings) if other == sampling]
        points = torch.stack([torch.rand(1, dtype=torch.float64, generator=generators[i]) for i in rows])
        tokens[rows] = drawn_at(points.to(scores.device), _filters(sampling)(None, scores[rows]))[:, 0]
    return tokens.tolist()


@contextmanager
def _ready_to_generate(model: RoleModel) -> Iterator[None]:
    """Eval mode (checkpointed layers in train mode drop the KV cache) and no generation config of the model's own.

    Fields that ours leaves unset would be filled from the model's file. And the last column of the prompt's hidden states is
    made contiguous for the language-model head: as a strided slice it is multiplied row by row with a copy of the whole head
    for each (SmolLM2-135M on a CPU: 57 MB a row, and seconds).
    """
    training, own = model.training, model.base.model.generation_config
    model.eval()
    model.base.model.generation_config = GenerationConfig()
    head = model.base.model.get_output_embeddings()
    contiguous = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        contiguous.remove()
        model.base.model.generation_config = own
        model.train(training)


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids up to and including the first stop token."""
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids


def left_pad(rows: list[list[int]], pad_id: int, device: torch.device, length: int | None = None) -> tuple[Tensor, Tensor]:
    """(batch, length) ids and attention mask, content at the right end."""
    length = length or max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    attention = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = torch.tensor(row)
        attention[i, length - len(row) :] = 1
    return ids.to(device), attention.to(device)


@torch.no_grad()
def score(
    model: RoleModel, roles: list[str], sequences: list[Sequence], *, batch_size: int = 32, progress: Progress | None = None
) -> Tensor:
    """Scalar heads of reward roles at the last token of prompt + completion: fp32 (roles, sequences) on the CPU."""
    scores = torch.empty(len(roles), len(sequences))
    for rows, number, hidden, _ in _forward(model, roles, sequences, batch_size, progress):
        scores[number, rows] = model.scores(roles[number], hidden[:, -1]).cpu()
    return scores


@torch.no_grad()
def last_states(model: RoleModel, role: str | None, sequences: list[Sequence], *, batch_size: int = 32) -> Tensor:
    """The last layer's hidden state at the last token: fp32 (sequences, hidden) on the CPU."""
    states = torch.empty(len(sequences), model.base.model.config.get_text_config().hidden_size)
    for rows, _, hidden, _ in _forward(model, [role], sequences, batch_size, None):
        states[rows] = hidden[:, -1].float().cpu()
    return states


@torch.no_grad()
def log_probs(
    model: RoleModel,
    roles: list[str | None],
    sequences: list[Sequence],
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """For each role (None = the base) the per-token log-probabilities of each completion given its prompt, in nats."""
    results: list[list[Tensor]] = [[torch.empty(0)] * len(sequences) for _ in roles]
    for rows, number, hidden, ids in _forward(model, roles, sequences, batch_size, progress):
        for i, h, row in zip(rows, hidden, ids, strict=True):
            n = len(sequences[i][1])
            with model.precision(), model.active(roles[number]):
                results[number][i] = token_log_probs(model.logits, h[-n - 1 : -1], row[-n:], temperature=temperature)[0].cpu()
    return results


def _forward(
    model: RoleModel, roles: Iterable[str | None], sequences: list[Sequence], batch_size: int, progress: Progress | None
) -> Iterator[tuple[list[int], int, Tensor, Tensor]]:
    """Left-padded batches in order of length, each by every role: row numbers, number of the role, last hidden states, ids.

    The layers below all adapters run once a batch, whatever the number of roles.
    """
    training = model.training
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    try:
        for rows in _batches(order, batch_size):
            ids, attention = left_pad([sequences[i][0] + sequences[i][1] for i in rows], model.base.pad_id, model.device)
            with model.precision():
                lower = model.lower_hidden(ids, attention)
            for number, role in enumerate(roles):
                with model.precision(), model.active(role):
                    hidden = model.hidden(ids, attention, lower)
                yield rows, number, hidden, ids
            if progress:
                progress(len(rows))
    finally:
        model.train(training)


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
