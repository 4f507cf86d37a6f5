"""LoRA adapters of several roles in one batch, by two products a layer for all of them together.

PEFT computes the rows of each adapter apart, with a dozen small operations for every layer and adapter; where each row gets one token,
these take half as long as the layers themselves. Here the A matrices stand below one another and the B matrices side by side, and what
the A of other adapters make of a row is set to 0 in between. It costs a copy of the adapters in memory.
Left to PEFT, layer by layer: all that is not plain LoRA of a linear layer (embeddings, DoRA, modules trained as a whole).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import linear


class Mixture:
    """Adapters for mixed batches, as copies: what is trained or loaded later is not in them."""

    def __init__(self, modules: Iterable[nn.Module], names: Sequence[str]):
        """modules: all that switch between adapters."""
        self.names = list(names)
        self._layers = [(module, _stack(module, self.names)) for module in modules]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Row i computes with the adapter names[i], None without one. To be held where all adapters are off, and switched back later."""
        numbers = torch.tensor([-1 if name is None else self.names.index(name) for name in names])
        foreign: dict[tuple[int, ...], Tensor] = {}
        with ExitStack() as hooks:
            for module, stack in self._layers:
                if stack is None:
                    hook = _left_to_peft(module, names)
                else:
                    if stack.owners not in foreign:
                        foreign[stack.owners] = (numbers[:, None] != torch.tensor(stack.owners)).to(stack.down.device)
                    hook = module.register_forward_hook(partial(stack.add, foreign[stack.owners]))
                hooks.callback(hook.remove)
            yield


@dataclass
class _Stack:
    """The adapters of one layer. owners: the number of the adapter that each row of `down` and column of `up` comes from."""

    down: Tensor
    up: Tensor
    owners: tuple[int, ...]

    def add(self, foreign: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """The layer's result with the adapters', added in their precision, as PEFT does it for one adapter."""
        (states,) = inputs
        if len(states) != len(foreign):
            raise ValueError(f"{len(states)} rows, but adapters for {len(foreign)}")
        ranks = linear(states.to(self.down.dtype), self.down)
        ranks = ranks.masked_fill(foreign.view(len(foreign), *[1] * (states.dim() - 2), -1), 0)
        return (result + linear(ranks, self.up)).to(result.dtype)


def _stack(module: nn.Module, names: list[str]) -> _Stack | None:
    """None: PEFT's own way is the only one."""
    if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
        return None
    there = [name for name in names if name in module.lora_A]
    plain = isinstance(module.get_base_layer(), nn.Linear)
    if not there or not plain or any(name in module.lora_variant or module.lora_B[name].bias is not None for name in there):
        return None
    down = torch.cat([module.lora_A[name].weight.detach() for name in there])
    up = torch.cat([module.lora_B[name].weight.detach() * module.scaling[name] for name in there], dim=1)
    if not up.isfinite().all():  # 0 times infinity is no 0: it would spoil the rows of others
        return None
    return _Stack(down, up, tuple(names.index(name) for name in there for _ in range(module.lora_A[name].out_features)))


def _left_to_peft(module: nn.Module, names: Sequence[str | None]) -> Any:
    """PEFT's `adapter_names` for one module; the hook to remove."""
    module._disable_adapters = False
    whole = isinstance(module, ModulesToSaveWrapper)
    if whole:
        module._active_adapter = []  # with one that it has no copy for, PEFT would compute its original module for every row
    # PEFT raises where a row's adapter has no copy of a module that another one has trained as a whole.
    own = ["__base__" if name is None or (whole and name not in module.modules_to_save) else name for name in names]
    return module.register_forward_pre_hook(lambda _, inputs, options: (inputs, options | {"adapter_names": own}), with_kwargs=True)
