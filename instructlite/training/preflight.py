"""Before a PPO run: is everything as it should be? What cannot work is refused in one line, what may spoil the run is said.

That base, tokenizer and chat template of the adapters agree, `verify` has checked when they were loaded (manifest.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InstructLiteError
from ..models import memory
from ..models.base import Base
from ..models.manifest import Adapter
from ..models.roles import RoleModel

if TYPE_CHECKING:
    from .ppo_trainer import PPOTrainer

NOT_THE_START = (
    "the reference is not the adapter that the policy started from (or is the base alone), or dropout is on; "
    "build the roles with RoleModel.for_ppo, which copies the SFT adapter into both"
)


def add_watch(model: RoleModel, adapter: Adapter) -> None:
    """Add the role `watch`; raises InstructLiteError for what is no reward adapter, or one that is optimised."""
    if adapter.role != "reward":
        raise InstructLiteError(f"watch_reward={adapter}: a {adapter.role} adapter; give a directory that RewardRecipe wrote")
    if role := next((role for role, source in model.sources.items() if source.sha256 == adapter.sha256), None):
        raise InstructLiteError(f"watch_reward={adapter}: it is what the role {role} is; watch one trained on other comparisons")
    model.add_trained("watch", adapter)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Prompts must be encoded as SFT and the reward model saw them; what ends an answer follows from the base's tokenizer."""
    template, vocabulary = tokenizer.chat_template != base.tokenizer.chat_template, tokenizer.get_vocab() != base.tokenizer.get_vocab()
    if template or vocabulary:
        raise InstructLiteError(
            f"processing_class has another {'chat template' if template else 'vocabulary'} than the base ({base.id}), with which SFT and "
            "reward model were trained; leave processing_class out"
        )


def check_start(model: RoleModel) -> None:
    """The policy starts as its reference, tensor by tensor, so that KL is exactly 0; unless it was given another one."""
    if "reference" not in model.roles or "reference" in model.sources:
        return  # where it is the base, check_reference sees what the policy gives
    policy, reference = model.role_parameters("policy"), model.role_parameters("reference")
    if len(policy) != len(reference) or not all(map(torch.equal, policy, reference)):
        raise InstructLiteError(f"the weights of the policy differ from those of the reference: {NOT_THE_START}")


def check_reference(kl: float, dtype: str) -> None:
    """kl: mean k3 a token between policy and reference before the first update, when both compute the same.

    It is exactly 0 where equal forward passes give equal bits, as on a CPU; what is allowed is a GPU's rounding.
    """
    if not kl <= (1e-8 if dtype == "float32" else 1e-2):
        raise InstructLiteError(
            f"before the first update the policy differs from the reference (KL {kl:.3g} nats a token, should be 0): {NOT_THE_START}"
        )


def check_trainable(model: RoleModel) -> None:
    """Policy, value and its head, and nothing else: a frozen critic gives no error, only a run that does not learn."""
    expected = {role: model.role_parameters(role) for role in ("policy", "value")}
    for role, parameters in expected.items():
        if frozen := sum(not p.requires_grad for p in parameters):
            raise InstructLiteError(
                f"the {role} adapter gets no gradient: {frozen} of its {len(parameters)} tensors are frozen; "
                "leave requires_grad alone after the PPOTrainer is built (PEFT's set_adapter changes it)"
            )
    ours = {id(p) for parameters in expected.values() for p in parameters}
    if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]:
        raise InstructLiteError(
            f"{len(others)} tensors besides policy and value would be trained, {others[0]} first; "
            "leave requires_grad alone after the PPOTrainer is built"
        )


def doubts(trainer: PPOTrainer) -> Iterator[tuple[str, str]]:
    """Name and line of each thing that is no error but may spoil the run."""
    args, model = trainer.args, trainer.unwrapped
    if args.top_k or args.top_p < 1:
        yield "sampling_filter", "top_k / top_p: sampled and scored distributions differ, so KL and ratios are biased; train without them"
    base = model.base
    if args.stop_token_ids and base.end_id not in args.stop_token_ids:
        end = base.tokenizer.convert_ids_to_tokens(base.end_id)
        yield (
            "stop_tokens",
            (
                f"stop_token_ids lacks {base.end_id} ({end}), with which SFT and the reward model end every answer: "
                "responses will run on behind it; add it"
            ),
        )
    for role, adapter in model.sources.items():
        if adapter.role == "reward":
            yield from _doubts_of_reward(role, adapter)
    needed, available = memory_needed(trainer), memory_available(base.device)
    if needed > available:
        yield (
            "memory",
            (
                f"PPO needs about {needed / 1e9:.1f} GB beside the weights and {available / 1e9:.1f} GB are free; lower "
                "per_device_train_batch_size or generation_batch_size or response_length, or set gradient_checkpointing"
            ),
        )


def _doubts_of_reward(role: str, adapter: Adapter) -> Iterator[tuple[str, str]]:
    measured = adapter.metrics
    if "eval_accuracy" not in measured:
        yield f"{role}_unmeasured", f"{adapter}: an unmeasured reward model; with eval_data its recipe would say whether it is above chance"
    elif measured["eval_accuracy_low"] <= 0.5:
        yield (
            f"{role}_at_chance",
            (
                f"{adapter}: right on {measured['eval_accuracy']:.0%} of {measured['eval_pairs']} held-out pairs (95 % interval from "
                f"{measured['eval_accuracy_low']:.0%}), which may be chance; train it on more comparisons, or measure it on more"
            ),
        )


def memory_needed(trainer: PPOTrainer) -> float:
    """Bytes at the peak of a cycle beyond what is allocated before it."""
    args, model = trainer.args, trainer.unwrapped
    cycle = memory.PPOCycle(
        shapes=memory.Shapes.of(model.base.model.config.get_text_config()),
        size=memory.SIZES[model.base.dtype],
        rank=max(config.r for config in model.peft_config.values()),
        shared_layers=model.shared_layers if args.share_lower_layers else 0,
        prompt=trainer.longest_prompt,
        response=args.response_length,
        rollout=args.local_rollout_batch_size,
        generated_at_once=trainer.generation_batch_size,
        micro_batch=args.per_device_train_batch_size,
        chunk=args.logp_chunk_size,
        checkpointing=model.base.model.is_gradient_checkpointing,
        quantization=model.base.quantization,
        processes=args.world_size,
    )
    return max(cycle.phases().values()) + memory.trained(sum(p.numel() for p in model.parameters() if p.requires_grad))


def memory_available(device: torch.device) -> float:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
