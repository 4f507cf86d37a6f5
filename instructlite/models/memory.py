"""What a base and its adapters take in memory, from its shapes alone: arithmetic without torch, the only one there is.

`instructlite plan`, the check before PPO and `generation_memory` all count with it. Counted is what torch allocates; what a process needs
beside that is in planning/devices.py. Exact for decoders of Llama's kind (Mistral, Qwen2 and 3, SmolLM2); for others a good guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL = 4  # adapters, their gradients and Adam's moments are fp32
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # a parameter: 4 bits, a scale in 8 bits for 64 of them, a scale of those in fp32 for 256

Computes = Literal["autocast", "cast", "lean"]
"""In which precision adapters compute. "lean": autocast without PEFT's casts (PPO); "cast": PEFT casts each input to fp32 (SFT and reward
model on a CPU); "autocast": it does, and autocast casts it back (on a GPU). In fp32 nothing is cast."""


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes, by the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, config: Mapping[str, Any] | Any) -> Shapes:
        """From a config.json's content, or a transformers config."""
        get = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
        hidden, heads = get("hidden_size"), get("num_attention_heads")
        return cls(
            hidden_size=hidden,
            intermediate_size=get("intermediate_size") or 4 * hidden,
            num_hidden_layers=get("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=get("num_key_value_heads") or heads,
            head_dim=get("head_dim") or hidden // heads,
            vocab_size=get("vocab_size"),
            tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        )

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: (inputs, outputs)."""
        hidden, inner, query, key = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        return {
            "q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden),
            "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and norms: never quantized."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + (2 * self.num_hidden_layers + 1) * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters


def weights(shapes: Shapes, quantization: str, size: int) -> int:
    """Bytes of the frozen base; `size` is that of a parameter that is not quantized."""
    each = {"none": size, "int8": 1, "nf4": NF4}[quantization]
    return round(shapes.linear_parameters * each) + shapes.other_parameters * size


def dequantized(shapes: Shapes, quantization: str, size: int) -> int:
    """Bytes of the largest layer's weights where they are unpacked to be computed with."""
    return 0 if quantization == "none" else max(inputs * outputs for inputs, outputs in shapes.linear.values()) * size


def adapter_parameters(shapes: Shapes, r: int, targets: str | Iterable[str] = "all-linear", top_layers: int | None = None) -> int:
    named = shapes.linear if targets == "all-linear" else [name for name in targets if name in shapes.linear]
    layers = min(top_layers or shapes.num_hidden_layers, shapes.num_hidden_layers)
    return layers * sum(r * sum(shapes.linear[name]) for name in named)


def cache(shapes: Shapes, size: int, length: int) -> int:
    """Bytes of the keys and values of `length` tokens."""
    return 2 * length * shapes.num_hidden_layers * shapes.key_size * size


def draw(shapes: Shapes, size: int) -> int:
    """Bytes of a row's logits while a token is drawn: as they come, in fp32, as probabilities, summed in fp64, as the draw leaves them."""
    return shapes.vocab_size * (size + 4 + 4 + 8 + 4)


def answer(shapes: Shapes, size: int, length: int) -> int:
    """What a row of a batch takes while answers are generated: the cache of `length` tokens, prompt and answer, and its logits."""
    return cache(shapes, size, length) + draw(shapes, size)


def generation(shapes: Shapes, size: int, rows: int, prompt: int, response: int, computes: Computes) -> int:
    """Bytes of a `generate` call: the cache, and the pass over the prompts or, later, the logits."""
    return rows * (cache(shapes, size, prompt + response) + max(prompt * working(shapes, size, computes), draw(shapes, size)))


def saved_by_a_layer(shapes: Shapes, size: int, rank: int, computes: Computes) -> int:
    """Bytes a token that one layer keeps for the backward pass, with adapters on all of its linear layers.

    The inputs of adapters (those of q, k, v are one tensor, unless it is cast for each of them; that of o is the attention's output),
    queries, keys, values and output of the attention, gate, its activation and up; in fp32 the inputs of the two norms. Frozen weights
    need none of their inputs. Counted by autograd's hooks for SmolLM2's shapes it is within 5 % of this.
    """
    hidden, inner, query = shapes.hidden_size, shapes.intermediate_size, shapes.query_size
    norms = 2 * hidden * FULL
    attention = 4 * query * size  # keys and values are repeated for every query head
    between = 3 * inner * size
    inputs = (2 * hidden + inner) * size
    if computes != "lean" and size != FULL:
        each = (3 + 2) * hidden + query + inner
        inputs = each * (FULL if computes == "cast" else size)
    return norms + attention + between + inputs + 7 * rank * (FULL if computes == "cast" else size)


def working(shapes: Shapes, size: int, computes: Computes) -> int:
    """Bytes a token of what a layer holds while it computes and nobody keeps."""
    inputs = shapes.intermediate_size * (FULL if computes == "cast" else size)
    return (3 * shapes.intermediate_size + 4 * shapes.hidden_size) * size + inputs


def kept(shapes: Shapes, size: int, rank: int, computes: Computes, *, layers: int, checkpointing: bool) -> int:
    """Bytes a token that a forward pass through so many layers keeps for the backward pass."""
    if checkpointing:
        return layers * shapes.hidden_size * size
    return layers * saved_by_a_layer(shapes, size, rank, computes)


def backward(shapes: Shapes, size: int, rank: int, computes: Computes, *, checkpointing: bool) -> int:
    """Bytes a token that the backward pass needs beside what was kept: gradients of a layer, and where it was not kept, the layer."""
    again = saved_by_a_layer(shapes, size, rank, computes) if checkpointing else 0
    return again + working(shapes, size, computes)


def logits(shapes: Shapes, tokens: int, numbers: int = 5) -> int:
    """Bytes of the log-probabilities of so many tokens at once: fp32 numbers for each token of the vocabulary (logits, probabilities, and
    the gradients of both)."""
    return tokens * shapes.vocab_size * numbers * FULL


def logit_tile(shapes: Shapes, size: int, tokens: int, *, gpu: bool) -> int:
    """Bytes of the tile in which TRL's fused head makes log-probabilities (trl 1.16, kernels/chunked_logprob.py): in place where Triton
    runs, with five fp32 numbers for each of its own elsewhere."""
    return min(tokens, 4096) * min(shapes.vocab_size, 32_768) * (size + (0 if gpu else 5 * FULL))


def trained(parameters: int) -> int:
    """Bytes of gradients and Adam's two moments."""
    return 3 * FULL * parameters


@dataclass(frozen=True)
class PPOCycle:
    """A PPO cycle's sizes. `prompt`, `response`: tokens of the longest; `rollout`: episodes of a cycle in this process."""

    shapes: Shapes
    size: int
    rank: int
    shared_layers: int
    prompt: int
    response: int
    rollout: int
    generated_at_once: int
    micro_batch: int
    chunk: int
    checkpointing: bool
    quantization: str = "none"
    processes: int = 1

    def phases(self) -> dict[str, int]:
        """Bytes that each phase needs beside weights and optimiser."""
        shapes, size, width = self.shapes, self.size, self.prompt + self.response
        tokens = self.micro_batch * width
        unpacked = dequantized(shapes, self.quantization, size)
        lower = self.rollout * width * shapes.hidden_size * size if self.shared_layers else 0  # kept for the whole cycle
        layers = shapes.num_hidden_layers - self.shared_layers
        chunk = logits(shapes, min(tokens, self.chunk))
        one = tokens * kept(shapes, size, self.rank, "lean", layers=layers, checkpointing=self.checkpointing)
        at_once = tokens * backward(shapes, size, self.rank, "lean", checkpointing=self.checkpointing)
        return {
            "generate": generation(shapes, size, self.generated_at_once, self.prompt, self.response, "lean") + unpacked,
            "score": lower + tokens * working(shapes, size, "lean") + chunk + unpacked,
            # DDP expects one forward before each backward, so that policy's and value's passes are kept together.
            "train": lower + max(one + chunk, (1 if self.processes == 1 else 2) * one + at_once) + unpacked,
        }
