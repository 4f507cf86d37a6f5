"""InstructLite: SFT, reward model, DPO and PPO as adapters of one base model.

The public names are loaded on first use, so that `import instructlite` and `--help` load no torch.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

# Nothing phones home. TRL's telemetry is read from these when huggingface_hub is imported, so they are set before
# anything else is; a user who wants telemetry sets the variable himself.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# bitsandbytes asks, whenever it is imported on a CPU, for a package that would make 4 bits faster.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"

_HOME = {
    "SFTRecipe": "training.sft",
    "RewardRecipe": "training.reward",
    "DPORecipe": "training.dpo",
    "PPORecipe": "training.ppo",
    "PPOTrainer": "training.ppo_trainer",
    "PPOConfig": "training.ppo_config",
    "Adapter": "models.manifest",
    "InstructLiteError": "errors",
    "evaluate": "evaluation.compare",
    "prepare": "data.preparing.prepare",
    "push_to_hub": "sharing.hub",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from .data.preparing.prepare import prepare
    from .errors import InstructLiteError
    from .evaluation.compare import evaluate
    from .models.manifest import Adapter
    from .sharing.hub import push_to_hub
    from .training.dpo import DPORecipe
    from .training.ppo import PPORecipe
    from .training.ppo_config import PPOConfig
    from .training.ppo_trainer import PPOTrainer
    from .training.reward import RewardRecipe
    from .training.sft import SFTRecipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'instructlite' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
