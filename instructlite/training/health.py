"""Health of a PPO run: each `Check` looks at the metrics of one cycle and names the cause and the remedy.

A warning is said once a run and stands in the log of every cycle it holds for as health/<name> = 1; a fatal one saves a
checkpoint and ends the run. Nothing here changes what is learnt. What can be seen before the run is in preflight.py; numbers
that are not finite end the run where they arise, in ppo_trainer.py and rewards.py.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..models.base import Base
from .averages import Averages
from .outliers import KnownStates
from .ppo_config import PPOConfig
from .ppo_math import Reduce, masked_mean, masked_variance
from .preflight import check_start, check_trainable, doubts
from .rollout import Rollout

if TYPE_CHECKING:
    from .ppo_trainer import PPOTrainer

Row = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """What a check may look at. first: each metric in the first cycle; before: in the cycle before (the first: in this one)."""

    cycle: int
    now: Row
    first: Row
    before: Row
    args: PPOConfig
    log_vocabulary: float
    float32: bool

    def beyond(self, name: str, limit: float | None) -> bool:
        return limit is not None and self.now[name] > limit


@dataclass(frozen=True)
class Check:
    """One way a run goes wrong: where it shows, why, and what to do. `cycles`: it must hold so many times in a row."""

    name: str
    reads: tuple[str, ...]
    holds: Callable[[Seen], bool]
    cause: str
    remedy: str
    cycles: int = 1
    fatal: bool = False

    def message(self, seen: Seen) -> str:
        figures = []
        for name in self.reads:
            first = "" if seen.first[name] == seen.now[name] else f" (first {seen.first[name]:.3g})"
            figures.append(f"{name} {seen.now[name]:.3g}{first}")
        return f"{self.name} in cycle {seen.cycle}: {', '.join(figures)}: {self.cause}; {self.remedy}"


def _kl_blows_up(seen: Seen) -> bool:
    limit = 3 * seen.args.target if seen.args.kl_controller == "adaptive" else 30.0
    return seen.now["objective/kl"] > max(limit, seen.before["objective/kl"])


def _entropy_explodes(seen: Seen) -> bool:
    """More than half of the way from the first cycle's entropy to that of random tokens."""
    first = seen.first["objective/entropy"]
    return seen.now["objective/entropy"] > first + 0.5 * (seen.log_vocabulary - first)


def _length_hacked(seen: Seen) -> bool:
    longer = seen.now["rollout/length_mean"] > 1.1 * seen.first["rollout/length_mean"]
    return longer and seen.now["rollout/score_length_corr"] > 0.8


def _update_too_big(seen: Seen) -> bool:
    """Adam's first steps have the full learning rate in every coordinate, which clips 20 to 40 % of the first cycle's tokens."""
    if seen.cycle == 0:
        return seen.now["policy/approx_kl"] > 1
    return seen.now["policy/clip_frac"] > 0.3 or seen.now["policy/approx_kl"] > 0.1


def _off_policy(seen: Seen) -> bool:
    """In half precision the worst of thousands of tokens is off by more; their mean is not."""
    return seen.now["rollout/logp_mismatch" if seen.float32 else "rollout/logp_mismatch_mean"] > 0.05


def _ensemble_disagrees(seen: Seen) -> bool:
    """Twice as much as at first, and by more than rounding between members that are all but equal."""
    return seen.now["reward/ensemble_std"] > max(2 * seen.first["reward/ensemble_std"], 0.1)


def _watch_disagrees(seen: Seen) -> bool:
    """The held-out score fell while the score that is optimised rose.

    By more than three standard errors: with two, every second run of a hundred cycles would be accused by chance.
    """
    spread = math.hypot(seen.first["watch/score_std"], seen.now["watch/score_std"]) / math.sqrt(seen.args.rollout_batch_size)
    fell = seen.now["watch/score"] < seen.first["watch/score"] - 3 * spread
    return fell and seen.now["objective/score"] > seen.first["objective/score"]


