"""Will it fit? Peak memory of each stage and phase, and disk, from the recipe alone: no weights are read and no torch is loaded.

The arithmetic is models/memory.py; here stand what a process takes beside its tensors, which sizes a recipe asks for, and what to change
where it does not fit. Not planned: time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from .config import EMBEDDED, EMBEDDED_HUB_ID, REQUIRED, Loop, cache_directory, kind_of, merge
from .data.records import as_groups, read_ptx, read_records
from .errors import InstructLiteError
from .models import memory
from .models.memory import PPOCycle, Shapes

# On a CPU, fitted to recorded peaks of the 135M model (bench/plan_vs_measured.py): what importing torch, transformers, TRL and PEFT takes,
# how much more than the tensors of a phase the allocator holds, and the kernels that oneDNN compiles and keeps for a batch shape.
LIBRARIES, KEPT_BY_ALLOCATOR, KERNELS = 0.55e9, 1.43, 12e6
MOST_SHAPES = 80  # different batch shapes of a PPO run, whose answers end anywhere; its cache then drops old kernels
# On a GPU, assumed: the context with cuBLAS's workspace, and the gaps between the allocator's blocks.
CONTEXT, GAPS = 0.7e9, 1.08

ASSUMED_PROMPT, ASSUMED_ANSWER = 512, 512
"""Tokens, where neither data nor options say."""
LARGEST_READ = 50_000_000  # bytes of a data file that is looked at for its lengths
PER_TURN = 5  # tokens that a chat template puts around a message, about
CARDS = (8, 12, 16, 24, 48, 80)

# TRL's and Trainer's defaults (trl 1.16, transformers 5.23), where a recipe says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 1024, "gradient_checkpointing": True},
    "reward": {"max_length": 1024, "gradient_checkpointing": True},
    "judge": {"max_length": 1024, "gradient_checkpointing": True},
    "dpo": {"max_length": 1024, "gradient_checkpointing": True},
    "ppo": {
        "response_length": 53,
        "num_mini_batches": 1,
        "logp_chunk_size": 256,
        "share_lower_layers": True,
        "gradient_checkpointing": False,
    },
}
TRAINING = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "save_total_limit": 2}


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


@dataclass(frozen=True)
class Device:
    """Where it is to run. bytes: of one card, or of this machine's memory."""

    gpu: bool
    bytes: float
    count: int = 1

    def needed(self, persistent: float, transient: float, batch_shapes: int = 0) -> float:
        """Bytes that a process takes with such tensors, in batches of so many different shapes."""
        if self.gpu:
            return CONTEXT + GAPS * (persistent + transient)
        return LIBRARIES + persistent + KEPT_BY_ALLOCATOR * transient + KERNELS * batch_shapes

    def __str__(self) -> str:
        cards = "a GPU" if self.count == 1 else f"each of {self.count} GPUs"
        return f"{cards} of {self.bytes / 1e9:.0f} GB" if self.gpu else f"this machine's CPU with {self.bytes / 1e9:.0f} GB"


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest rows; of what is not known, None."""

    demonstration: int | None = None
    completion: int | None = None
    compared: int | None = None
    answer: int | None = None
    """Of what is compared, without its prompt."""
    judged: int | None = None
    answers: int = 2
    """Of one prompt, compared with each other: more than two in rankings."""
    prompt: int | None = None
    ptx: int | None = None

    def __str__(self) -> str:
        rows = {"demonstrations": self.demonstration, "comparisons": self.compared, "prompts": self.prompt}
        said = (f"{name} {tokens or '?'}" for name, tokens in rows.items())
        unknown = f" ? is planned as long as the options allow, a prompt as {ASSUMED_PROMPT}." if None in rows.values() else ""
        return f"Longest rows in tokens: {', '.join(said)}.{unknown}"


@dataclass(frozen=True)
class StagePlan:
    """parts: bytes that are there all the time; phases: bytes that each phase needs beside them."""

    stage: str
    parts: dict[str, float]
    phases: dict[str, float]
    disk: float
    device: Device
    batch_shapes: int = 0
    """Different ones, that kernels are compiled for."""

    @property
    def persistent(self) -> float:
        return sum(self.parts.values())

    def peak_of(self, phase: str) -> float:
        return self.device.needed(self.persistent, self.phases[phase], self.batch_shapes)

    @property
    def peak(self) -> float:
        """Bytes, at the largest of the phases."""
        return max(map(self.peak_of, self.phases))

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.bytes


@dataclass(frozen=True)
class Plan:
    loop: Loop
    device: Device
    lengths: Lengths
    stages: list[StagePlan]
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Of stages that do not fit: options that make them fit; empty if none does."""

    @property
    def disk(self) -> float:
        return sum(stage.disk for stage in self.stages)

    @property
    def peak(self) -> float:
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)


