"""The sizes of a base, without its weights."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import EMBEDDED, EMBEDDED_HUB_ID
from ..errors import InstructLiteError
from ..models.memory import Shapes

BASES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Shapes(576, 1536, 30, 9, 3, 64, 49_152, True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": Shapes(960, 2560, 32, 15, 5, 64, 49_152, True),
    "Qwen/Qwen3-0.6B": Shapes(1024, 3072, 28, 16, 8, 128, 151_936, True),
    "meta-llama/Llama-3.2-1B-Instruct": Shapes(2048, 8192, 16, 32, 8, 64, 128_256, True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Shapes(2048, 8192, 24, 32, 32, 64, 49_152, True),
    "Qwen/Qwen3-1.7B": Shapes(2048, 6144, 28, 16, 8, 128, 151_936, True),
    "meta-llama/Llama-3.2-3B-Instruct": Shapes(3072, 8192, 28, 24, 8, 128, 128_256, True),
    "Qwen/Qwen3-4B": Shapes(2560, 9728, 36, 32, 8, 128, 151_936, True),
    "mistralai/Mistral-7B-Instruct-v0.3": Shapes(4096, 14_336, 32, 32, 8, 128, 32_768, False),
    "meta-llama/Llama-3.1-8B-Instruct": Shapes(4096, 14_336, 32, 32, 8, 128, 128_256, False),
    "Qwen/Qwen3-8B": Shapes(4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "Qwen/Qwen3-14B": Shapes(5120, 17_408, 40, 40, 8, 128, 151_936, False),
    "Qwen/Qwen3-32B": Shapes(5120, 25_600, 64, 64, 8, 128, 151_936, False),
    "meta-llama/Llama-3.1-70B-Instruct": Shapes(8192, 28_672, 80, 64, 8, 128, 128_256, False),
}
"""Shapes of bases that are known without asking anybody, smallest first."""


def shapes_of(model: str, revision: str | None = None) -> Shapes:
    """Of a known base, or from config.json: of a directory, the Hub's cache, or the Hub."""
    model = EMBEDDED_HUB_ID if model == EMBEDDED else model
    path = Path(model) / "config.json"
    tuned = f"{model}-Instruct"  # what a base became has its shapes
    if not path.is_file() and (known := BASES.get(model) or BASES.get(tuned)):
        return known
    if not path.is_file():
        path = _from_hub(model, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Shapes.of(content.get("text_config", content))
    except (ValueError, TypeError) as error:
        raise InstructLiteError(f"{path}: not the config of a decoder that can be planned ({error})") from error


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        known = ", ".join(BASES)
        raise InstructLiteError(f"{model}: its config.json is neither here nor to be had from the Hub; known without: {known}") from error
