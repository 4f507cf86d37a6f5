"""Rows answered in lock-step: one forward pass of one batch gives every row its next token, whoever asked, by whichever adapter.

A row computes with its own adapter, stops at its own length and draws from its own generator, so that its answer depends on no
neighbour but by rounding: with the scores of a float32 base nothing is seen of it; in bfloat16 tokens that are all but equally likely may
change places.
Left out: models whose state is no list of keys and values (Mamba), prompts in pieces, sharing the cache of a common beginning.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from .roles import RoleModel, positions_of
from .sampling import Sampling, left_pad, next_tokens

Finish = Literal["stop", "length", "broken"]


@dataclass(eq=False)
class Row:
    """A prompt and its answer so far: `ids`, up to and including the stop token."""

    prompt: list[int]
    role: str | None
    sampling: Sampling
    seed: int
    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    """Why it is over: a stop token, `max_new_tokens` of them, or scores that were no numbers."""

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)


@dataclass
class Batch:
    """Rows with at least one token each, and the keys and values of all but their last tokens; padding is on the left."""

    rows: list[Row]
    cache: DynamicCache
    attention: Tensor


class Lockstep:
    """The batch of a model. Rows `join` after their prompts went through the model, and leave by not being kept."""

    def __init__(self, model: RoleModel):
        self.model = model
        self.batch: Batch | None = None
        self._mixture = model.mixture([])

    @property
    def rows(self) -> list[Row]:
        return self.batch.rows if self.batch else []

    def prefill(self, rows: list[Row]) -> Batch:
        """A batch of its own, with the first token of each row."""
        ids, attention = left_pad([row.prompt for row in rows], self.model.base.pad_id, self.model.device)
        batch = Batch(rows, DynamicCache(), attention)  # without the config: no layer may drop what is behind its window
        self._advance(batch, ids)
        return batch

    def join(self, other: Batch) -> None:
        """Both batches as one: the shorter one gets columns on its left that nothing attends to."""
        own, self.batch = self.batch, other
        if own is None:
            return
        length = max(own.attention.shape[1], other.attention.shape[1])
        parts = [(batch, length - batch.attention.shape[1]) for batch in (own, other)]
        for layers in zip(own.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                padded = [pad(getattr(layer, name), (0, 0, n, 0)) for layer, (_, n) in zip(layers, parts, strict=True)]
                setattr(layers[0], name, torch.cat(padded))
        attention = torch.cat([pad(batch.attention, (n, 0)) for batch, n in parts])
        self.batch = Batch([*own.rows, *other.rows], own.cache, attention)

    def step(self) -> None:
        """The next token of every row."""
        batch = self.batch
        batch.attention = pad(batch.attention, (0, 1), value=1)
        self._advance(batch, torch.tensor([row.ids[-1:] for row in batch.rows], device=self.model.device))

    def keep(self, rows: list[Row]) -> None:
        """All others leave; so do columns that are padding in every row that stays."""
        if len(rows) == len(self.rows):
            return
        batch, self.batch = self.batch, None
        if not rows:
            return
        index = torch.tensor([batch.rows.index(row) for row in rows], device=self.model.device)
        attention = batch.attention[index]
        unused = int(attention.any(0).int().argmax())
        for layer in batch.cache.layers:
            layer.keys, layer.values = layer.keys[index, :, unused:], layer.values[index, :, unused:]
        self.batch = Batch(rows, batch.cache, attention[:, unused:])

    @torch.no_grad()
    def _advance(self, batch: Batch, ids: Tensor) -> None:
        model, roles = self.model, [row.role for row in batch.rows]
        positions = positions_of(batch.attention)[:, -ids.shape[1] :]
        with model.precision(), self._computing(roles):
            states = model.backbone(
                input_ids=ids, attention_mask=batch.attention, position_ids=positions, past_key_values=batch.cache, use_cache=True
            ).last_hidden_state
            scores = model.logits(states[:, -1])
        sound = scores.amax(-1).isfinite().tolist()
        tokens = next_tokens(scores, [row.sampling for row in batch.rows], [row.generator for row in batch.rows])
        for row, token, numbers in zip(batch.rows, tokens, sound, strict=True):
            row.ids.append(token)
            row.finish = self._finish(row) if numbers else "broken"

    def _computing(self, roles: list[str | None]) -> AbstractContextManager[None]:
        if len(set(roles)) == 1:
            return self.model.active(roles[0])
        if new := set(roles) - {None, *self._mixture.names}:
            self._mixture = self.model.mixture([*self._mixture.names, *new])
        return self.model.mixed(roles, self._mixture)

    def _finish(self, row: Row) -> Finish | None:
        if row.ids[-1] in self.model.base.stop_ids:
            return "stop"
        return "length" if len(row.ids) == row.sampling.max_new_tokens else None
