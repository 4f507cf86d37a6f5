"""T-15: log-probabilities and entropies in chunks equal the full softmax, and no tensor of (batch, length, vocabulary) exists."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from instructlite.models.base import lora_config
from instructlite.models.logprobs import token_log_probs
from instructlite.models.roles import ResponseBatch, RoleModel

TOKENS, HIDDEN, VOCABULARY = 23, 16, 50


def full(logits_of, hidden, tokens, temperature):
    log_softmax = torch.log_softmax(logits_of(hidden) / temperature, -1)
    return log_softmax.gather(-1, tokens[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_t15_chunks_equal_the_full_softmax_with_gradients(chunk, temperature, frozen_head):
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY).requires_grad_(not frozen_head)
    hidden, tokens, weights = torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    options = dict(chunk=chunk, entropy_grad=True, frozen_head=frozen_head)
    results = []
    for function in (full, lambda *a: token_log_probs(*a[:3], temperature=a[3], **options)):
        h = hidden.clone().requires_grad_()
        head.weight.grad = None
        log_probs, entropy = function(head, h, tokens, temperature)
        (log_probs @ weights + 0.3 * (entropy @ weights)).backward()
        results.append((log_probs.detach(), entropy.detach(), h.grad, torch.zeros(1) if frozen_head else head.weight.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)


def test_t15_entropy_carries_no_gradient_unless_asked():
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    log_probs, entropy = token_log_probs(head, hidden, torch.zeros(TOKENS, dtype=torch.long))
    assert log_probs.requires_grad and not entropy.requires_grad


def test_t15_lora_on_the_head_is_not_ignored(tiny_base, tiny_lora):
    config = lora_config(tiny_lora, tiny_base.model, "CAUSAL_LM")
    config.target_modules = {"lm_head"}
    model = RoleModel.load(tiny_base, {"policy": config})
    with torch.no_grad():
        for parameter in model.role_parameters("policy"):
            parameter.normal_(std=0.2)
    hidden, tokens = torch.randn(5, 32), torch.arange(5)
    with model.active("policy"):
        adapted = token_log_probs(model.logits, hidden, tokens)[0]
    with model.active(None):
        plain = token_log_probs(model.logits, hidden, tokens)[0]
    assert (adapted - plain).abs().max() > 0.1


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_t15_no_tensor_as_large_as_batch_x_length_x_vocabulary(tiny_base, tiny_lora):
    model = RoleModel.for_ppo(tiny_base, lora_config(tiny_lora, tiny_base.model, "CAUSAL_LM"))
    model.set_trainable(["policy", "value"])
    batch, length, vocabulary = 8, 24, 260
    ids = torch.randint(4, vocabulary, (batch, 6 + length))
    response = ResponseBatch(ids, torch.ones_like(ids), torch.ones(batch, length, dtype=torch.bool), chunk=32)
    with LargestTensor() as largest:
        out = model(response=response)
        (out["logps"].sum() + out["values"].sum()).backward()
    assert largest.elements < batch * length * vocabulary / 2
