"""A Llama of 35k parameters and a byte tokenizer with a chat template: everything is tested offline in seconds."""

import copy
import os
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from instructlite.config import Lora
from instructlite.models.base import Base, load_base

torch.set_num_threads(1)  # bit-exact comparisons between runs hold for one thread count only

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|reserved|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Four control tokens and the 256 bytes; pad is eos, as in SmolLM2, so that the loader has to mend it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>", additional_special_tokens=SPECIAL
    )


def tiny_config(**changes) -> LlamaConfig:
    options = dict(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaConfig(**(options | changes))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """The tiny base on disk. Its head is scaled up: at the default scale a frozen head cannot express a peaked policy."""
    path = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def _tiny_base(tiny_path) -> Base:
    return load_base(tiny_path, dtype="float32", chat_template="chatml")


@pytest.fixture
def tiny_base(_tiny_base) -> Base:
    """A fresh copy each time: adapters are hung into the modules of the base."""
    return copy.deepcopy(_tiny_base)


@pytest.fixture
def tiny_lora() -> Lora:
    return Lora(r=4, alpha=8)


CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def chromium():
    """A browser without a window; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM} (Debian, Ubuntu: apt install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()
