"""A model in memory as a Completer (data/generating/completer.py): a base or one of its adapters, in batches; a reward adapter as a score.

So generating data and judging work without any endpoint. No threads: batches take their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config import BaseOptions, Lora
from ..data.generating.completer import Answer, Messages, Request, usable
from ..errors import InstructLiteError
from .base import base_of, lora_config
from .manifest import Adapter, is_adapter
from .roles import RoleModel
from .sampling import Sampling, generate, score


class LocalCompleter:
    """Answers by a role of a RoleModel (None: its base alone)."""

    parallel = 1

    def __init__(self, model: RoleModel, role: str | None, name: str, *, batch_size: int = 16):
        self.roles, self.role, self.model, self.batch_size = model, role, name, batch_size
        base, adapter = model.base, model.sources.get(role)
        weights = [base.fingerprint, base.quantization, base.dtype, base.template_sha256, adapter.sha256 if adapter else None]
        self.identity = f"{name} {hashlib.sha256(repr(weights).encode()).hexdigest()}"

    @classmethod
    def load(
        cls, model: str | Path, options: BaseOptions | None = None, *, reward: str | Path | None = None, batch_size: int = 16
    ) -> LocalCompleter:
        """model: a base (Hub id, directory, "smollm2-135m") or the directory of a policy adapter. reward: see load_scorer."""
        scorer = {"reward": Adapter.load(reward)} if reward else {}
        base = base_of(model, options or BaseOptions())
        if is_adapter(model):
            adapter = Adapter.load(model)
            if adapter.role != "policy":
                raise InstructLiteError(f"{model}: a {adapter.role} adapter cannot answer; pass one of SFT or PPO, or a base")
            return cls(RoleModel.load(base, {"policy": adapter, **scorer}), "policy", adapter.path.resolve().name, batch_size=batch_size)
        # A RoleModel has at least one adapter; this one is never active.
        adapters = scorer or {"spare": lora_config(Lora(r=1, alpha=1, top_layers=1), base.model, "CAUSAL_LM")}
        return cls(RoleModel.load(base, adapters), None, base.id, batch_size=batch_size)

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        base = self.roles.base
        answers = [Answer(None, f"prompt and answer exceed the model's context of {base.context} tokens", requests=0)] * len(requests)
        prompts = [base.encode_prompt(request.messages) for request in requests]
        draws = {i: Sampling(r.max_tokens, r.temperature) for i, r in enumerate(requests) if len(prompts[i]) + r.max_tokens <= base.context}
        for sampling in dict.fromkeys(draws.values()):
            rows = [i for i in draws if draws[i] == sampling]
            drawn = generate(
                self.roles, [prompts[i] for i in rows], self.role, sampling, seed=_seed([requests[i] for i in rows]), batch_size=len(rows)
            )
            for i, ids in zip(rows, drawn, strict=True):
                counts = {"prompt_tokens": len(prompts[i]), "completion_tokens": len(ids)}
                answers[i] = usable(base.decode(ids), truncated=ids[-1] not in base.stop_ids, **counts)
        return answers


def _seed(requests: list[Request]) -> int:
    """One for a batch: equal batches get equal answers, and no two batches the same random numbers."""
    return int(hashlib.sha256("".join(request.key("") for request in requests).encode()).hexdigest()[:15], 16)


def load_scorer(
    reward: str | Path | Adapter, completer: LocalCompleter | None = None
) -> Callable[[list[tuple[Messages, str]]], list[float]]:
    """A function that scores (prompt, answer) pairs with a reward adapter: on the completer's base if it has it, else on its own."""
    adapter = Adapter.load(reward)
    if adapter.role != "reward":
        raise InstructLiteError(f"{reward}: a {adapter.role} adapter gives no scores; pass one that RewardRecipe wrote")
    model = completer.roles if completer and "reward" in completer.roles.sources else None
    model = model or RoleModel.load(base_of(adapter, BaseOptions()), {"reward": adapter})

    def scores(pairs: list[tuple[Messages, str]]) -> list[float]:
        sequences = [(model.base.encode_prompt(prompt), model.base.encode_completion(answer)) for prompt, answer in pairs]
        return score(model, ["reward"], sequences)[0].tolist()

    return scores