CHECKS = (
    Check(
        "sampling_mismatch",
        ("rollout/surprisal_gap", "rollout/surprisal_gap_z"),
        lambda seen: abs(seen.now["rollout/surprisal_gap"]) > 0.05 and abs(seen.now["rollout/surprisal_gap_z"]) > 5,
        "the responses are not drawn from the distribution that is scored (top_k, top_p, another temperature, a repetition penalty, a "
        "minimum length, another adapter), so KL and ratios are biased",
        "sample without filters, at the temperature of PPO",
    ),
    Check(
        "negative_kl",
        ("objective/kl", "objective/kl_k3"),
        lambda seen: seen.now["objective/kl"] < -0.5 and seen.now["objective/kl_k3"] > 0.05,
        "a KL cannot be negative but by noise: sampled and scored distributions differ (filters, temperature, repetition penalty, minimum "
        "length), the reference is not the SFT adapter, or it has dropout",
        "sample without filters and check the reference",
    ),
    Check(
        "kl_blow_up",
        ("objective/kl",),
        _kl_blows_up,
        "the policy runs away from the reference",
        "lower learning_rate, raise kl_coef, or set target_kl",
    ),
    Check(
        "kl_stop",
        ("objective/kl",),
        lambda seen: seen.beyond("objective/kl", seen.args.kl_stop),
        "beyond kl_stop nats a sequence",
        "lower learning_rate or raise kl_coef",
        fatal=True,
    ),
    Check(
        "entropy_collapse",
        ("objective/entropy", "rollout/unique_frac"),
        lambda seen: any(seen.now[name] < 0.3 * seen.first[name] for name in ("objective/entropy", "rollout/unique_frac")),
        "the policy gives ever the same answers",
        "raise entropy_coef or kl_coef, or lower learning_rate",
    ),
    Check(
        "entropy_explosion",
        ("objective/entropy",),
        _entropy_explodes,
        "the policy falls apart into random tokens",
        "lower learning_rate; if that does not help, an advantage has the wrong sign",
    ),
    Check(
        "length_hacking",
        ("rollout/score_length_corr", "rollout/length_mean"),
        _length_hacked,
        "the reward goes to length and the policy follows",
        "set missing_eos_penalty, or train the reward model on pairs in which the longer answer does not always win",
    ),
    Check(
        "eos_missing",
        ("rollout/eos_missing_frac",),
        lambda seen: seen.now["rollout/eos_missing_frac"] > 0.5,
        "most responses do not end: response_length is too short for them, the token that ends a turn is not among the stop tokens, or SFT "
        "never taught it (pad token = eos, masked in its labels)",
        "raise response_length, check stop_token_ids, or set missing_eos_penalty",
    ),
    Check(
        "reward_constant",
        ("objective/score_std",),
        lambda seen: seen.now["objective/score_std"] < 1e-8,
        "every response has the same score, so there is nothing to learn from but the KL",
        "check the reward: its data, its clipping (score_clip), or the function",
    ),
    Check(
        "reward_constant_stop",
        ("objective/score_std",),
        lambda seen: seen.now["objective/score_std"] < 1e-8,
        "for 20 cycles every response has had the same score",
        "check the reward: its data, its clipping (score_clip), or the function",
        cycles=20,
        fatal=True,
    ),
    Check(
        "critic_useless",
        ("value/explained_variance",),
        lambda seen: seen.now["value/explained_variance"] < 0,
        "for 20 cycles the critic has been worse than a constant",
        "raise value_learning_rate, or start it from the SFT adapter with a zero head (value_from=sft)",
        cycles=20,
    ),
    Check(
        "value_clipped",
        ("value/clip_frac",),
        lambda seen: seen.now["value/clip_frac"] > 0.5,
        "cliprange_value is small against the scores, so the critic hardly learns",
        "raise cliprange_value (None: no clipping) or normalise the scores",
        cycles=2,
    ),
    Check(
        "update_too_big",
        ("policy/clip_frac", "policy/approx_kl"),
        _update_too_big,
        "for 2 cycles each has moved the policy too far",
        "lower learning_rate or num_ppo_epochs, or set target_kl",
        cycles=2,  # once, a single token that became a thousand times likelier is enough, in healthy runs too
    ),
    Check(
        "update_too_small",
        ("policy/clip_frac",),
        lambda seen: seen.now["policy/clip_frac"] < 0.005,
        "for 20 cycles no update has come near the clip range",
        "raise learning_rate",
        cycles=20,
    ),
    Check(
        "off_policy",
        ("rollout/logp_mismatch", "rollout/logp_mismatch_mean"),
        _off_policy,
        "before the first step of a cycle the log-probabilities are no longer those of the rollout (mask, positions, dropout, adapter)",
        "report it with your settings: no option should be able to cause this",
    ),
    Check(
        "ensemble_disagreement",
        ("reward/ensemble_std",),
        _ensemble_disagrees,
        "the members of the ensemble no longer agree: the policy is where the reward models were not trained",
        "stop earlier, raise kl_coef, or combine the members by min",
    ),
    Check(
        "watch_disagrees",
        ("watch/score", "watch/score_std", "objective/score"),
        _watch_disagrees,
        "the reward rises while the held-out reward model's falls: the policy exploits the reward",
        "take an earlier checkpoint, raise kl_coef, or use an ensemble",
    ),
    Check(
        "outliers",
        ("watch/outlier_frac", "watch/outlier_mean"),
        # Of 16 known answers, the fewest, one healthy run in 300 has its limit so low that this many of the others pass it.
        lambda seen: seen.now["watch/outlier_frac"] > 0.3,
        "to the reward model many answers look like none of the first rollout: the policy is where its scores were never tested",
        "take an earlier checkpoint, raise kl_coef, or set watch_outlier_stop",
    ),
    Check(
        "watch_outlier_stop",
        ("watch/outlier_frac",),
        lambda seen: seen.beyond("watch/outlier_frac", seen.args.watch_outlier_stop),
        "beyond watch_outlier_stop: the policy exploits the reward",
        "take an earlier checkpoint or raise kl_coef",
        fatal=True,
    ),
)
READ = {name for check in CHECKS for name in check.reads}


