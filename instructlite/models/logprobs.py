"""Log-probabilities and entropies of chosen tokens without ever holding a (batch, length, vocabulary) tensor.

Logits are made for a few hundred tokens at a time. A token's log-probability depends on its own hidden state only, so
its whole gradient is one row (hidden,): with a frozen head it is computed on the spot, while the chunk's logits are
there, and the backward pass neither keeps nor recomputes them. A head that is trained is recomputed instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 256

ChunkLogProbs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def token_log_probs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    entropy_grad: bool = False,
    frozen_head: bool = True,
) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy, both (tokens,) in nats, of the distribution softmax(logits / temperature).

    logits_of: (n, hidden) -> fp32 (n, vocabulary); hidden: (tokens, hidden); tokens: (tokens,). The entropy carries a
    gradient only if `entropy_grad`. frozen_head: no parameter inside `logits_of` is trained.
    """

    def one_chunk(h: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(h)
        if temperature != 1.0:
            logits = logits / temperature
        log_z = logits.logsumexp(-1)
        log_probs = logits.gather(-1, chosen[:, None])[:, 0] - log_z
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            # H = log Z - E[logit]: a batched dot product, no second vocabulary-wide tensor beside the probabilities
            entropy = log_z - torch.linalg.vecdot(torch.softmax(logits, -1), logits)
        return log_probs, entropy if entropy_grad else entropy.detach()

    if torch.is_grad_enabled() and hidden.requires_grad and frozen_head:
        return _FrozenHeadLogProbs.apply(hidden, tokens, one_chunk, chunk, entropy_grad)
    parts = []
    for h, chosen in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
        parts.append(checkpoint(one_chunk, h, chosen, use_reentrant=False) if torch.is_grad_enabled() else one_chunk(h, chosen))
    if not parts:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    log_probs, entropy = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropy)


class _FrozenHeadLogProbs(torch.autograd.Function):
    """d log pi(token) / d hidden, one row a token, made in the forward pass: two head products a chunk instead of three."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, one_chunk: ChunkLogProbs, chunk: int, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        rows = torch.empty_like(hidden)
        entropy_rows = torch.empty_like(hidden) if entropy_grad else None
        for part in torch.arange(len(hidden), device=hidden.device).split(chunk):
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                log_probs_of_chunk, entropy_of_chunk = one_chunk(h, tokens[part])
                rows[part] = torch.autograd.grad(log_probs_of_chunk.sum(), h, retain_graph=entropy_grad)[0]
                if entropy_grad:
                    entropy_rows[part] = torch.autograd.grad(entropy_of_chunk.sum(), h)[0]
            log_probs[part], entropy[part] = log_probs_of_chunk.detach(), entropy_of_chunk.detach()
        ctx.save_for_backward(rows, entropy_rows)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, log_probs_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, entropy_rows = ctx.saved_tensors
        grad = log_probs_grad[:, None] * rows
        if entropy_rows is not None:
            grad = grad + entropy_grad[:, None] * entropy_rows
        return grad.to(rows.dtype), None, None, None, None
