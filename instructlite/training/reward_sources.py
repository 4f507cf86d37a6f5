"""Where PPO's score comes from: reward adapters of the shared base, Python functions, another Hugging Face reward model.

One protocol for all: a source looks at a rollout and gives each response one number, or a number on some of its tokens.
What it gives is raw; rewards.py brings several of them to one scale and weighs them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from ..errors import InstructLiteError, find_function
from ..models.base import encode_conversation, encode_prompt, load_base
from ..models.manifest import Adapter

if TYPE_CHECKING:
    from .rollout import Rollout

TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@runtime_checkable
class RewardSource(Protocol):
    """Anything with a name (for the metrics `rewards/<name>/...`) and `score`."""

    name: str

    def score(self, rollout: Rollout) -> Tensor | Awaitable[Tensor]:
        """Raw scores, fp32: (batch,), or (batch, length) with the value of each token that ends a span and 0 elsewhere.

        Of Python functions a NaN (a row of NaN) says that the source has nothing to say of this response; of all others
        it is a fault. An awaitable is awaited together with those of the other sources.
        """


class AdapterReward:
    """A reward adapter of the shared base. It is scored inside the rollout, on top of the layers that all roles share."""

    def __init__(self, role: str, adapter: Adapter | None = None):
        """role: its name in the RoleModel. adapter: what is to be loaded under that name; None if the model has it already."""
        if adapter is not None and adapter.role != "reward":
            raise InstructLiteError(f"reward={adapter}: a {adapter.role} adapter; PPO needs the directory that RewardRecipe wrote")
        self.name, self.adapter = role, adapter

    @property
    def statistics(self) -> tuple[float, float] | None:
        """Mean and standard deviation of its scores over held-out answers, as its own run measured them."""
        measured = self.adapter.metrics if self.adapter else {}
        return (measured["score_mean"], measured["score_std"]) if "score_std" in measured else None

    def score(self, rollout: Rollout) -> Tensor:
        return rollout.role_scores[self.name]


class RolloutReward:
    """A callable Rollout -> scores (batch,) or (batch, length), for rewards that need tokens, masks or log-probabilities."""

    def __init__(self, function: Callable[[Rollout], Tensor], name: str | None = None):
        self.function, self.name = function, name or get_callable_name(function)

    def score(self, rollout: Rollout) -> Tensor:
        return self.function(rollout)


class FunctionReward:
    """A reward function with TRL's signature; the same object works in TRL's GRPOTrainer and RLOOTrainer.

    `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)`, sync or async, returns one
    entry for each response: a number, None (nothing to say of this one), or, beyond TRL, a list for rewards inside the
    response: one number a token, or (where, value) pairs with `where` the index of the token that ends the span, or the
    span's (start, end) in characters of the text. Prompts and completions are messages or text, as the data set has them.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function, self.name = function, name or get_callable_name(function)
        parameters = _parameters(function)
        missing = [] if _takes_any_keyword(parameters) else [name for name in TRL_ARGUMENTS if name not in parameters]
        if parameters and missing:
            raise InstructLiteError(
                f"reward function '{self.name}' does not take {', '.join(missing)}: end its signature with **kwargs, as TRL asks too"
            )

    def score(self, rollout: Rollout) -> Tensor | Awaitable[Tensor]:
        output = self.function(
            prompts=rollout.prompts, completions=rollout.completions, completion_ids=rollout.completion_ids, **rollout.columns,
            trainer_state=rollout.trainer_state, log_extra=rollout.log_extra, log_metric=rollout.log_metric,
        )  # fmt: skip
        return self._awaited(output, rollout) if is_async_callable(self.function) else self._tensor(output, rollout)

    async def _awaited(self, output: Awaitable[Any], rollout: Rollout) -> Tensor:
        return self._tensor(await output, rollout)

    def _tensor(self, output: Any, rollout: Rollout) -> Tensor:
        entries = list(output) if isinstance(output, Iterable) else None
        if entries is None or len(entries) != len(rollout):
            said = f"{len(entries)} rewards" if entries is not None else f"{output!r}"
            raise InstructLiteError(
                f"reward function '{self.name}' returned {said} for {len(rollout)} responses; it must return one for each, None where "
                "it has nothing to say"
            )
        if not any(isinstance(entry, list) for entry in entries):
            return torch.tensor([torch.nan if entry is None else self._number(entry) for entry in entries], dtype=torch.float32)
        grid = torch.zeros(rollout.mask.shape)
        for i, entry in enumerate(entries):
            if entry is None:
                grid[i] = torch.nan
                continue
            for token, value in self._placed(entry, i, rollout):
                grid[i, token] += self._number(value)
        return grid

    def _number(self, value: Any) -> float:
        """A NaN is no None: a function that computes one by mistake should not be left out in silence."""
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise InstructLiteError(f"reward function '{self.name}' returned {value!r} where a number belongs") from error
        if abs(number) == torch.inf or number != number:
            raise InstructLiteError(f"reward function '{self.name}' returned {number}: scores are not finite; nothing was updated")
        return number

    def _placed(self, entry: Any, row: int, rollout: Rollout) -> list[tuple[int, Any]]:
        """(token, value) pairs of one response."""
        ids = rollout.completion_ids[row]
        if not isinstance(entry, list):
            return [(len(ids) - 1, entry)]
        where = f"reward function '{self.name}', response {row}"
        if not all(isinstance(item, (tuple, list)) for item in entry):
            if len(entry) != len(ids):
                raise InstructLiteError(f"{where}: {len(entry)} values for {len(ids)} tokens; give one a token, or (where, value) pairs")
            return list(enumerate(entry))
        placed = []
        for span, value in entry:
            end = span if isinstance(span, int) else self._token_ending(span[1], row, rollout)
            if end is None or not 0 <= end < len(ids):
                raise InstructLiteError(
                    f"{where}: {span} lies outside of its {len(ids)} tokens and {len(rollout.texts[row])} characters; spans are inside, "
                    "the end of a pair of characters is exclusive"
                )
            placed.append((end, value))
        return placed

    @staticmethod
    def _token_ending(end: int, row: int, rollout: Rollout) -> int | None:
        """The first token with which the decoded text holds all of the first `end` characters; None if it has not as many."""
        ids, text = rollout.completion_ids[row], rollout.texts[row]
        if not 0 < end <= len(text):
            return None
        # Compared as text, not by length: half of a character decodes to a replacement character, which counts as one too.
        return bisect_left(range(len(ids)), True, key=lambda token: rollout.decode(ids[: token + 1])[:end] == text[:end])


