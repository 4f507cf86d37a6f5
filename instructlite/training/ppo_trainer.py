"""PPOTrainer: InstructGPT's third stage on `transformers.Trainer`, every role an adapter of one base.

Trainer's own loop is kept: one optimiser step there is one PPO minibatch here, so schedules, logging and max_steps mean
what they always mean. A cycle is one rollout batch of b * G * M * W episodes and E * M optimiser steps, with
b = per_device_train_batch_size, G = gradient_accumulation_steps, M = num_mini_batches, E = num_ppo_epochs, W = processes.
All randomness is a function of (seed, cycle, rank): logging or evaluating more often changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..config import BaseOptions
from ..errors import InstructLiteError
from ..models.base import base_of, encode_prompt
from ..models.manifest import Adapter
from ..models.roles import SLICEABLE, RoleModel
from ..models.sampling import Sampling, bytes_per_answer
from .averages import Averages
from .checkpoints import Checkpointing
from .cycle import CycleSampler, generator, mix
from .health import Health, HealthCallback
from .ppo_config import PPOConfig
from .ppo_math import adapted_kl_coef, kl_estimators, policy_losses, value_losses
from .ppo_state import load_ppo_state, save_ppo_state
from .preflight import add_watch, check_reference, check_tokenizer
from .ptx import PtxLoss
from .rewards import ScoreScale, rewards_of
from .rollout import HFSampler, Rollout, RolloutOptions, Sampler, assign_advantages, collect

NO_VALUE_START = (
    "value_from=reward: the score is not one reward adapter's own (or the mean of an ensemble) on a fixed scale, so the value function "
    "cannot start from it; use value_from=sft, a zero head"
)


class PPOTrainer(Checkpointing, Trainer):
    """PPO of the role `policy` of a RoleModel against one or several sources of reward.

    model: the SFT adapter (directory or Adapter), or a RoleModel with the roles `policy`, `value` (with its head) and, for
    the KL, `reference`; without that role the base alone is the reference.
    train_dataset: rows with `prompt` (text or messages) or `input_ids`; other columns reach reward functions.
    ptx_dataset: rows for PPO-ptx (`ptx_coef`): `text`, or `prompt` and `completion`.
    reward_model: what `rewards_of` takes, which says how to weigh several: a reward adapter (directory or Adapter), the name
    of a reward role of the RoleModel, a function with TRL's signature, a callable Rollout -> scores, or a list of them.
    watch_reward: a reward adapter that is scored along and never optimised (or a role `watch` with a head): see health.py.
    """

    loss_is_scaled_for_ga = True  # the loss is a sum over tokens divided by the tokens of the whole optimiser step
    model: RoleModel

    def __init__(
        self,
        model: RoleModel | Adapter | str | Path,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        ptx_dataset: Any = None,
        reward_model: Any = "reward",
        watch_reward: Adapter | str | Path | None = None,
        callbacks: list | None = None,
    ):
        if args.n_gpu > 1:
            raise InstructLiteError(
                "several GPUs in one process: start with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        if not isinstance(model, RoleModel):
            policy = Adapter.load(model)
            reward_model = rewards_of(reward_model)
            model = RoleModel.for_ppo(base_of(policy, BaseOptions()), policy, reward_model.adapters)
        self.tokenizer = processing_class or model.base.tokenizer
        check_tokenizer(self.tokenizer, model.base)
        self.rewards = rewards_of(reward_model, roles={role: model.sources.get(role) for role in model.roles})
        for role, adapter in self.rewards.adapters.items():
            if role not in model.roles:
                model.add_trained(role, adapter)
        if watch_reward is not None:
            add_watch(model, Adapter.load(watch_reward))
        self._check_roles(model, self.rewards.roles)
        self.rewards.prepare(args.score_normalization, args.score_clip)
        self._value_is_reward = self._starts_as_reward(model, args)
        if self.rewards.fitted:
            self._rescale_value_head(model)
        self.prompts_left_out = 0
        train_dataset = self._with_prompt_ids(train_dataset, args)
        eval_dataset = None if eval_dataset is None else self._with_prompt_ids(eval_dataset, args)
        if len(train_dataset) < args.rollout_batch_size:
            raise InstructLiteError(
                f"{len(train_dataset)} prompts do not fill one rollout batch of {args.rollout_batch_size} = per_device_train_batch_size "
                f"{args.per_device_train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps} x num_mini_batches "
                f"{args.num_mini_batches} x {args.world_size} processes; lower one of them or add prompts"
            )
        if args.total_episodes is not None:
            args.max_steps = -(-args.total_episodes // args.rollout_batch_size) * args.steps_per_cycle
        # Dropout would make log-probabilities in training differ from those of the rollout (ratio != 1 at once).
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if args.ema_decay is not None and "ema" not in model.roles:
            model.copy_role("policy", "ema")
        model.set_trainable(["policy", "value"])
        model.autocast, model.padding_free = True, self._packs(model, args)
        self._checkpoint_activations(model, args)
        super().__init__(
            model=model, args=args, data_collator=list, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=self.tokenizer, callbacks=callbacks,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False
        self._ptx = self._ptx_loss(model, args, ptx_dataset)
        if args.ema_decay is not None:
            self.add_callback(_AverageAfterStep(self))
        self.health = Health(args, model.base, self.stop)
        self.add_callback(HealthCallback(self))
        self._options = RolloutOptions(
            sampling=Sampling(args.response_length, args.temperature, args.top_k, args.top_p),
            stop_ids=args.stop_token_ids or model.base.stop_ids,
            sampler=self._sampler(model, args),
            scoring_batch_size=args.per_device_train_batch_size,
            logp_chunk_size=args.logp_chunk_size,
            share_lower_layers=args.share_lower_layers,
        )
        self.kl_coef = args.kl_coef
        self.skip_cycle: int | None = None
        """The cycle whose remaining steps are skipped (`target_kl`)."""
        self.rollout: Rollout | None = None
        self._micro_step: int | None = None  # derived from global_step at the first training_step, also after a resume
        self._cycle_start: tuple | None = None  # micro-step, KL coefficient, scales and health when the cycle began
        self._step_tokens: Tensor | None = None  # of each optimiser step of the cycle, over all processes
        self._step_kl = torch.zeros(2, dtype=torch.float64, device=args.device)  # nats and tokens of the optimiser step, here
        self._metrics = Averages()

    @cached_property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is trained on."""
        return max(len(row["prompt_ids"]) for row in self.train_dataset)

    @property
    def generation_batch_size(self) -> int:
        """Prompts per generate call."""
        args, whole = self.args, self.args.local_rollout_batch_size
        if args.generation_memory is None:
            return args.generation_batch_size or whole
        width = self.longest_prompt + args.response_length
        each = bytes_per_answer(self.unwrapped, width) / 1e9
        if args.generation_memory < each:
            raise InstructLiteError(
                f"generation_memory={args.generation_memory}: one answer of {width} tokens takes {each:.3g} GB; raise it"
            )
        return min(whole, int(args.generation_memory / each))

    @staticmethod
    def _check_roles(model: RoleModel, reward_roles: list[str]) -> None:
        needed = ["policy", "value", *reward_roles]
        if missing := [role for role in needed if role not in model.roles]:
            raise InstructLiteError(f"the model lacks the role {', '.join(missing)}; it has {', '.join(model.roles)}")
        if headless := [role for role in needed[1:] if role not in model.heads]:
            raise InstructLiteError(f"the role {', '.join(headless)} has no scalar head; use add_head, or a reward adapter")

    def _with_prompt_ids(self, dataset: Any, args: PPOConfig) -> list[dict[str, Any]]:
        rows = []
        for row in dataset:
            ids = row["input_ids"] if "input_ids" in row else encode_prompt(self.tokenizer, row["prompt"])
            if args.max_prompt_length is None or len(ids) <= args.max_prompt_length:
                rows.append({**row, "prompt_ids": list(ids)})
        self.prompts_left_out += len(dataset) - len(rows)
        if not rows:
            raise InstructLiteError(f"no prompt has at most max_prompt_length={args.max_prompt_length} tokens; raise it")
        return rows

    @staticmethod
    def _packs(model: RoleModel, args: PPOConfig) -> bool:
        architecture = model.base.model.config.model_type
        if args.padding_free and architecture not in SLICEABLE:
            raise InstructLiteError(f"padding_free: not proven for {architecture}, only for {', '.join(sorted(SLICEABLE))}; leave it out")
        return args.padding_free

    @staticmethod
    def _checkpoint_activations(model: RoleModel, args: PPOConfig) -> None:
        """Non-reentrant, with a context that recomputes under the adapter of the forward pass.

        Switched on here and not by Trainer, because such a context cannot be written into TrainingArguments.
        """
        if args.gradient_checkpointing or args.activation_checkpointing:
            args.gradient_checkpointing = args.activation_checkpointing = False
            model.base.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": model.reactivation}
            )

    def _starts_as_reward(self, model: RoleModel, args: PPOConfig) -> bool:
        """Whether the value head is a copy of a reward head: it must follow that one to the scale of the score."""
        value, start = model.heads["value"].weight, self.rewards.value_start(args.score_normalization)
        if start is None and any(torch.equal(value, model.heads[role].weight) for role in self.rewards.roles):
            raise InstructLiteError(NO_VALUE_START)
        return start is not None and torch.equal(value, model.heads[start].weight)

    def _sampler(self, model: RoleModel, args: PPOConfig) -> Sampler:
        if args.rollout_engine == "hf":
            return HFSampler(self.generation_batch_size)
        from .vllm_rollout import vllm_sampler  # the extra `vllm`

        return vllm_sampler(model, args, context=self.longest_prompt + args.response_length)

    @staticmethod
    def _ptx_loss(model: RoleModel, args: PPOConfig, dataset: Any) -> PtxLoss | None:
        if not args.ptx_coef:
            return None
        if dataset is None:
            raise InstructLiteError(f"ptx_coef={args.ptx_coef}: PPO-ptx needs ptx_dataset (ptx_data in a recipe), texts or demonstrations")
        return PtxLoss(model.base, dataset, args)

    @property
    def scale(self) -> ScoreScale:
        """Of the first source, or of an ensemble's first member."""
        return self.rewards.objectives[0].scales[0]

    @property
    def unwrapped(self) -> RoleModel:
        return self.accelerator.unwrap_model(self.model)

    @property
    def frozen_roles(self) -> list[str]:
        return [role for role in self.unwrapped.roles if role not in ("policy", "value", "ema")]

    @property
    def stored_roles(self) -> list[str]:
        """What a checkpoint holds beside the policy."""
        return [role for role in ("value", "ema") if role in self.unwrapped.roles]

    @property
    def rollout_is_live(self) -> bool:
        """Whether the current rollout still has optimiser steps before it."""
        return bool(self._micro_step) and self._micro_step % self.micro_steps_per_cycle != 0

    @cached_property
    def prompts_sha256(self) -> str:
        return hashlib.sha256(json.dumps([row["prompt_ids"] for row in self.train_dataset]).encode()).hexdigest()

    # --- data: the same local rollout batch for every micro-step of a cycle --------------------------------------------

    @property
    def micro_steps_per_cycle(self) -> int:
        return self.args.steps_per_cycle * self.args.gradient_accumulation_steps

    def get_train_dataloader(self) -> DataLoader:
        return self._get_dataloader(
            self.train_dataset, "Training", self.args.local_rollout_batch_size, self._get_train_sampler, is_training=True
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> CycleSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return CycleSampler(len(dataset), self.args.rollout_batch_size, self.micro_steps_per_cycle, self.args.seed)

    def _reduce(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(x.to(self.accelerator.device), "sum")

    # --- one micro-step ----------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_step, self.rollout, self._step_tokens = None, None, None
        self.kl_coef, self.skip_cycle = self.args.kl_coef, None
        self._cycle_start = None
        self.health.restart()
        return super().train(*args, **kwargs)

    def training_step(self, model: torch.nn.Module, inputs: list[dict], num_items_in_batch: Any = None) -> Tensor:
        if self._micro_step is None:
            self._micro_step = self.state.global_step * self.args.gradient_accumulation_steps
        cycle, phase = divmod(self._micro_step, self.micro_steps_per_cycle)
        step, micro = divmod(phase, self.args.gradient_accumulation_steps)
        if phase == 0:
            self.rollout = self._collect(inputs, cycle)
        if phase == 0 or self._step_tokens is None:
            self._step_tokens = self._tokens_of_steps(cycle)
        if micro == 0:
            self._step_kl.zero_()
        self._skipping = self.skip_cycle == cycle
        if self._skipping:
            self._micro_step += 1
            return torch.zeros((), device=self.args.device)  # no backward: without gradients Adam moves nothing
        start = time.perf_counter()
        rows, _ = self._rows_of(cycle, phase)
        self._first_step, self._tokens = step == 0, self._step_tokens[step]
        if self._ptx is not None:
            self._ptx_backward(model)
        # Trainer's own step moves its inputs to the device; a rollout is there already, so it travels on `self`.
        self._micro = self.rollout.take(rows)
        loss = super().training_step(model, {"micro": torch.empty(0)}, None)
        self._micro_step += 1
        if self.args.target_kl is not None and self._micro_step % self.args.gradient_accumulation_steps == 0:
            self._stop_cycle_if_far(cycle)
        self._metrics.note("rollout/time_train", time.perf_counter() - start)
        return loss

    def _ptx_backward(self, model: torch.nn.Module) -> None:
        """The ptx gradient of this micro-step, before PPO's and without a reduction of its own (that comes with PPO's)."""
        model.train()
        with self.accelerator.no_sync(model):
            loss, nats = self._ptx(self.unwrapped, self._micro_step)
            self.accelerator.backward(self.args.ptx_coef * loss * self.accelerator.num_processes)
        self._metrics.note("ptx/loss", nats.mean().item(), len(nats))

    def _stop_cycle_if_far(self, cycle: int) -> None:
        """Skip what is left of the cycle once the policy is too far from the rollout's; all processes decide alike."""
        nats, tokens = self._reduce(self._step_kl)
        if nats / tokens > 1.5 * self.args.target_kl:
            self.skip_cycle = cycle
            self._metrics.note("policy/stopped_early", 1.0)

    def _rows_of(self, cycle: int, phase: int) -> tuple[Tensor, Tensor]:
        """Rows of this micro-batch, and of the whole minibatch it belongs to."""
        b, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        epoch, k = divmod(phase, self.args.num_mini_batches * accumulation)
        order = torch.randperm(self.args.local_rollout_batch_size, generator=generator(self.args.seed, cycle, epoch, 1))
        minibatch = order.split(b * accumulation)[k // accumulation]
        return minibatch.split(b)[k % accumulation], minibatch

    def _tokens_of_steps(self, cycle: int) -> Tensor:
        """Response tokens of each optimiser step over all processes, (steps_per_cycle,): what its loss is divided by."""
        lengths, accumulation = self.rollout.mask.sum(1), self.args.gradient_accumulation_steps
        steps = (self._rows_of(cycle, step * accumulation)[1] for step in range(self.args.steps_per_cycle))
        return self._reduce(torch.stack([lengths[minibatch.to(lengths.device)].sum() for minibatch in steps]))

    def compute_loss(self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """Clipped policy and value losses of one micro-batch; the token mean is that of the whole optimiser step."""
        args, micro, mask = self.args, self._micro, self._micro.mask
        batch = micro.batch(args.temperature, args.logp_chunk_size, entropy_grad=args.entropy_coef != 0)
        targets = (micro.values[mask], micro.returns[mask], args.cliprange_value)
        if self.accelerator.num_processes == 1:
            # Policy and value share no trained parameter: one after the other, their activations are never in memory together.
            value, value_clipped = value_losses(self.unwrapped.value_pass(batch), *targets)
            if value.requires_grad:  # else `_clip_grad_norm` says what is frozen
                self.accelerator.backward(self._of_step(args.vf_coef * value))
            value = value.detach()
            logps, entropy = self.unwrapped.policy_pass(batch)
        else:
            output = model(response=batch)
            logps, entropy = output["logps"], output["entropy"]
            value, value_clipped = value_losses(output["values"], *targets)
        stored = micro.logps[mask]
        # By construction the ratio is exactly 1 in the first step; how far the recomputed log-probabilities are from the
        # stored ones is measured instead (a wrong mask, position or dropout shows there).
        old = logps.detach() if self._first_step else stored
        policy, policy_clipped = policy_losses(logps, old, micro.advantages[mask], args.cliprange)
        if micro.weights is not None:
            policy = policy * micro.weights[mask]
        loss = self._of_step(policy + args.vf_coef * value - args.entropy_coef * entropy)
        # With several processes all must stop alike, and they do: this loss makes the averaged gradient not finite on each.
        if self.accelerator.num_processes == 1 and not torch.isfinite(loss):
            self.stop(f"the loss is {loss.item()}; nothing was updated. Lower learning_rate or check the reward")
        self._note_losses(logps.detach(), old, stored, entropy, policy, policy_clipped, value, value_clipped)
        return loss

    def _of_step(self, losses: Tensor) -> Tensor:
        """This micro-batch's share of the mean over all tokens of the optimiser step; losses: of its tokens, (tokens,)."""
        return losses.sum() / self._tokens * self.accelerator.num_processes  # DDP averages over processes

    @torch.no_grad()
    def _note_losses(
        self,
        logps: Tensor,
        old: Tensor,
        stored: Tensor,
        entropy: Tensor,
        policy: Tensor,
        policy_clipped: Tensor,
        value: Tensor,
        value_clipped: Tensor,
    ) -> None:
        ratio, kl = torch.exp((logps - old).clamp(-20, 20)), kl_estimators(old, logps)[1]
        self._step_kl += torch.stack([kl.double().sum(), torch.tensor(len(kl), dtype=torch.float64, device=kl.device)])
        noted = {
            "policy/loss": policy, "policy/clip_frac": policy_clipped.float(), "policy/approx_kl": kl, "policy/ratio_mean": ratio,
            "policy/entropy": entropy, "value/loss": value, "value/clip_frac": value_clipped.float(),
        }  # fmt: skip
        for name, x in noted.items():
            mean = x.mean().item()
            self._metrics.note(name, mean, len(x))
            if not self._first_step:  # there nothing can have moved
                self.health.note(name, mean, len(x))
        self._metrics.note("policy/ratio_max", ratio.max().item())
        if self._first_step:
            mismatch = torch.expm1(logps - stored).abs()
            for name, x in {"rollout/logp_mismatch": mismatch.max(), "rollout/logp_mismatch_mean": mismatch.mean()}.items():
                self._metrics.note(name, x.item(), len(mismatch))
                self.health.note(name, x.item(), len(mismatch))

    # --- one cycle ---------------------------------------------------------------------------------------------------

    def _collect(self, rows: list[dict], cycle: int) -> Rollout:
        model, args = self.unwrapped, self.args
        self._cycle_start = (self._micro_step, self.kl_coef, self.rewards.state(), self.health.state())
        rollout, seconds = self._answer(rows, mix(args.seed, cycle, args.process_index, 2))
        fitted = self.rewards.fitted
        self.rewards.update(rollout, self._reduce)
        if not fitted:
            self._rescale_value_head(model, rollout)
        metrics = self._assign_advantages(rollout)
        if cycle == 0 and "reference" not in model.sources:
            check_reference(metrics["objective/kl_k3"], model.base.dtype)
        metrics |= self.health.watch(rollout, self._reduce, self.accelerator.gather)
        metrics |= self.health.look(cycle, metrics)
        if args.kl_controller == "adaptive":  # after the rewards of this cycle were made with the coefficient before
            kl, episodes = metrics["objective/kl"], args.rollout_batch_size
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, args.target, args.horizon, episodes, args.kl_coef)
        tokens = metrics["rollout/length_mean"] * args.rollout_batch_size
        metrics |= seconds | {"rollout/tokens_per_s": tokens / seconds["rollout/time_generate"]}
        self.note(metrics)
        return rollout

    def _answer(self, rows: list[dict], seed: int) -> tuple[Rollout, dict[str, float]]:
        found, fault = None, []
        try:
            found = collect(self.unwrapped, rows, self.rewards, self._options, seed=seed, trainer_state=self.state)
        except InstructLiteError as error:  # a source failed: what was trained until here is worth a checkpoint
            fault = [str(error)]
        if faults := gather_object(fault):  # perhaps for the answers of one process only, but all stop together
            self.stop(faults[0])
        return found

    def _assign_advantages(self, rollout: Rollout) -> dict[str, float]:
        args = self.args
        metrics = assign_advantages(
            rollout, self.rewards, kl_coef=self.kl_coef, gamma=args.gamma, lam=args.lam, missing_eos_penalty=args.missing_eos_penalty,
            whiten_rewards=args.whiten_rewards, importance_cap=args.vllm_importance_sampling_clip_max, reduce=self._reduce,
            gather=gather_object,
        )  # fmt: skip
        if not torch.isfinite(rollout.advantages).all():
            self.stop("the advantages are not finite, though the scores are; nothing was updated. Lower learning_rate or use dtype float32")
        return metrics

    def _rescale_value_head(self, model: RoleModel, rollout: Rollout | None = None) -> None:
        """Bring a value head that is a copy of the reward head, and the values it gave, to the scale of the score."""
        if self._value_is_reward:
            weight = self.rewards.objectives[0].weight
            self.scale.apply_to_head(model.heads["value"], weight)
            if rollout is not None:
                rollout.values = weight * self.scale(rollout.values) * rollout.mask

    # --- optimiser -----------------------------------------------------------------------------------------------------

    def _groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {role: self.unwrapped.role_parameters(role) for role in ("policy", "value")}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or `optim`) with a group for each role; the value group may have its own learning rate."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = {"policy": self.args.learning_rate, "value": self.args.value_learning_rate or self.args.learning_rate}
            groups = [
                {"params": parameters, "lr": rates[role], "weight_decay": self.args.weight_decay}
                for role, parameters in self._groups().items()
            ]
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        """Each role is clipped on its own: clipped together, a large value gradient would shrink the policy's step."""
        if self._skipping:
            return torch.zeros(())
        norms = {}
        for role, parameters in self._groups().items():
            norms[role] = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
            self._metrics.note(f"{role}/grad_norm", float(norms[role]))
            if not norms[role].isfinite():
                self.stop(f"the gradient of the {role} is not finite; nothing was updated. Lower learning_rate or use dtype float32")
        if all(p.grad is None for p in self._groups()["value"]):  # 0 can be: every token clipped
            raise InstructLiteError("the value adapter gets no gradient: its parameters are frozen or were replaced; nothing was updated")
        return norms["policy"]

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the inputs are not what the model sees

    # --- logging, evaluation, saving -----------------------------------------------------------------------------------

    def note(self, metrics: dict[str, float]) -> None:
        """Add to the next log, which has the mean of what was noted under a name since the one before."""
        for name, value in metrics.items():
            self._metrics.note(name, value)

    def stop(self, reason: str) -> NoReturn:
        """End the run with a reason; what was trained so far is a checkpoint then, as it was before this cycle or step."""
        step = self.state.global_step
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # progress bars and trackers end, too
        if step == 0:
            raise InstructLiteError(f"step 0: {reason}")
        self._micro_step = step * self.args.gradient_accumulation_steps  # gradients of half a step are in no checkpoint
        if self._cycle_start and self._cycle_start[0] == self._micro_step:  # the resumed run will begin this cycle again
            _, self.kl_coef, scales, health = self._cycle_start
            self.rewards.restore(scales)
            self.health.restore(health)
        self._save_checkpoint(self.model, trial=None)
        raise InstructLiteError(f"step {step}: {reason}. The state before it is saved: checkpoint-{step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self._metrics.everywhere().means()
        self._metrics.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Answer the evaluation prompts with the current policy: score, KL, length as `eval_objective/score` and so on."""
        rows = self.eval_dataset if eval_dataset is None else self._with_prompt_ids(eval_dataset, self.args)
        if rows is None:
            raise InstructLiteError("evaluate() needs an eval_dataset")
        rank, processes = self.args.process_index, self.args.world_size
        if len(rows) < processes:
            raise InstructLiteError(f"{len(rows)} evaluation prompts for {processes} processes: each needs one at least")
        # Before the first cycle scores have no scale yet; evaluating must not decide it, so they stay raw.
        rollout, seconds = self._answer(rows[rank::processes], mix(self.args.seed, rank, 3))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in (self._assign_advantages(rollout) | seconds).items()}
        waiting, self._metrics = self._metrics, Averages()  # training metrics stay for the next training log
        self.log(metrics)
        self._metrics = waiting
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as a plain PEFT adapter."""
        self.unwrapped.save_role("policy", output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Trainer calls this for checkpoints only (trainer.py, `_save_checkpoint`), on every process.
        super()._save_optimizer_and_scheduler(output_dir)
        save_ppo_state(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Not Trainer's: it ends with `set_adapter`, which freezes the value adapter, and knows nothing of heads.
        load_ppo_state(self, resume_from_checkpoint)


class _AverageAfterStep(TrainerCallback):
    """The exponential moving average of the policy, after every optimiser step."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_optimizer_step(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.unwrapped
        for average, current in zip(model.role_parameters("ema"), model.role_parameters("policy"), strict=True):
            average.lerp_(current, 1 - args.ema_decay)
