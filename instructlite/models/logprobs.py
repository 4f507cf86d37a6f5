"""Log-probabilities and entropies of chosen tokens without ever holding a (batch, length, vocabulary) tensor.

Logits are made for a few hundred tokens at a time. Under gradients each chunk is recomputed in the backward pass, so the
peak is one chunk's logits, however long the responses and however large the vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 512


def token_log_probs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy, both (tokens,) in nats, of the distribution softmax(logits / temperature).

    logits_of: (n, hidden) -> fp32 (n, vocabulary); hidden: (tokens, hidden); tokens: (tokens,). The entropy carries a
    gradient only if `entropy_grad`.
    """

    def one_chunk(h: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(h) / temperature
        log_z = logits.logsumexp(-1)
        log_probs = logits.gather(-1, chosen[:, None])[:, 0] - log_z
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            # H = log Z - E[logit]; needs one vocabulary-wide product instead of a log-softmax kept beside the logits
            entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        return log_probs, entropy if entropy_grad else entropy.detach()

    parts = []
    for h, chosen in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
        grad = torch.is_grad_enabled() and h.requires_grad
        parts.append(checkpoint(one_chunk, h, chosen, use_reentrant=False) if grad else one_chunk(h, chosen))
    if not parts:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    log_probs, entropy = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropy)