class SeparateModelReward:
    """Another reward model (AutoModelForSequenceClassification, one label) with its own tokenizer and chat template.

    Responses reach it as text, so any tokenizer will do. It stands in memory beside the base, once in each process, and
    is no part of the trainer's model. Its template closes the assistant's turn also where the response was cut off.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        quantization: str = "none",
        dtype: str = "auto",
        chat_template: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
    ):
        """max_length: in its tokens; longer conversations lose the beginning of the prompt. None: what the model can take."""
        self.base = load_base(
            model, revision=revision, quantization=quantization, dtype=dtype, chat_template=chat_template, head="reward"
        )  # fmt: skip
        self.name = name or Path(model).name
        self.batch_size = batch_size
        self.max_length = max_length or min(self.base.context, self.base.tokenizer.model_max_length)
        self.base.model.eval()
        _score_in_fp32(self.base.model)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        sequences = [self._encode(prompt, text) for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # similar lengths share a batch: less padding
        scores, device = torch.empty(len(sequences)), self.base.device
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            ids = nn.utils.rnn.pad_sequence(
                [torch.tensor(sequences[i]) for i in rows], batch_first=True, padding_value=self.base.pad_id, padding_side="right"
            )
            lengths = torch.tensor([len(sequences[i]) for i in rows])
            attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            logits = self.base.model(input_ids=ids.to(device), attention_mask=attention.to(device)).logits[:, 0]
            scores[rows] = logits.float().cpu()
        return scores

    def _encode(self, prompt: str | list[dict[str, str]], text: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = encode_conversation(self.base.tokenizer, [*messages, {"role": "assistant", "content": text}])
        answer = len(ids) - len(encode_prompt(self.base.tokenizer, messages))
        if answer >= self.max_length:
            raise InstructLiteError(
                f"reward model {self.name}: a response of {answer} of its tokens does not fit its max_length {self.max_length}; "
                "lower response_length"
            )
        begin = ids[:1] if len(ids) > self.max_length and ids[0] == self.base.tokenizer.bos_token_id else []
        return begin + ids[len(begin) - self.max_length :]


def _score_in_fp32(model: nn.Module) -> None:
    """The last layer in fp32: in bfloat16 a score of 10 comes in steps of 0.06."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1][-1]
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def source_of(given: Any, name: str | None = None) -> RewardSource:
    """The source that is no adapter: a source as it is, a function, "module:function", "hf:MODEL", or {"model": MODEL, ...}."""
    if isinstance(given, dict):
        options = {option: value for option, value in given.items() if option != "model"}
        if unknown := set(options) - set(inspect.signature(SeparateModelReward).parameters):
            raise InstructLiteError(f"reward model {given['model']}: {', '.join(sorted(unknown))} is no option of it")
        return SeparateModelReward(given["model"], **({"name": name} | options))
    if isinstance(given, str) and given.startswith("hf:"):
        return SeparateModelReward(given.removeprefix("hf:"), name=name)
    if isinstance(given, str):
        return FunctionReward(load_function(given), name)
    if isinstance(given, RewardSource):
        return given
    if not callable(given):
        raise InstructLiteError(f"reward={given!r}: neither a reward adapter, nor a function, nor an object with a name and score(rollout)")
    return RolloutReward(given, name) if _takes_a_rollout(given) else FunctionReward(given, name)


def load_function(path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise InstructLiteError(f"reward={path}: neither a reward adapter's directory, nor module:function, nor hf:MODEL")
    function = find_function("reward", path)
    if function is None:
        module, _, name = path.partition(":")
        raise InstructLiteError(f"reward={path}: {module} has no function {name}")
    return function


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # a builtin: only calling it tells
        return {}


def _takes_a_rollout(function: Callable[..., Any]) -> bool:
    """TRL passes everything by keyword, so a function with one positional argument and none of TRL's names is no function for it."""
    parameters = _parameters(function)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(required) == 1 and not _takes_any_keyword(parameters) and not set(TRL_ARGUMENTS) & set(parameters)


def _takes_any_keyword(parameters: dict[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def wait_for_all(waiting: list[Awaitable[Tensor]]) -> list[Tensor]:
    """Await all together, on an event loop that stays: functions may keep a client between calls, as under TRL."""

    async def gathered() -> list[Tensor]:
        return await asyncio.gather(*waiting)

    return asyncio.run_coroutine_threadsafe(gathered(), _event_loop()).result() if waiting else []


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """In a thread of its own: where PPO runs in a notebook, the main one has a running loop already."""
    _, loop, ready = start_event_loop_in_daemon(name="reward-functions")
    ready.wait()
    return loop
