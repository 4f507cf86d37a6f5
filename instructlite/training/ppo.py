"""PPO, the third stage of InstructGPT, as a recipe: from an SFT adapter, a reward adapter and prompts to a policy adapter.

Thin on purpose: the roles are in models/roles.py, the algorithm in ppo_trainer.py, rollout.py and ppo_math.py.
"""

from typing import Any

from ..config import PPOOptions
from ..data.records import read_ptx
from ..errors import InstructLiteError
from ..models.base import base_of, lora_config
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from .ppo_config import PPOConfig
from .ppo_trainer import NO_VALUE_START, PPOTrainer
from .recipe import Recipe, Run, parent_of
from .rewards import in_words, rewards_of

PTX_COEF = 0.1  # of a mean over tokens; InstructGPT's 27.8 multiplied a sum

SHOWN = (
    "objective/score",
    "objective/kl",
    "objective/entropy",
    "rollout/length_mean",
    "rollout/eos_missing_frac",
    "value/explained_variance",
)


class PPORecipe(Recipe, PPOOptions):
    """Train a policy against a reward adapter (or other rewards) with a KL penalty to a reference, usually the SFT adapter it starts from.

    The reference is what the policy starts from (with a bare base as `model`, the base itself) unless another is given.
    Metrics: the rollout metrics of the first cycle and the means over the last quarter of the cycles (`first`, `last`),
    episodes and their number a second.
    """

    name = "ppo"
    config_class = PPOConfig

    def train(self, run: Run) -> None:
        policy = parent_of(self.model)
        reference = None if self.reference is None else Adapter.load(self.reference)
        if reference and reference.role != "policy":
            raise InstructLiteError(f"reference={reference}: a {reference.role} adapter; PPO is held to a policy, SFT's usually")
        rewards = rewards_of(
            self.reward, extra=self.rewards, weights=self.reward_weights, combine=self.reward_combine, std_weight=self.reward_std_weight
        )
        prompts = run.records("prompts", self.data, "prompts")
        texts = None if self.ptx_data is None else run.records("ptx", read_ptx(self.ptx_data))
        base = base_of(self.model, self)
        config = self.trainer_config(run, base, kl_coef=self.kl_coef, ptx_coef=self._ptx_coef())
        parents = {role: adapter.sha256 for role, adapter in rewards.adapters.items()}
        # "sft" is what it is held to; where it starts from another policy, that is named too
        parents |= {"sft": (reference or policy).sha256} if reference or policy else {}
        parents |= {"policy": policy.sha256} if reference and policy else {}
        start = policy or lora_config(self.lora, base.model, "CAUSAL_LM")
        if self.value_from == "reward" and rewards.value_start(config.score_normalization) is None:
            raise InstructLiteError(NO_VALUE_START)
        checkpoint = run.begin(base, config, parents)
        model = RoleModel.for_ppo(base, start, rewards.adapters, value_from=self.value_from, reference=reference)
        trainer = PPOTrainer(
            model, config, train_dataset=prompts, ptx_dataset=texts, reward_model=rewards, watch_reward=self.watch_reward
        )  # fmt: skip
        if trainer.prompts_left_out:
            out = trainer.prompts_left_out
            run.note(f"{out} of {len(prompts)} prompts have more than {config.max_prompt_length} tokens and are left out")
        trainer.health.say = run.note
        run.watch(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        run.metrics |= summary(trainer)
        model.save_role("policy", run.directory, parents=parents)

    def _ptx_coef(self) -> float:
        if self.ptx_coef is not None:
            return self.ptx_coef
        return 0.0 if self.ptx_data is None else PTX_COEF

    def resolved(self) -> dict[str, Any]:
        return super().resolved() | {"reward": in_words(self.reward), "rewards": in_words(self.rewards)}


def summary(trainer: PPOTrainer) -> dict[str, Any]:
    """What run.json says of a finished PPO training; of all of it, if it was resumed."""
    seconds = trainer.state.log_history[-1]["train_runtime"]
    cycles = [log for log in trainer.state.log_history if "objective/score" in log]
    tail = cycles[-max(1, len(cycles) // 4) :]
    episodes = len(cycles) * trainer.args.rollout_batch_size
    return {
        "first": {name: cycles[0][name] for name in SHOWN},
        "last": {name: sum(log[name] for log in tail) / len(tail) for name in SHOWN},
        "score_mean": trainer.scale.mean,
        "score_std": trainer.scale.std,
        "steps": trainer.state.global_step,
        "episodes": episodes,
        "episodes_per_second": round(episodes / seconds, 3),
        "prompts_left_out": trainer.prompts_left_out,
        "health": trainer.health.said,
        "weights_mb": round(weights_mb(trainer.model), 1),
        "base_mb": round(weights_mb(trainer.model.base.model, adapters=False), 1),
        "train_seconds": round(seconds, 1),
    }


def weights_mb(model: Any, adapters: bool = True) -> float:
    """Megabytes of distinct parameter storage; without adapters, of the base alone."""
    parameters = (p for name, p in model.named_parameters() if adapters or "lora_" not in name)
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in parameters}.values()) / 1e6
