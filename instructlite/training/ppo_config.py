"""PPOConfig: TrainingArguments plus the options of PPO, and what follows from them about the shape of a cycle."""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments
from transformers.utils import strtobool

from ..errors import InstructLiteError

DDP_ONLY = (
    "{}: PPO runs in one process or under plain DDP (`accelerate launch --multi_gpu`), where each process holds the base with all of its "
    "adapters; take it out of training and of accelerate's config, and if memory is short use quantization=nf4, gradient_checkpointing or "
    "a smaller per_device_train_batch_size"
)


@dataclass
class PPOConfig(TrainingArguments):
    """TrainingArguments plus PPO's options, under the names they had in TRL. Steps are optimiser steps."""

    num_ppo_epochs: int = 4
    """Passes over each rollout batch."""
    num_mini_batches: int = 1
    """Optimiser steps a pass; the rollout batch is this many times per-device batch x accumulation x processes."""
    total_episodes: int | None = None
    """Stop after this many episodes (sets max_steps). None: `max_steps` or `num_train_epochs` decide."""
    kl_coef: float = 0.05
    """beta, per token and nat, in the reward; where an adaptive controller starts."""
    kl_controller: str = "fixed"
    """"fixed", or "adaptive": beta moves so that the KL of a sequence comes to `target` (Ziegler 2019)."""
    target: float = 6.0
    """Of the adaptive controller: nats a sequence. It should grow with the response length (6 was for 24 to 48 tokens)."""
    horizon: int = 10_000
    """Of the adaptive controller: episodes over which beta can change by about a factor e^0.2."""
    target_kl: float | None = None
    """Once the new policy is 1.5 times this many nats a token away from the rollout's, the rest of the cycle is skipped."""
    kl_stop: float | None = None
    """A rollout more than this many nats a sequence away from the reference ends the run, saved. None: it goes on."""
    watch_outlier_stop: float | None = None
    """So does one with more than this share of answers unlike any of the first rollout to the reward model (see outliers.py)."""
    ptx_coef: float = 0.0
    """gamma of PPO-ptx: weight of the log-likelihood of the `ptx_dataset`, a mean over tokens. 0.1 is where to start:
    InstructGPT's 27.8 multiplied a sum that was normalised otherwise."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the policy (InstructGPT: 0.992 a step) and save that. None: none."""
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    """In units of the scaled score. None: the value loss is not clipped."""
    vf_coef: float = 0.1
    """Weight of the value loss. Policy and value share no parameters and are clipped apart, so with Adam it hardly matters;
    use `value_learning_rate`."""
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    """Taken off the scaled score of a response that did not stop by itself."""
    response_length: int = 53
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling; policy, reference and entropy are those of the tempered distribution."""
    top_k: int = 0
    top_p: float = 1.0
    """With top_k or top_p the sampled distribution is not the scored one: the KL and the ratio are then biased, and it is said."""
    stop_token_ids: list[int] | None = None
    """Token ids that end a response. None: the chat template's end of turn and all eos ids of the model."""
    max_prompt_length: int | None = None
    """Prompts of more tokens are left out, and counted. None: none is."""
    generation_batch_size: int | None = None
    """Prompts per generate call. None: the whole local rollout batch, or what `generation_memory` allows."""
    generation_memory: float | None = None
    """GB that keys, values and logits may take: as many prompts per generate call as fit, if not the whole local rollout batch."""
    rollout_engine: str = "hf"
    """Who samples the rollouts: "hf", the model in memory by transformers, or "vllm" (extra `vllm`): see vllm_rollout.py."""
    vllm_mode: str = "colocate"
    """"colocate": vLLM with a copy of the base on this process's GPU; "server": a `vllm serve` at `vllm_server_base_url`."""
    vllm_server_base_url: str | None = None
    """Such as http://127.0.0.1:8000. It must see the files of this machine; its key is read from VLLM_API_KEY."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU that a colocated vLLM takes for its weights and cache."""
    vllm_enable_sleep_mode: bool = False
    """Have a colocated vLLM move its weights to the CPU and give up its cache while the policy is trained."""
    vllm_options: dict[str, Any] | None = None
    """Goes to vllm.LLM untouched."""
    vllm_importance_sampling_clip_max: float | None = 2.0
    """A token's loss is weighed with its probability for the policy over that for vLLM, at most this (see ppo_math.py). None: not."""
    score_normalization: str = "first_rollout"
    """By what each source is shifted and scaled: "first_rollout", "reward_model" (the statistics its own run measured),
    "running" (of all rollouts so far) or "none"."""
    score_clip: float | None = 10.0
    """Scaled scores beyond this are clipped."""
    value_learning_rate: float | None = None
    """None: the same as learning_rate."""
    share_lower_layers: bool = True
    """Compute the layers below the lowest adapter once a rollout, for all roles and epochs (where the base allows it)."""
    padding_free: bool = False
    """Score and train on micro-batches without their padding. Faster where lengths differ and a micro-batch has up to some
    thousand tokens (attention grows with their square); log-probabilities then agree to rounding, not bit by bit."""
    logp_chunk_size: int = 256
    """Tokens whose logits are in memory at once."""
    learning_rate: float = field(default=1e-5, metadata={"help": "AdamW's initial learning rate of the policy."})
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False

    def __post_init__(self) -> None:
        self._refuse_sharding()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # one forward uses them all; looking for others costs a walk over the graph
        super().__post_init__()
        self.label_names = []
        self.remove_unused_columns = False
        if self.score_normalization not in ("first_rollout", "reward_model", "running", "none"):
            raise InstructLiteError(
                f"score_normalization={self.score_normalization!r}: choose first_rollout, reward_model, running or none"
            )
        if self.kl_controller not in ("fixed", "adaptive"):
            raise InstructLiteError(f"kl_controller={self.kl_controller!r}: choose fixed or adaptive")
        if self.watch_outlier_stop is not None and not 0 < self.watch_outlier_stop < 1:
            raise InstructLiteError(
                f"watch_outlier_stop={self.watch_outlier_stop}: a share of the answers, between 0 and 1 (0.5: half of them)"
            )
        if self.kl_stop is not None and self.kl_stop <= 0:
            raise InstructLiteError(f"kl_stop={self.kl_stop}: nats a sequence, above 0; leave it out for no limit")
        self._check_vllm()
        if self.generation_memory is not None and (self.generation_memory <= 0 or self.generation_batch_size is not None):
            raise InstructLiteError(
                f"generation_memory={self.generation_memory}: GB above 0, and not beside generation_batch_size, which it decides"
            )
        if self.temperature <= 0:
            raise InstructLiteError(f"temperature={self.temperature}: PPO samples; it must be above 0")
        for option in ("use_liger_kernel", "neftune_noise_alpha", "auto_find_batch_size", "torch_compile", "fp16"):
            if getattr(self, option):
                raise InstructLiteError(
                    f"{option}: not supported in PPO (it would make sampled and scored distributions differ); remove it"
                )

    def _check_vllm(self) -> None:
        """Before the stages in front of PPO have been trained."""
        if self.rollout_engine not in ("hf", "vllm") or self.vllm_mode not in ("colocate", "server"):
            raise InstructLiteError(
                f"rollout_engine={self.rollout_engine!r}, vllm_mode={self.vllm_mode!r}: choose hf or vllm, and colocate or server"
            )
        if self.vllm_importance_sampling_clip_max is not None and self.vllm_importance_sampling_clip_max < 1:
            raise InstructLiteError(
                f"vllm_importance_sampling_clip_max={self.vllm_importance_sampling_clip_max}: at least 1, or null for no weights"
            )
        if self.rollout_engine == "hf":
            return
        if self.vllm_mode == "server" and not self.vllm_server_base_url:
            raise InstructLiteError("vllm_mode=server: say where it is with vllm_server_base_url, such as http://127.0.0.1:8000")
        if self.vllm_mode == "colocate" and find_spec("vllm") is None:
            raise InstructLiteError("rollout_engine=vllm: vllm is not installed: pip install 'instructlite[vllm]' (Linux with CUDA)")

    def _refuse_sharding(self) -> None:
        """Before Trainer looks for DeepSpeed, and before the stages in front of PPO have been trained."""
        for name in ("fsdp", "deepspeed", "parallelism_config"):
            launched = strtobool(os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false"))
            if getattr(self, name) or launched:
                raise InstructLiteError(DDP_ONLY.format(name if getattr(self, name) else f"accelerate's config has {name}"))

    @property
    def local_rollout_batch_size(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def rollout_batch_size(self) -> int:
        """Episodes a cycle over all processes."""
        return self.local_rollout_batch_size * self.world_size

    @property
    def steps_per_cycle(self) -> int:
        return self.num_ppo_epochs * self.num_mini_batches
