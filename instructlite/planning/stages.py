"""Peak memory of each stage and phase: which sizes a recipe asks models/memory.py for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Loop, kind_of
from ..models import memory
from ..models.memory import PPOCycle, Shapes
from .devices import MOST_SHAPES, Device
from .lengths import ASSUMED_ANSWER, ASSUMED_PROMPT, Lengths

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
class Asked:
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
    def prompt(self) -> int:
        """Tokens of PPO's longest prompt."""
        return at_most(self.training.get("max_prompt_length"), self.lengths.prompt, ASSUMED_PROMPT)

    @property
    def micro_batch(self) -> int:
        return self.training["per_device_train_batch_size"]

    @property
    def padding_free(self) -> bool:
        """Of PPO."""
        return self.training.get("padding_free", False)

    @property
    def rollout(self) -> int:
        """Episodes of PPO's rollout, of one process."""
        return self.micro_batch * self.training["gradient_accumulation_steps"] * self.training["num_mini_batches"]

    @property
    def generated_at_once(self) -> int:
        training = self.training
        if budget := training.get("generation_memory"):
            width = self.prompt + training["response_length"]
            return max(1, min(self.rollout, int(budget * 1e9 / memory.answer(self.shapes, self.size, width))))
        return training.get("generation_batch_size") or self.rollout

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


def _sft(asked: Asked) -> StagePlan:
    training, lengths = asked.training, asked.lengths
    longest = at_most(training["max_length"], lengths.demonstration, ASSUMED_PROMPT + ASSUMED_ANSWER)
    answer = min(longest, lengths.completion or longest)
    batch, read = training["per_device_train_batch_size"], training["per_device_eval_batch_size"]
    tile = memory.logit_tile(asked.shapes, asked.size, batch * answer, gpu=asked.device.gpu)
    phases = asked.learning(batch * longest, tile)
    phases["evaluate"] = asked.reading(read * longest) + memory.logit_tile(asked.shapes, asked.size, read * answer, gpu=asked.device.gpu)
    return StagePlan("sft", asked.parts(1, 1), phases, asked.disk(1), asked.device, longest // 5)


def _reward(asked: Asked) -> StagePlan:
    training, lengths = asked.training, asked.lengths
    known = lengths.judged if asked.stage == "judge" else lengths.compared
    longest = at_most(training["max_length"], known, ASSUMED_PROMPT + ASSUMED_ANSWER)
    longest += -longest % 8
    phases = asked.learning(lengths.answers * training["per_device_train_batch_size"] * longest, 0)
    phases["evaluate"] = asked.reading(2 * training["per_device_eval_batch_size"] * longest)
    members = asked.options.get("ensemble", 1)
    return StagePlan(asked.stage, asked.parts(1, 1), phases, asked.disk(1, members), asked.device, 2 * longest // 8)


def _dpo(asked: Asked) -> StagePlan:
    """As SFT, with two answers to each prompt; one adapter more, the reference, only reads."""
    training = asked.training
    longest = at_most(training["max_length"], asked.lengths.compared, ASSUMED_PROMPT + ASSUMED_ANSWER)
    longest += -longest % 8
    answer = min(longest, asked.lengths.answer or longest)
    rows, read = (2 * training[f"per_device_{part}_batch_size"] for part in ("train", "eval"))
    phases = asked.learning(rows * longest, memory.logit_tile(asked.shapes, asked.size, rows * answer, gpu=asked.device.gpu))
    phases["evaluate"] = asked.reading(read * longest) + memory.logit_tile(asked.shapes, asked.size, read * answer, gpu=asked.device.gpu)
    return StagePlan(asked.stage, asked.parts(2, 1), phases, asked.disk(1), asked.device, 2 * longest // 8)


def _ppo(asked: Asked) -> StagePlan:
    training, options, micro = asked.training, asked.options, asked.micro_batch
    cycle = PPOCycle(
        shapes=asked.shapes, size=asked.size, rank=asked.rank, prompt=asked.prompt, response=training["response_length"],
        rollout=asked.rollout, generated_at_once=asked.generated_at_once, micro_batch=micro, chunk=training["logp_chunk_size"],
        shared_layers=asked.shapes.num_hidden_layers - asked.layers if training["share_lower_layers"] else 0,
        checkpointing=asked.checkpointing, quantization=options["quantization"], processes=asked.device.count,
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


def _report(asked: Asked) -> StagePlan:
    """Base, SFT and the policies answer; the judge and the reward model score. All are in memory together."""
    evaluation, shapes = asked.options["evaluation"], asked.shapes
    prompt = at_most(evaluation.max_prompt_length, asked.lengths.prompt, ASSUMED_PROMPT)
    rows, width, computes = evaluation.batch_size, prompt + evaluation.max_new_tokens, asked.computes
    phases = {
        "generate": memory.generation(shapes, asked.size, rows, prompt, evaluation.max_new_tokens, computes) + asked.unpacked,
        "score": asked.reading(rows * width) + memory.logits(shapes, min(256, width)),
    }
    return StagePlan("report", asked.parts(asked.options["policies"] + 1 + asked.options["ensemble"], 0), phases, 0.0, asked.device)


PLANNERS: dict[str, Callable[[Asked], StagePlan]] = {
    "sft": _sft, "reward": _reward, "judge": _reward, "ppo": _ppo, "dpo": _dpo, "report": _report
}  # fmt: skip


def stage_plan(name: str, loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> StagePlan:
    return PLANNERS[kind_of(name)](asked_of(name, loop, device, shapes, lengths))


def asked_of(name: str, loop: Loop, device: Device, shapes: Shapes, lengths: Lengths) -> Asked:
    # The reward model and the policies go on with SFT's adapter, in its shape.
    section = "ppo" if name == "report" else name
    options = loop.options(section) | {"lora": loop.options("sft")["lora"], "evaluation": loop.evaluation}
    options["ensemble"], options["policies"] = loop.reward.get("ensemble", 1), 2 + len(loop.also)
    return Asked(section, options, device, shapes, lengths)


def at_most(limit: int | None, known: int | None, assumed: int) -> int:
    return min(limit or math.inf, known or limit or assumed)


def _cpu_computes_in_bfloat16() -> bool:
    """As models/base.py asks torch; here the kernel is asked, where it tells (Linux)."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="utf-8", errors="replace")