def plan(loop: Loop, device: Device, *, shapes: Shapes | None = None, lengths: Lengths | None = None) -> Plan:
    """Peak memory of every stage, and what to change where one does not fit.

    shapes: of the base; None: known, or from its config.json here or on the Hub. lengths: None: from the data files that can be read here.
    """
    shapes = shapes or shapes_of(loop.model, loop.revision)
    lengths = lengths or lengths_of(loop)
    stages = [_stage(name, loop, device, shapes, lengths) for name in (*loop.trained, "report")]
    changes = {stage.stage: _changes(stage.stage, loop, device, shapes, lengths) for stage in stages if not stage.fits}
    return Plan(loop, device, lengths, stages, changes)


def doubts(loop: Loop) -> list[str]:
    """A line for each stage that would not fit on this machine, for who is about to run it; none where the base is not known yet."""
    try:
        planned = plan(loop, this_device())
    except InstructLiteError:
        return []  # whoever loads the base or reads the data says what is wrong
    return [
        f"{stage.stage} will need about {stage.peak / 1e9:.1f} GB, too much for {planned.device}"
        + (f"; it should fit with {' '.join(changes)}" if (changes := planned.changes[stage.stage]) else "")
        for stage in planned.stages
        if not stage.fits
    ]


def this_device(gpus: int = 1) -> Device:
    """The first NVIDIA card, as its driver tells, or this machine's memory."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        if found and found[0].isdigit():
            return Device(True, int(found[0]) * 2**20, gpus)
    return Device(False, psutil.virtual_memory().total)


def card(size: str, gpus: int = 1) -> Device:
    """A GPU given as text: 24GB, 24, 40GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G)?", size, re.IGNORECASE)
    if found is None:
        raise InstructLiteError(f"--gpu {size}: give the memory of the card, such as 24GB")
    return Device(True, float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else 1e9), gpus)


def bases_that_fit(loop: Loop, lengths: Lengths | None = None) -> list[tuple[str, float, dict[int, str]]]:
    """For each known base its parameters and, for each size of card, how the recipe's settings fit there: "bf16", "nf4" or ""."""
    rows, lengths = [], lengths or lengths_of(loop)
    for name, shapes in BASES.items():
        fits = {}
        for gigabytes in CARDS:
            ways = (("none", "bf16"), ("nf4", "nf4"))
            device = Device(True, gigabytes * 1e9)
            fitting = (word for way, word in ways if _fits(replace(loop, quantization=way), device, shapes, lengths))
            fits[gigabytes] = next(fitting, "")
        rows.append((name, shapes.parameters, fits))
    return rows