class Health:
    """The checks of one run, and what they remember from cycle to cycle. `said`: the warnings so far, by name.

    say: where a warning goes; by default Python's warnings. stop: saves and raises.
    """

    STATES = "reward_states.safetensors"

    def __init__(self, args: PPOConfig, base: Base, stop: Callable[[str], NoReturn]):
        self.args, self.stop = args, stop
        self.say: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
        self.log_vocabulary = math.log(base.model.config.get_text_config().vocab_size)
        self.float32 = base.dtype == "float32"
        self.restart()

    def restart(self) -> None:
        self.first: Row = {}
        self.last: Row = {}
        self.streaks: dict[str, int] = {}
        self.sums = Averages()
        self.said: dict[str, str] = {}
        self.known: KnownStates | None = None

    def warn(self, name: str, text: str) -> Row:
        if name not in self.said:
            self.said[name] = text
            if self.args.process_index == 0:
                self.say(text)
        return {f"health/{name}": 1.0}

    def before(self, trainer: PPOTrainer, fresh: bool) -> Row:
        """Flags of what is doubtful before the first step (fresh: of the whole run, not of a resumed one).

        Raises InstructLiteError for what cannot work at all.
        """
        check_trainable(trainer.unwrapped)
        if fresh:
            check_start(trainer.unwrapped)
        flags: Row = {}
        for name, text in doubts(trainer):
            flags |= self.warn(name, text)
        return flags

    def look(self, cycle: int, row: Row) -> Row:
        """Flags of the checks that hold for these metrics of a cycle; a fatal one stops the run."""
        read = {name: value for name, value in row.items() if name in READ}
        self.first = read | self.first
        seen = Seen(cycle, row, self.first, read | self.last, self.args, self.log_vocabulary, self.float32)
        flags: Row = {}
        for check in CHECKS:
            if not all(name in row for name in check.reads):
                continue
            self.streaks[check.name] = self.streaks.get(check.name, 0) + 1 if check.holds(seen) else 0
            if self.streaks[check.name] >= check.cycles:
                if check.fatal:
                    self.stop(check.message(seen))
                flags |= self.warn(check.name, check.message(seen))
        self.last |= read
        return flags

    def note(self, name: str, value: float, tokens: int) -> None:
        """One micro-step's share of a metric that is looked at when the cycle is over."""
        if name in READ:
            self.sums.note(name, value, tokens)

    def end_cycle(self, cycle: int) -> Row:
        row, self.sums = self.sums.everywhere().means(), Averages()
        return self.look(cycle, row)

    def watch(self, rollout: Rollout, reduce: Reduce, gather: Callable[[Tensor], Tensor]) -> Row:
        """Metrics that show reward hacking: the held-out reward model's mean score, and how far the answers lie from known ones.

        Known are those of the first rollout: before the second there is no distance to log. What the metrics are computed
        from is then dropped from the rollout. gather: rows of all processes.
        """
        row, states = {}, rollout.reward_states
        each = torch.ones(len(rollout), dtype=torch.bool, device=rollout.mask.device)
        if rollout.watch_scores is not None:
            row["watch/score"] = masked_mean(rollout.watch_scores, each, reduce).item()
            row["watch/score_std"] = masked_variance(rollout.watch_scores, each, reduce).sqrt().item()
        if states is not None and self.known is not None:
            distances = self.known.distances(states)
            row["watch/outlier_mean"] = masked_mean(distances, each, reduce).item()
            row["watch/outlier_frac"] = masked_mean((distances > 1).float(), each, reduce).item()
        elif states is not None:
            self.known = KnownStates.fit(gather(states))
        rollout.watch_scores = rollout.reward_states = None
        return row

    # --- for a checkpoint: `state` as JSON, the known states in a file of their own ------------------------------------

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({name: getattr(self, name) for name in ("first", "last", "streaks", "sums", "said")})

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in copy.deepcopy(state).items():
            setattr(self, name, Averages(value) if name == "sums" else value)

    def save(self, directory: Path) -> dict[str, Any]:
        if self.known is not None:
            self.known.save(directory / self.STATES)
        return self.state()

    def load(self, state: dict[str, Any], directory: Path, device: torch.device) -> None:
        self.restore(state)
        if self.args.process_index:
            self.sums = Averages()  # what all processes had noted is with the first one now
        self.known = KnownStates.load(directory / self.STATES, device) if (directory / self.STATES).is_file() else None


class HealthCallback(TrainerCallback):
    """Looks when training begins and at the end of every cycle, before the log is written."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        fresh = state.global_step == 0
        flags = self.trainer.health.before(self.trainer, fresh)
        if fresh:  # a resumed run has them in its log already
            self.trainer.note(flags)

    def on_step_end(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.rollout_is_live:
            self.trainer.note(self.trainer.health.end_cycle(state.global_step // args.steps_per_cycle - 1))
