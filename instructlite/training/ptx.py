"""PPO-ptx (Ouyang 2022, eq. 2): the log-likelihood of ordinary text, added to PPO so that the policy does not forget it.

Which rows a micro-step sees is a function of (seed, micro-step, rank), so a resumed run goes on with the right ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InstructLiteError
from ..models.base import Base
from ..models.roles import ResponseBatch, RoleModel
from .cycle import generator
from .ppo_config import PPOConfig

MAX_LENGTH = 1024  # tokens of a row; the rest of a longer text is not used


class PtxLoss:
    """-log pi(text), summed over the tokens of one micro-batch and divided by those of the whole optimiser step.

    Rows are texts (all tokens count) or demonstrations (only the completion does). Policy adapter only.
    """

    def __init__(self, base: Base, dataset: Any, args: PPOConfig):
        self.base, self.args = base, args
        self.rows = [_encode(base, row) for row in dataset]
        if len(self.rows) < self.rows_per_step:
            raise InstructLiteError(f"ptx_data: {len(self.rows)} rows, but one optimiser step takes {self.rows_per_step}; add rows")

    @property
    def rows_per_step(self) -> int:
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def __call__(self, model: RoleModel, micro_step: int) -> tuple[Tensor, Tensor]:
        """The loss of one micro-step on this process, and -log pi of each of its tokens (tokens,) for the log."""
        step, micro = divmod(micro_step, self.args.gradient_accumulation_steps)
        chosen = self._rows_of(step)
        tokens = sum(len(ids) - first for ids, first in chosen)
        b = self.args.per_device_train_batch_size
        start = (micro * self.args.world_size + self.args.process_index) * b
        batch = self._batch(chosen[start : start + b])
        log_probs, _ = model.policy_pass(batch)
        return -log_probs.sum() / tokens, -log_probs.detach()

    def _rows_of(self, step: int) -> list[tuple[list[int], int]]:
        """All rows of one optimiser step: every pass over the data in another order."""
        passes, place = divmod(step, len(self.rows) // self.rows_per_step)
        order = torch.randperm(len(self.rows), generator=generator(self.args.seed, passes, 4))
        return [self.rows[i] for i in order[place * self.rows_per_step : (place + 1) * self.rows_per_step].tolist()]

    def _batch(self, rows: list[tuple[list[int], int]]) -> ResponseBatch:
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), self.base.pad_id)
        attention, mask = torch.zeros_like(ids), torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for i, (tokens, first) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            attention[i, : len(tokens)] = 1
            mask[i, first - 1 : len(tokens) - 1] = True  # column t of the mask is token t + 1
        device = self.base.device
        return ResponseBatch(ids.to(device), attention.to(device), mask.to(device), chunk=self.args.logp_chunk_size)


def _encode(base: Base, row: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids, and the index of the first one whose log-probability counts (the very first token has none)."""
    if "text" in row:
        ids = base.tokenizer(row["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids[: MAX_LENGTH - 1], base.tokenizer.eos_token_id], 1
    prompt = base.encode_prompt(row["prompt"])
    return (prompt + base.encode_completion(row["completion"]))[:MAX_LENGTH], len(prompt)