def _fits(loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> bool:
    return all(_stage(name, loop, device, shapes, lengths).fits for name in (*loop.trained, "report"))


# --- what is known of base and data -----------------------------------------------------------------------------------------


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


def lengths_of(loop: Loop) -> Lengths:
    """The longest rows of the data files that can be read here, counted as the tokenizer does if it is here, too."""
    data, count = loop.data, counter(loop.model)
    demonstrations = _rows(data.demonstrations, "demonstrations")
    compared = _rows(data.comparisons, "comparisons")
    groups = [*as_groups(compared or []), *as_groups(_rows(data.rankings, "rankings") or [])]
    short = [group for group in groups if not data.answer_characters or max(map(len, group["responses"])) <= data.answer_characters]
    prompts = _rows(data.prompts, "prompts") or groups
    prompts = [row for row in prompts if not data.prompt_characters or _characters(row["prompt"]) <= data.prompt_characters]
    ptx = [source for stage in loop.trained if (source := loop.section(stage).get("ptx_data")) is not None]
    texts = [row for source in ptx for row in (demonstrations if source == "demonstrations" else _rows(source, None, read_ptx)) or []]

    def group_length(group: Mapping[str, Any]) -> int:
        return count(group["prompt"]) + max(map(count, group["responses"]))

    return Lengths(
        demonstration=_longest(demonstrations, lambda row: count(row["prompt"]) + count(row["completion"])),
        completion=_longest(demonstrations, lambda row: count(row["completion"])),
        compared=_longest(short, group_length),
        answer=_longest(short, lambda group: max(map(count, group["responses"]))),
        judged=_longest(groups, group_length),
        answers=max((len(group["responses"]) for group in groups), default=2),
        prompt=_longest(prompts, lambda row: count(row["prompt"])),
        ptx=_longest(texts, lambda row: count(row["text"] if "text" in row else row["completion"])),
    )


def _rows(source: Any, kind: str | None, read: Callable[..., list[dict]] = read_records) -> list[dict] | None:
    """The rows of files that are here; None if there are none, or they are on the Hub or too large to be read for this."""
    sources = source if isinstance(source, list) else [source]
    if source in (None, REQUIRED) or any(one != "starter" and not os.path.isfile(one) for one in sources):
        return None
    if sum(os.path.getsize(one) for one in sources if one != "starter") > LARGEST_READ:
        return None
    return read(source) if read is read_ptx else read(source, kind)


def _longest(rows: list[dict] | None, length: Callable[[dict], int]) -> int | None:
    """Length of the longest row; only those with the most characters are counted in tokens."""
    if not rows:
        return None
    return max(map(length, sorted(rows, key=lambda row: len(json.dumps(row)), reverse=True)[:32]))


def _characters(prompt: list[dict[str, str]]) -> int:
    return sum(len(turn["content"]) for turn in prompt)


def counter(model: str) -> Callable[[str | list[dict[str, str]]], int]:
    """Counts tokens of a text, or of a conversation with its template; by characters / 4 where the tokenizer is not here."""
    path = _tokenizer(model)
    if path is None:
        text_length: Callable[[str], int] = lambda text: math.ceil(len(text) / 4)  # noqa: E731
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        text_length = lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)  # noqa: E731

    def count(content: str | list[dict[str, str]]) -> int:
        if isinstance(content, str):
            return text_length(content) + 1  # the token that ends it
        return sum(text_length(turn["content"]) + PER_TURN for turn in content) + PER_TURN

    return count


def _tokenizer(model: str) -> Path | None:
    here = [*cache_directory().glob(f"{EMBEDDED}-*/tokenizer.json")] if model == EMBEDDED else [Path(model) / "tokenizer.json"]
    if found := next((path for path in here if path.is_file()), None):
        return found
    if model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


