"""Roles: policy, reference, value and reward as adapters and scalar heads of ONE base in memory.

Switching never goes through `set_adapter`: that flips `requires_grad`, and a value adapter so frozen gives no error, only
a critic that stops learning. `active()` changes which adapter computes and nothing else.
Left out: merging (it rounds the shared base), adapters that are not LoRA, and trainable-token adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import InstructLiteError
from .base import Base
from .logprobs import CHUNK, token_log_probs
from .manifest import Adapter, verify, write_manifest
from .mixing import Mixture

# Architectures whose lower layers were compared with the whole model by tests/test_roles.py: no scaled embeddings, no
# per-layer inputs, no layer that looks itself up by index.
SLICEABLE = {"llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"}

PACKED_MULTIPLE = 64
"""Length of a packed row: for each new one oneDNN compiles and keeps kernels, on a CPU some 10 MB and tens of milliseconds."""


class RoleModel(PeftModelForCausalLM):
    """A frozen base with one LoRA adapter per role, and an fp32 scalar head for roles that score (`heads[role]`).

    It is a PeftModel, so `generate`, Trainer and PEFT's own saving work on it. Build it with `RoleModel.load`.
    """

    base: Base
    sources: dict[str, Adapter]
    """The trained adapter each role was read from; copies and fresh ones have none."""

    @classmethod
    def load(cls, base: Base, adapters: Mapping[str, Adapter | LoraConfig]) -> RoleModel:
        """Hang adapters into `base`: {role: trained Adapter, or a LoraConfig for a fresh one}. All are frozen at first.

        Raises InstructLiteError if an adapter is damaged, of another base, or not LoRA.
        """
        model = None
        for role, source in adapters.items():
            if isinstance(source, Adapter):
                verify(source, base)
            config = PeftConfig.from_pretrained(source.path) if isinstance(source, Adapter) else copy.deepcopy(source)
            config = _lora_of_trunk(config, source)
            if model is None:
                model = cls(base.model, config, adapter_name=role)
                model.base, model.heads, model.sources = base, nn.ModuleDict(), {}
            else:
                model.add_adapter(role, config)
            if isinstance(source, Adapter):
                model._read_weights(role, source)
        if model is None:
            raise ValueError("RoleModel.load needs at least one adapter")
        model._find_layers()
        model.set_trainable(())
        return model.eval()

    @classmethod
    def for_ppo(
        cls,
        base: Base,
        policy: Adapter | LoraConfig,
        rewards: Adapter | Mapping[str, Adapter] | None = None,
        *,
        value_from: Literal["sft", "reward"] = "sft",
        reference: Adapter | None = None,
    ) -> RoleModel:
        """The roles of PPO: policy, reference (a copy of the SFT adapter; none for a fresh LoRA: then the base), value, reward.

        reference: another adapter than the one that the policy starts from.

        rewards: several by role, or one as the role `reward`. value_from: "sft" copies the policy's adapter and starts at
        V = 0; "reward" copies adapter and head of the (first) reward model, as InstructGPT did.
        """
        rewards = {"reward": rewards} if isinstance(rewards, Adapter) else dict(rewards or {})
        held_to = {"reference": reference} if reference else {}
        model = cls.load(base, {"policy": policy, **held_to, **rewards})
        if isinstance(policy, Adapter) and reference is None:
            model.copy_role("policy", "reference")
        model.copy_role("policy" if value_from == "sft" else next(iter(rewards)), "value")
        if value_from == "sft":
            model.add_head("value")
        return model

    def _read_weights(self, role: str, adapter: Adapter) -> None:
        self.sources[role] = adapter
        weights = load_file(adapter.path / "adapter_model.safetensors")
        # PEFT drops the head of a sequence-classification adapter in silence; here it becomes `heads[role]`.
        head = [name for name in weights if name.endswith("score.weight")]
        if head:
            self.add_head(role, weights.pop(head[0]), adapter.manifest.score_bias or 0.0)
        elif adapter.role == "reward":
            raise InstructLiteError(f"{adapter.path}: a reward adapter without its score head; train the reward model again")
        result = set_peft_model_state_dict(self, weights, adapter_name=role)
        loaded = get_peft_model_state_dict(self, adapter_name=role, save_embedding_layers=False)
        if result.unexpected_keys or len(loaded) != len(weights):
            raise InstructLiteError(f"{adapter.path}: its tensors do not fit the base ({len(weights)} stored, {len(loaded)} expected)")

    def _find_layers(self) -> None:
        """Walking all modules at every switch would cost milliseconds, so the switchable ones are kept."""
        self._switchable = [m for m in self.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        for module in self._switchable:
            if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
                raise InstructLiteError("trainable_token_indices are not supported; use modules_to_save for new tokens")

    # --- which adapter computes -------------------------------------------------------------------------------------

    @property
    def roles(self) -> list[str]:
        return list(self.peft_config)

    @contextmanager
    def active(self, role: str | None) -> Iterator[None]:
        """Compute with the adapter of `role`; None is the base alone. `requires_grad` is left as it is."""
        if role is not None and role not in self.peft_config:
            raise KeyError(f"no role {role!r}; there are {', '.join(self.roles)}")
        before = [(module, module._active_adapter, module._disable_adapters) for module in self._switchable]
        for module in self._switchable:
            module._disable_adapters = role is None
            if role is not None:
                # A modules_to_save wrapper without this adapter must compute its original module: [] says so.
                has = isinstance(module, BaseTunerLayer) or role in module.modules_to_save
                module._active_adapter = [role] if has else []
        try:
            yield
        finally:
            for module, adapter, disabled in before:
                module._active_adapter, module._disable_adapters = adapter, disabled

    def mixture(self, roles: Iterable[str | None]) -> Mixture:
        """What `mixed` needs for batches of these roles, as they are now: to keep where it is called at every token."""
        wanted = set(roles)
        return Mixture(self._switchable, [role for role in self.roles if role in wanted])

    @contextmanager
    def mixed(self, roles: list[str | None], mixture: Mixture | None = None) -> Iterator[None]:
        """Row i of the batch computes with roles[i]; eval mode only."""
        if self.training:
            raise ValueError("adapters mix in eval mode only: dropout would be drawn for each of them")
        if unknown := set(roles) - {None, *self.peft_config}:
            raise KeyError(f"no role {unknown.pop()!r}; there are {', '.join(self.roles)}")
        with self.active(None), (mixture or self.mixture(roles)).rows(roles):
            yield

    def reactivation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of non-reentrant gradient checkpointing: recompute with the adapter of the forward pass.

        Backward runs after `active()` was left; without this the value layers would be recomputed with the policy.
        """
        module = self._switchable[0]
        role = None if module._disable_adapters else next(iter(module._active_adapter), None)
        return nullcontext(), self.active(role)

    autocast = False
    """Whether half-precision bases compute their fp32 adapters under autocast: PPO switches it on, for rollout and training
    alike (a fifth faster on a CPU when measured); without it the numbers are those of plain PEFT to the last bit."""

    def precision(self) -> AbstractContextManager[None]:
        """The autocast that `autocast` asks for, to be held around every forward pass."""
        dtype = getattr(torch, self.base.dtype)
        return self._autocast(dtype) if self.autocast and dtype != torch.float32 else nullcontext()

    @contextmanager
    def _autocast(self, dtype: torch.dtype) -> Iterator[None]:
        """Without PEFT's own cast of each input to fp32: autocast would bring a copy of it back, kept for the backward pass."""
        before = [getattr(module, "cast_input_dtype_enabled", True) for module in self._switchable]
        self._cast_inputs([False] * len(before))
        try:
            with torch.autocast(self.device.type, dtype=dtype):
                yield
        finally:
            self._cast_inputs(before)

    def _cast_inputs(self, enabled: Iterable[bool]) -> None:
        for module, cast in zip(self._switchable, enabled, strict=True):
            module.cast_input_dtype_enabled = cast

    # --- adapters and heads -----------------------------------------------------------------------------------------

    def add_head(self, role: str, weight: Tensor | None = None, bias: float = 0.0) -> None:
        """A scalar head in fp32; without a weight it starts at exactly 0, so that V = 0 before the first update."""
        size = self.base.model.config.get_text_config().hidden_size
        head = nn.Linear(size, 1, dtype=torch.float32)
        with torch.no_grad():
            head.weight.copy_(weight) if weight is not None else head.weight.zero_()
            head.bias.fill_(bias)
        self.heads[role] = head.to(self.base.device)

    def add_trained(self, role: str, adapter: Adapter) -> None:
        """Add one more trained adapter, and its head if it has one; both frozen. Raises what `load` raises."""
        verify(adapter, self.base)
        self.add_adapter(role, _lora_of_trunk(PeftConfig.from_pretrained(adapter.path), adapter))
        self._find_layers()
        self._read_weights(role, adapter)
        for parameter in self.role_parameters(role):
            parameter.requires_grad_(False)

    def copy_role(self, source: str, target: str) -> None:
        """Add `target` as a copy of `source`: adapter, and head if it has one."""
        self.add_adapter(target, copy.deepcopy(self.peft_config[source]))
        self._find_layers()
        weights = get_peft_model_state_dict(self, adapter_name=source, save_embedding_layers=False)
        set_peft_model_state_dict(self, weights, adapter_name=target)
        if source in self.heads:
            self.heads[target] = copy.deepcopy(self.heads[source])
        self.set_requires_grad([target], False)

    def set_trainable(self, roles: Iterable[str]) -> None:
        """Train exactly these roles (adapter and head) and freeze everything else."""
        roles = list(roles)
        self.requires_grad_(False)
        if roles:
            self.set_requires_grad(roles, True)
        for role in roles:
            if role in self.heads:
                self.heads[role].requires_grad_(True)

    def role_parameters(self, role: str) -> list[nn.Parameter]:
        """The parameters of one role, adapter first, head last; never picked by name (a head's name matches too)."""
        found: list[nn.Parameter] = []
        for module in self._switchable:
            containers = module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ("modules_to_save",)
            for container in (getattr(module, name) for name in containers):
                if role in container:
                    part = container[role]
                    found += [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        return found + (list(self.heads[role].parameters()) if role in self.heads else [])

    def state_of(self, role: str) -> dict[str, Tensor]:
        """Adapter tensors as PEFT stores them (no adapter name in the keys)."""
        return get_peft_model_state_dict(self, adapter_name=role, save_embedding_layers=False)

    def save_role(self, role: str, directory: str | Path, *, parents: dict[str, str] | None = None) -> None:
        """Write one role without a head as a plain PEFT adapter directory with tokenizer and manifest."""
        if role in self.heads:
            raise InstructLiteError(
                f"the role {role} has a scalar head, which the directory would lack; RewardRecipe writes reward adapters"
            )
        directory = Path(directory)
        self.write_peft(role, directory)
        self.base.tokenizer.save_pretrained(directory)
        write_manifest(directory, role="policy", base=self.base, parents=parents)

    def write_peft(self, role: str, directory: Path) -> None:
        """Only what PEFT reads: the adapter's tensors and its config."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_of(role).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.deepcopy(self.peft_config[role])
        config.inference_mode = True
        config.base_model_name_or_path, config.revision = str(self.base.path), self.base.revision
        config.save_pretrained(str(directory))

    # --- forward passes ---------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its language-model head, adapters inside."""
        return self.base.model.base_model

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) -> fp32 (tokens, vocabulary), through the module, so that adapters on the head count."""
        config = self.base.model.config.get_text_config()
        logits = self.base.model.get_output_embeddings()(hidden).float()
        logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, lower: Tensor | None = None) -> Tensor:
        """Last hidden states (batch, length, hidden) of whatever role is active.

        lower: what `lower_hidden` gave for the same rows; then only the layers above run.
        """
        if lower is None:
            return self._decode({"input_ids": input_ids}, attention_mask)
        with self._only_layers(slice(self.shared_layers, None)):
            return self._decode({"inputs_embeds": lower}, attention_mask)

    padding_free = False
    """Whether the rows of a batch go through the decoder as one row without padding. Equal to rounding; attention is then
    quadratic in the tokens of the batch (transformers makes a block mask from positions that start again at 0)."""

    def _decode(self, inputs: dict[str, Tensor], attention_mask: Tensor) -> Tensor:
        """(batch, length, hidden). Positions count real tokens, so that left padding moves nothing in models that learn them."""
        positions = positions_of(attention_mask)
        if not self.padding_free or len(attention_mask) == 1 or attention_mask.all():
            return self.backbone(**inputs, attention_mask=attention_mask, position_ids=positions, use_cache=False).last_hidden_state
        real = attention_mask.bool()
        fill = -int(real.sum()) % PACKED_MULTIPLE
        packed = {name: _filled(value[real], fill)[None] for name, value in inputs.items()}
        position_ids = torch.cat([positions[real], torch.arange(fill, device=positions.device)])[None]  # the filling is a row of its own
        states = self.backbone(**packed, position_ids=position_ids, use_cache=False).last_hidden_state[0]
        return states.new_zeros(*real.shape, states.shape[-1]).masked_scatter(real[..., None], states[: len(states) - fill])

    @property
    def shared_layers(self) -> int:
        """How many lowest layers no adapter touches, so that all roles compute the same there; 0 where slicing is unproven."""
        if self.base.model.config.model_type not in SLICEABLE or any(isinstance(m, ModulesToSaveWrapper) for m in self._switchable):
            return 0
        touched = [any(isinstance(m, BaseTunerLayer) for m in layer.modules()) for layer in self.backbone.layers]
        inside = {id(m) for layer in self.backbone.layers for m in layer.modules()}
        outside = [m for m in self._switchable if id(m) not in inside and m is not self.base.model.get_output_embeddings()]
        return 0 if outside or True not in touched else touched.index(True)

    @torch.no_grad()
    def lower_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Hidden states behind the shared lower layers: computed once, the same for every role and every epoch."""
        if self.shared_layers == 0:
            return None
        with self.active(None), self._only_layers(slice(0, self.shared_layers), norm=False):
            return self._decode({"input_ids": input_ids}, attention_mask)

    @contextmanager
    def _only_layers(self, part: slice, *, norm: bool = True) -> Iterator[None]:
        backbone = self.backbone
        layers, final = backbone.layers, backbone.norm
        backbone.layers = layers[part]
        if not norm:
            backbone.norm = nn.Identity()
        try:
            yield
        finally:
            backbone.layers, backbone.norm = layers, final

    def scores(self, role: str, hidden: Tensor) -> Tensor:
        """Scalar head of `role` in fp32: (..., hidden) -> (...)."""
        head = self.heads[role]
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.float())[..., 0]

    def forward(self, *args: Any, response: ResponseBatch | None = None, **kwargs: Any) -> Any:
        """PEFT's forward; with `response`, the log-probabilities, entropies and values PPO learns from.

        One call does policy and value, because DistributedDataParallel expects one forward before each backward.
        """
        return super().forward(*args, **kwargs) if response is None else self._response_pass(response)

    def policy_pass(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """log pi and entropy of the valid response tokens, each flat (tokens,)."""
        with self.precision(), self.active(batch.policy):
            return token_log_probs(
                self.logits,
                self._response_states(batch),
                batch.input_ids[:, batch.prompt_length :][batch.mask],
                temperature=batch.temperature,
                chunk=batch.chunk,
                entropy_grad=batch.entropy_grad,
                frozen_head=not any(p.requires_grad for p in self.base.model.get_output_embeddings().parameters()),
            )

    def _response_states(self, batch: ResponseBatch) -> Tensor:
        """(tokens, hidden): the state of a token is the column before it."""
        return self.hidden(batch.input_ids, batch.attention_mask, batch.lower)[:, batch.prompt_length - 1 : -1][batch.mask]

    def value_pass(self, batch: ResponseBatch) -> Tensor:
        """V before each valid response token, flat (tokens,)."""
        with self.precision(), self.active(batch.value):
            return self.scores(batch.value, self._response_states(batch))

    def _response_pass(self, batch: ResponseBatch) -> dict[str, Tensor]:
        log_probs, entropy = self.policy_pass(batch)
        return {"logps": log_probs, "entropy": entropy, "values": self.value_pass(batch)}


@dataclass
class ResponseBatch:
    """Prompts (left-padded) and responses (right-padded) for one forward pass of policy and value.

    input_ids, attention_mask: (batch, prompt_length + response_length); mask: bool (batch, response_length), True up to
    and including the last valid token. Results are flat over the True tokens of `mask`, row by row.
    lower: hidden states behind the shared lower layers, or None to run the whole model.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    lower: Tensor | None = None
    temperature: float = 1.0
    chunk: int = CHUNK
    entropy_grad: bool = False
    policy: str = "policy"
    value: str = "value"

    @property
    def prompt_length(self) -> int:
        return self.input_ids.shape[1] - self.mask.shape[1]


def _filled(tokens: Tensor, n: int) -> Tensor:
    """n zero rows behind the tokens."""
    return torch.cat([tokens, tokens.new_zeros(n, *tokens.shape[1:])])


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids (batch, length) that count real tokens only."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _lora_of_trunk(config: PeftConfig, source: Adapter | LoraConfig) -> LoraConfig:
    """The LoRA part of an adapter's config, as an adapter of the causal trunk (its score head is handled by us)."""
    if not isinstance(config, LoraConfig):
        raise InstructLiteError(f"{source}: a {config.peft_type} adapter; InstructLite's roles are LoRA adapters")
    if config.bias != "none":
        raise InstructLiteError(f"{source}: bias={config.bias!r}; several adapters of one base allow bias='none' only")
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    kept = [name for name in config.modules_to_save or [] if name != "score"]
    config.modules_to_save = kept or None
    return config
