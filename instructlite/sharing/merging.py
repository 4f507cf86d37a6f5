"""merge(): base and adapter as one model without adapters, for programs that know none; checked before it is kept.

Merging rounds: W + BA has to fit the dtype of W. On a 4-bit base that would be far off, so the base is read anew in full, and the merged
model answers a little otherwise than the adapter did on the base it was trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InstructLiteError
from ..models.base import Base, load_base
from ..models.manifest import Adapter
from ..models.roles import RoleModel
from ..training.work import publish

PROBES = ("Why is the sky blue?", "Write a short poem about rain.", "List three uses of a brick.", "Good morning!")
MOST_KL = 0.01
"""Nats a token; rounding to bfloat16 was far below it, a merge that went wrong is far above."""
RECORD = "merged.json"


@dataclass(frozen=True)
class Merged:
    """What was merged, and how far the merged model is from base and adapter on some prompts."""

    path: str
    base: str
    dtype: str
    adapter_sha256: str
    largest_logit_difference: float
    mean_kl: float
    """Of next-token distributions, in nats."""
    same_best_token: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.base} with the adapter {self.adapter_sha256[:12]} merged into it, {self.dtype}.\n"
            f"Against base and adapter on {len(PROBES)} prompts: logits differ by {self.largest_logit_difference:.2g} at most, "
            f"KL {self.mean_kl:.2g} nats a token, the same best token at {self.same_best_token:.1%} of positions."
        )


def merge(
    adapter: str | Path | Adapter, output: str | Path, *, dtype: str = "auto", say: Callable[[str], None] = lambda line: None
) -> Merged:
    """Write the whole model, with the tokenizer and `merged.json`, into a directory that is new or empty.

    dtype: "auto" is that of the adapter's base. say: gets a line on what the user should know.
    Raises InstructLiteError if it is no policy adapter, or the merged model computes something else.
    """
    adapter, output = Adapter.load(adapter), Path(output)
    if adapter.role != "policy":
        raise InstructLiteError(f"{adapter}: a {adapter.role} adapter; its head would be lost, so only policies are merged")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InstructLiteError(f"{output}: exists; choose a new directory")
    manifest = adapter.manifest
    if manifest.quantization != "none":
        say(
            f"{adapter} was trained on a base in {manifest.quantization}. It is merged into the base as it was before, in "
            f"{manifest.dtype if dtype == 'auto' else dtype}: answers will differ a little from those it was trained and judged with"
        )
    base = load_base(
        manifest.base, dtype=manifest.dtype if dtype == "auto" else dtype, revision=manifest.revision, tokenizer_path=adapter.path
    )
    merged, found = _merged(base, adapter, output)
    staging = output.with_name(f"{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    model_directory = staging / output.name
    try:
        merged.save_pretrained(model_directory)
        base.tokenizer.save_pretrained(model_directory)
        (model_directory / RECORD).write_text(json.dumps(asdict(found) | {"path": output.name}, indent=2) + "\n", encoding="utf-8")
        if output.exists():
            output.rmdir()
        publish(model_directory, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return found


@torch.no_grad()
def _merged(base: Base, adapter: Adapter, output: Path) -> tuple[PreTrainedModel, Merged]:
    model = RoleModel.load(base, {"policy": adapter})
    probes = [torch.tensor([base.encode_prompt(text)], device=base.device) for text in PROBES]
    with model.active("policy"):
        before = [_logits(base.model, ids) for ids in probes]
    merged = model.merge_and_unload(safe_merge=True, adapter_names=["policy"])
    after = [_logits(merged, ids) for ids in probes]
    expected, got = torch.cat(before), torch.cat(after)
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    found = Merged(
        path=str(output),
        base=adapter.base_id,
        dtype=base.dtype,
        adapter_sha256=adapter.sha256,
        largest_logit_difference=float((got - expected).abs().max()),
        mean_kl=float(kl.clamp(min=0)),
        same_best_token=float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
    )
    if not kl <= MOST_KL:
        raise InstructLiteError(
            f"{adapter}: merged in {base.dtype} it computes something else ({kl:.3g} nats a token from base and adapter); nothing was "
            "written; try --dtype float32"
        )
    return merged, found


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[0].float()