# --- the stages -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What a stage's options come to."""

    stage: str
    options: Mapping[str, Any]
    device: Device
    shapes: Shapes
    lengths: Lengths

    @property
    def training(self) -> dict[str, Any]:
        return TRAINING | DEFAULTS[kind_of(self.stage)] | self.options.get("training", {})

    @property
    def size(self) -> int:
        dtype = self.options["dtype"]
        return memory.SIZES[dtype] if dtype != "auto" else (2 if self.device.gpu or _cpu_computes_in_bfloat16() else 4)

    @property
    def rank(self) -> int:
        return self.options["lora"].r

    @property
    def layers(self) -> int:
        """With adapters: the layers below keep nothing, for nothing below is trained."""
        return min(self.options["lora"].top_layers or self.shapes.num_hidden_layers, self.shapes.num_hidden_layers)

    @property
    def adapter(self) -> int:
        lora = self.options["lora"]
        return memory.adapter_parameters(self.shapes, lora.r, lora.targets, lora.top_layers)

    @property
    def checkpointing(self) -> bool:
        training = self.training
        return bool(training.get("activation_checkpointing") or training["gradient_checkpointing"])

    def parts(self, adapters: int, trained: int) -> dict[str, float]:
        """What is there all the time, with so many adapters, of which so many are trained."""
        parameters = trained * self.adapter
        buckets = memory.FULL * parameters if self.device.gpu and self.device.count > 1 else 0  # DDP's copies of the gradients
        return {
            "base": memory.weights(self.shapes, self.options["quantization"], self.size),
            "adapters": memory.FULL * adapters * self.adapter,
            "gradients, Adam": memory.trained(parameters) + buckets,
        }

    @property
    def unpacked(self) -> int:
        return memory.dequantized(self.shapes, self.options["quantization"], self.size)

    def disk(self, trained: int, written: int = 1) -> float:
        """Checkpoints with Adam's moments, one more while it is written, and the adapters that stay, with their tokenizer."""
        checkpoint = trained * self.adapter * 3 * memory.FULL
        return (self.training["save_total_limit"] + 1) * checkpoint + written * (self.adapter * memory.FULL + 10e6)

    @property
    def computes(self) -> memory.Computes:
        """Of TRL's stages and of evaluation; PPO is lean."""
        return "autocast" if self.device.gpu else "cast"

    def learning(self, tokens: int, head: int) -> dict[str, float]:
        """Phases of SFT and reward model: `tokens` of a batch, `head`: bytes of its output."""
        shapes, size, computes, checkpointing = self.shapes, self.size, self.computes, self.checkpointing
        layers = shapes.num_hidden_layers if checkpointing else self.layers
        kept = memory.kept(shapes, size, self.rank, computes, layers=layers, checkpointing=checkpointing)
        back = memory.backward(shapes, size, self.rank, computes, checkpointing=checkpointing)
        return {"train": tokens * kept + max(head, tokens * back) + self.unpacked}

    def reading(self, tokens: int) -> float:
        """Bytes of a forward pass without gradients."""
        return tokens * memory.working(self.shapes, self.size, self.computes) + self.unpacked


