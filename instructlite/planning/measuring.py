"""What `plan --calibrate` measures: seconds a token of everything that the stages do, with random tokens and an untrained adapter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import BaseOptions, Loop
from ..models.base import base_of, lora_config
from ..models.logprobs import token_log_probs
from ..models.roles import RoleModel
from ..models.sampling import Sampling, generate
from ..progress import progress
from .calibration import Speed
from .stages import Asked

LENGTH = 96  # tokens of the longest row that is read or learnt from
PROMPT, ANSWER = 32, 24  # tokens of what is sampled
SECONDS = 3  # for each measurement, beside its first call
MOST = 5  # calls


def measure(loop: Loop, asked: Asked) -> Speed:
    """Loads the base; about a minute for 135M on a CPU. asked: what the recipe asks of PPO."""
    options = BaseOptions(quantization=loop.quantization, dtype=loop.dtype, chat_template=loop.chat_template, revision=loop.revision)
    with torch.random.fork_rng(), progress("measuring", MEASUREMENTS) as advance:
        torch.manual_seed(0)
        start = time.perf_counter()
        base = base_of(loop.model, options)
        model = RoleModel.load(base, {"policy": lora_config(loop.options("sft")["lora"], base.model, "CAUSAL_LM")})
        load = time.perf_counter() - start
        found = _Measuring(model, asked, advance).all(loop.evaluation.batch_size)
    return Speed(**found, load=load)


MEASUREMENTS = 11


class _Measuring:
    def __init__(self, model: RoleModel, asked: Asked, advance: Callable[[], None]):
        self.model, self.asked, self.advance = model, asked, advance
        self.vocabulary = model.base.model.config.get_text_config().vocab_size

    def all(self, evaluated: int) -> dict[str, float]:
        """evaluated: rows of evaluation's batches."""
        model, micro = self.model, self.asked.micro_batch
        cuda = model.device.type == "cuda"
        found = self._layers(("lower", "read", "train"), micro, lean=cuda, packed=False)
        found |= self._layers(("shared", "upper", "learn"), micro, lean=True, packed=self.asked.padding_free)
        found |= self._layers(("", "score", ""), evaluated, lean=cuda, packed=False)
        found |= self._head(micro)
        model.autocast = True
        found["sample"] = self._sampling(["policy"] * self.asked.generated_at_once)
        model.autocast = False
        found["answer"] = self._sampling(["policy" if i % 2 else None for i in range(evaluated)])
        return found

    def _layers(self, names: tuple[str, str, str], rows: int, *, lean: bool, packed: bool) -> dict[str, float]:
        """Of a batch with rows from half the length to all of it where it is packed, else of equal ones: below, forward, and back."""
        model = self.model
        model.autocast, model.padding_free = lean, packed
        ids = torch.randint(self.vocabulary, (rows, LENGTH), device=model.device)
        attention = torch.ones_like(ids)
        if packed:
            for row, padding in enumerate(torch.linspace(0, LENGTH // 2, rows).int().tolist()):
                attention[row, :padding] = 0

        def below() -> Tensor | None:
            with model.precision():
                return model.lower_hidden(ids, attention)

        lower = below()

        def forward() -> Tensor:
            with model.precision(), model.active("policy"):
                return model.hidden(ids, attention, lower)

        work = {names[0]: below, names[1]: torch.no_grad()(forward), names[2]: lambda: forward().float().square().mean().backward()}
        model.set_trainable(["policy"])
        found = {name: self._seconds(call) / int(attention.sum()) for name, call in work.items() if name}
        model.set_trainable(())
        model.padding_free = False
        return found if lower is not None else {name: value if name != names[0] else 0.0 for name, value in found.items()}

    def _head(self, rows: int) -> dict[str, float]:
        size = self.model.base.model.config.get_text_config().hidden_size
        states = torch.randn(rows * LENGTH // 2, size, device=self.model.device, dtype=getattr(torch, self.model.base.dtype))
        chosen = torch.randint(self.vocabulary, (len(states),), device=self.model.device)

        def log_probs(hidden: Tensor) -> Tensor:
            return token_log_probs(self.model.logits, hidden, chosen)[0].sum()

        head = self._seconds(torch.no_grad()(lambda: log_probs(states)))
        learnt = self._seconds(lambda: log_probs(states.clone().requires_grad_()).backward())
        return {"head": head / len(states), "head_learnt": learnt / len(states)}

    def _sampling(self, roles: list[str | None]) -> float:
        prompts = torch.randint(self.vocabulary, (len(roles), PROMPT)).tolist()
        never = [self.vocabulary]  # no answer ends with it

        def answers(tokens: int) -> None:
            generate(self.model, prompts, roles, Sampling(tokens), stop_ids=never, batch_size=len(roles))

        answers(2)
        return self._timed(lambda: answers(ANSWER), done=True) / (ANSWER * len(roles))

    def _seconds(self, work: Callable[[], object]) -> float:
        """The median of a few calls, the first left out."""
        self._timed(work)
        taken = [self._timed(work)]
        while len(taken) < MOST and sum(taken) + taken[0] < SECONDS:
            taken.append(self._timed(work))
        self.advance()
        return statistics.median(taken)

    def _timed(self, work: Callable[[], object], done: bool = False) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if done:
            self.advance()
        return seconds
