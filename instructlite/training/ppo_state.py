"""What a PPO checkpoint holds beyond Trainer's own state, so that a resumed run is the uninterrupted run, bit for bit.

In the checkpoint directory: the policy as a plain PEFT adapter at the root (written by the trainer's `_save`), here
`value.safetensors` (adapter and head), `ppo_state.json` (KL coefficient, score scales, shape of a cycle, hashes of the frozen
roles), and in the middle of a cycle the rollout itself, one file a process. Frozen roles are not stored: they are hashed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InstructLiteError
from ..models.roles import RoleModel
from .rollout import Rollout

if TYPE_CHECKING:
    from .ppo_trainer import PPOTrainer

NAME = "ppo_state.json"
SHAPE = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs", "world_size", "seed")


def save_ppo_state(trainer: PPOTrainer, directory: str | Path) -> None:
    """Called on every process; all but the rollout is written by the one that saves."""
    directory = Path(directory)
    health = trainer.health.sums.everywhere()
    if trainer.rollout_is_live:
        _save_rollout(trainer.rollout, _rollout_file(directory, trainer))
    if not trainer.args.should_save:
        return
    model = trainer.unwrapped
    for role in trainer.stored_roles:
        tensors = model.state_of(role)
        if role in model.heads:
            tensors |= {f"head.{name}": tensor for name, tensor in model.heads[role].state_dict().items()}
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, directory / f"{role}.safetensors")
    state = {
        "kl_coef": trainer.kl_coef,
        "skip_cycle": trainer.skip_cycle,
        "scales": trainer.rewards.state(),
        "rewards": trainer.rewards.describe(),
        "shape": {name: getattr(trainer.args, name) for name in SHAPE},
        "prompts": trainer.prompts_sha256,
        "rollout": trainer.rollout_is_live,
        "health": trainer.health.save(directory) | {"sums": health},
        "frozen": {role: role_sha256(model, role) for role in trainer.frozen_roles},
    }
    (directory / NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_ppo_state(trainer: PPOTrainer, directory: str | Path) -> None:
    """Put a checkpoint back in place, before the optimiser exists.

    Raises InstructLiteError, with every difference, if the prompts, a frozen role, the seed or (in the middle of a cycle) the
    shape of a cycle are not those the checkpoint was made with.
    """
    directory = Path(directory)
    if not (directory / NAME).is_file():
        raise InstructLiteError(f"{directory}: no checkpoint of PPO ({NAME} is missing)")
    state = json.loads((directory / NAME).read_text(encoding="utf-8"))
    model = trainer.unwrapped
    _check_same(trainer, state, model, directory)
    set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"), adapter_name="policy")
    for role in trainer.stored_roles:
        tensors = load_file(directory / f"{role}.safetensors")
        head = {name.removeprefix("head."): tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
        set_peft_model_state_dict(model, tensors, adapter_name=role)
        if head:
            model.heads[role].load_state_dict(head)
    trainer.kl_coef, trainer.skip_cycle = state["kl_coef"], state["skip_cycle"]
    trainer.rewards.restore(state["scales"])
    trainer.health.load(state["health"], directory, model.device)
    trainer.rollout = _load_rollout(_rollout_file(directory, trainer), model.device) if state["rollout"] else None


def _check_same(trainer: PPOTrainer, state: dict[str, Any], model: RoleModel, directory: Path) -> None:
    now = {
        "seed": trainer.args.seed,
        "prompts": trainer.prompts_sha256,
        "rewards": trainer.rewards.describe(),
        **{f"weights of {role}": role_sha256(model, role) for role in trainer.frozen_roles},
    }
    then = {"seed": state["shape"]["seed"], "prompts": state["prompts"], "rewards": state["rewards"]}
    then |= {f"weights of {r}": h for r, h in state["frozen"].items()}
    if state["rollout"]:  # at the end of a cycle another shape is another plan, not another past
        now |= {name: getattr(trainer.args, name) for name in SHAPE}
        then |= state["shape"]
    different = [name for name in then | now if then.get(name) != now.get(name)]
    if different:
        rows = "; ".join(f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in different)
        raise InstructLiteError(f"{directory}: cannot be resumed with other settings: {rows}. Put them back, or start a new run")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def role_sha256(model: RoleModel, role: str) -> str:
    """Hash of a role's tensors, head included."""
    digest = hashlib.sha256()
    for parameter in model.role_parameters(role):
        digest.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rollout_file(directory: Path, trainer: PPOTrainer) -> Path:
    return directory / f"rollout_{trainer.args.process_index}.safetensors"


def _save_rollout(rollout: Rollout, path: Path) -> None:
    tensors = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in tensors.items() if isinstance(value, Tensor)}, path)


def _load_rollout(path: Path, device: torch.device) -> Rollout:
    # The rows of the data set are needed only while a rollout is scored.
    return Rollout(rows=[], **{name: tensor.to(device) for name, tensor in load_file(path).items()})