def _sft(asked: _Asked) -> StagePlan:
    training, lengths = asked.training, asked.lengths
    longest = _at_most(training["max_length"], lengths.demonstration, ASSUMED_PROMPT + ASSUMED_ANSWER)
    answer = min(longest, lengths.completion or longest)
    batch, read = training["per_device_train_batch_size"], training["per_device_eval_batch_size"]
    tile = memory.logit_tile(asked.shapes, asked.size, batch * answer, gpu=asked.device.gpu)
    phases = asked.learning(batch * longest, tile)
    phases["evaluate"] = asked.reading(read * longest) + memory.logit_tile(asked.shapes, asked.size, read * answer, gpu=asked.device.gpu)
    return StagePlan("sft", asked.parts(1, 1), phases, asked.disk(1), asked.device, longest // 5)


def _reward(asked: _Asked) -> StagePlan:
    training, lengths = asked.training, asked.lengths
    known = lengths.judged if asked.stage == "judge" else lengths.compared
    longest = _at_most(training["max_length"], known, ASSUMED_PROMPT + ASSUMED_ANSWER)
    longest += -longest % 8
    phases = asked.learning(lengths.answers * training["per_device_train_batch_size"] * longest, 0)
    phases["evaluate"] = asked.reading(2 * training["per_device_eval_batch_size"] * longest)
    members = asked.options.get("ensemble", 1)
    return StagePlan(asked.stage, asked.parts(1, 1), phases, asked.disk(1, members), asked.device, 2 * longest // 8)


def _dpo(asked: _Asked) -> StagePlan:
    """As SFT, with two answers to each prompt; one adapter more, the reference, only reads."""
    training = asked.training
    longest = _at_most(training["max_length"], asked.lengths.compared, ASSUMED_PROMPT + ASSUMED_ANSWER)
    longest += -longest % 8
    answer = min(longest, asked.lengths.answer or longest)
    rows, read = (2 * training[f"per_device_{part}_batch_size"] for part in ("train", "eval"))
    phases = asked.learning(rows * longest, memory.logit_tile(asked.shapes, asked.size, rows * answer, gpu=asked.device.gpu))
    phases["evaluate"] = asked.reading(read * longest) + memory.logit_tile(asked.shapes, asked.size, read * answer, gpu=asked.device.gpu)
    return StagePlan(asked.stage, asked.parts(2, 1), phases, asked.disk(1), asked.device, 2 * longest // 8)


def _ppo(asked: _Asked) -> StagePlan:
    training, options = asked.training, asked.options
    prompt = _at_most(training.get("max_prompt_length"), asked.lengths.prompt, ASSUMED_PROMPT)
    micro = training["per_device_train_batch_size"]
    rollout = micro * training["gradient_accumulation_steps"] * training["num_mini_batches"]
    at_once = training.get("generation_batch_size") or rollout
    if budget := training.get("generation_memory"):
        width = prompt + training["response_length"]
        at_once = max(1, min(rollout, int(budget * 1e9 / memory.answer(asked.shapes, asked.size, width))))
    cycle = PPOCycle(
        shapes=asked.shapes, size=asked.size, rank=asked.rank, prompt=prompt, response=training["response_length"], rollout=rollout,
        shared_layers=asked.shapes.num_hidden_layers - asked.layers if training["share_lower_layers"] else 0,
        generated_at_once=at_once, micro_batch=micro, chunk=training["logp_chunk_size"], checkpointing=asked.checkpointing,
        quantization=options["quantization"],
    )  # fmt: skip
    # Policy, reference and value; the reward models; one that watches; a moving average.
    adapters = 3 + options["ensemble"] + (options.get("watch_reward") is not None) + (training.get("ema_decay") is not None)
    phases: dict[str, float] = dict(cycle.phases())
    if options.get("ptx_data") is not None:
        rows = micro * min(asked.lengths.ptx or ASSUMED_PROMPT, ASSUMED_PROMPT)
        kept = memory.kept(asked.shapes, asked.size, asked.rank, "lean", layers=asked.layers, checkpointing=asked.checkpointing)
        phases["ptx"] = rows * kept + memory.logits(asked.shapes, min(rows, training["logp_chunk_size"])) + asked.unpacked
    shapes = min(MOST_SHAPES, training["max_steps"] if training.get("max_steps", -1) > 0 else MOST_SHAPES)
    return StagePlan(asked.stage, asked.parts(adapters, 2), phases, asked.disk(2), asked.device, shapes)


def _report(asked: _Asked) -> StagePlan:
    """Base, SFT and the policies answer; the judge and the reward model score. All are in memory together."""
    evaluation, shapes = asked.options["evaluation"], asked.shapes
    prompt = _at_most(evaluation.max_prompt_length, asked.lengths.prompt, ASSUMED_PROMPT)
    rows, width, computes = evaluation.batch_size, prompt + evaluation.max_new_tokens, asked.computes
    phases = {
        "generate": memory.generation(shapes, asked.size, rows, prompt, evaluation.max_new_tokens, computes) + asked.unpacked,
        "score": asked.reading(rows * width) + memory.logits(shapes, min(256, width)),
    }
    return StagePlan("report", asked.parts(asked.options["policies"] + 1 + asked.options["ensemble"], 0), phases, 0.0, asked.device)


PLANNERS: dict[str, Callable[[_Asked], StagePlan]] = {
    "sft": _sft, "reward": _reward, "judge": _reward, "ppo": _ppo, "dpo": _dpo, "report": _report
}  # fmt: skip


def _stage(name: str, loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> StagePlan:
    # The reward model and the policies go on with SFT's adapter, in its shape.
    section = "ppo" if name == "report" else name
    options = loop.options(section) | {"lora": loop.options("sft")["lora"], "evaluation": loop.evaluation}
    options["ensemble"], options["policies"] = loop.reward.get("ensemble", 1), 2 + len(loop.also)
    return PLANNERS[kind_of(name)](_Asked(section, options, device, shapes, lengths))


def _at_most(limit: int | None, known: int | None, assumed: int) -> int:
    return min(limit or math.inf, known or limit or assumed)


def _cpu_computes_in_bfloat16() -> bool:
    """As models/base.py asks torch; here the kernel is asked, where it tells (Linux)."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="utf-8", errors="replace")


# --- what to change -----------------------------------------------------------------------------------------------------------


Change = dict[str, Any]
"""Options that go together, by their keys."""


def _changes(stage: str, loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> list[str]:
    """Options, as they are written behind `instructlite run RECIPE`, that make the stage fit: no more of them than it takes."""

    def fits(changes: Iterable[Change]) -> bool:
        changed = {key: value for change in changes for key, value in change.items()}
        return _stage(stage, _with(loop, changed), device, shapes, lengths).fits

    made: dict[tuple[str, ...], Change] = {}
    for change in _remedies(stage, loop):
        made[tuple(change)] = change  # a smaller value in place of the larger one before
        if fits(made.values()):
            break
    else:
        return []
    for keys in list(made):
        rest = [change for other, change in made.items() if other != keys]
        if fits(rest):
            del made[keys]
    return [f"{key}={_text(value)}" for change in made.values() for key, value in change.items()]


def _remedies(stage: str, loop: Loop) -> Iterator[Change]:
    """From what costs least to what changes the result."""
    coarser = [{"quantization": "nf4"}] if loop.quantization != "nf4" else []
    if stage == "report":
        yield from ({"evaluation.batch_size": rows} for rows in _halves(loop.evaluation.batch_size))
        yield from coarser
        return
    kind = kind_of(stage)
    training = TRAINING | DEFAULTS[kind] | loop.options(stage).get("training", {})
    at = f"also.{stage}.training." if stage in loop.also else f"{stage}.training."
    batch, accumulation = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    if kind == "ppo":
        at_once = training.get("generation_batch_size") or batch * accumulation * training["num_mini_batches"]
        yield from ({f"{at}generation_batch_size": rows} for rows in _halves(at_once, least=4))
    if not training["gradient_checkpointing"]:
        yield {f"{at}gradient_checkpointing": True}
    for rows in _halves(batch):
        if batch % rows == 0:  # the same batch in more parts
            yield {f"{at}per_device_train_batch_size": rows, f"{at}gradient_accumulation_steps": accumulation * batch // rows}
    if kind == "ppo":
        yield {f"{at}logp_chunk_size": 64}
    yield from coarser
    length = "response_length" if kind == "ppo" else "max_length"
    yield from ({f"{at}{length}": tokens} for tokens in _halves(training[length], least=64))


def _halves(number: int, least: int = 1) -> Iterable[int]:
    while number // 2 >= least:
        number //= 2
        yield number


def _with(loop: Loop, changed: Mapping[str, Any]) -> Loop:
    for key, value in changed.items():
        section, _, rest = key.partition(".")
        for part in reversed(rest.split(".") if rest else []):
            value = {part: value}
        if section == "evaluation":
            loop = replace(loop, evaluation=replace(loop.evaluation, **value))
        else:
            loop = replace(loop, **{section: merge(getattr(loop, section), value) if rest else value})
    return loop


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
