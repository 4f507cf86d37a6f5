"""Where the time and memory of a PPO step go, and how far it is from the least that such a step can take: the floor.

    python bench/ppo_profile.py [--layers all|top10] [--micro-batch 4] [--rounds 3] [--json FILE]

The step is that of ppo_vs_trl.py: SmolLM2-135M in bf16, 16 prompts, 64 new tokens each, one epoch, one minibatch, LoRA of rank 16 on all
linear layers, policy, reference, value and reward as adapters. With --layers top10 adapters are on the top 10 layers only.

The floor is the sum of these, through Hugging Face models that share the base's weights and know neither our trainer nor our roles:
- generate: `generate` of the base alone, no adapter in it, the same prompts, as many tokens, a blank generation config;
- score: without gradients, the backbone once each for policy, reference, value and reward (where lower layers have no adapter, those
  once for all four and the layers above once each), and the head with log-softmax for policy and reference;
- forward and backward: once for the policy (with head and log-softmax) and once for the value, above the shared lower layers.
It has the same token ids and micro-batches as our step, no padding and no attention mask, PEFT's LoRA in fp32 under bf16 autocast but
without its casts of the input, and in generation the contiguous input of the head (see sampling.py), for want of which plain `generate`
wastes seconds. It has no adapter in generation, no entropy, ratio, clipping, advantage, metric, optimiser step or log: those are ours to
account for. And it is the floor of this way to compute, not of every way: old log-probabilities could come from generation, and with one
step a cycle the passes without gradients of policy and value could be spared by keeping the graphs of the whole rollout. The table shows
what they take.

Both sides run in one process and take turns: one cycle of ours, then the floor on the tokens of its rollout. The first turn is not counted.
`floor_ratio` is the median over the rounds of our seconds / the floor's. Peak memory is that of the process: either side's includes the
other's adapters, and what the allocator has kept. For the memory of our step alone see ppo_vs_trl.py.
"""

import argparse
import copy
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import recording
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from phases import Phases, phases_of
from ppo_vs_trl import BATCH, COMMON, DTYPE, LORA_R, build_ours
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, TrainerCallback

from instructlite.config import Lora
from instructlite.errors import InstructLiteError
from instructlite.models.base import Base, lora_config
from instructlite.training.recipe import quiet_libraries, versions
from instructlite.training.rollout import Rollout

ROLES = ("policy", "reference", "value", "reward")


class Floor:
    """What the module's docstring calls the floor."""

    def __init__(self, base: Base, top_layers: int | None, micro_batch: int):
        self.pad_id, self.micro_batch = base.pad_id, micro_batch
        self.plain, adapted = plain_model(base), plain_model(base)
        lora = lora_config(Lora(r=LORA_R, top_layers=top_layers), adapted, "CAUSAL_LM")
        self.adapted = get_peft_model(adapted, lora)
        for module in self.adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
        shared = min(lora.layers_to_transform or [0])
        self.lower = with_layers(self.plain.base_model, slice(shared), nn.Identity()) if shared else None
        self.upper = with_layers(adapted.base_model, slice(shared, None), adapted.base_model.norm)
        self.score = nn.Linear(base.model.config.hidden_size, 1, device=base.device)
        self.head = self.plain.get_output_embeddings()
        self.head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def run(self, rollout: Rollout, phases: Phases) -> None:
        width = rollout.mask.shape[1]
        with phases.phase("generate"):
            self._generate(rollout.input_ids[:, :-width], width)
        parts = rollout.input_ids.split(self.micro_batch)
        lower: list[Tensor | None] = [None] * len(parts)
        with torch.no_grad():
            for i, ids in enumerate(parts):
                if self.lower:
                    with phases.phase("score: lower layers"):
                        lower[i] = self.lower(ids, use_cache=False).last_hidden_state
                for role in ROLES:
                    with phases.phase(f"score: {role}"):
                        self._output(role, ids, lower[i], width)
        for ids, below in zip(parts, lower, strict=True):
            for role in ("policy", "value"):
                with phases.phase(f"forward: {role}"):
                    loss = self._output(role, ids, below, width).mean()
                with phases.phase("backward"):
                    loss.backward()
        self.adapted.zero_grad()
        self.score.zero_grad()

    def _generate(self, prompts: Tensor, width: int) -> None:
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=width, pad_token_id=self.pad_id, use_cache=True
        )
        output = self.plain.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        assert output.shape == (len(prompts), prompts.shape[1] + width), "the floor generated fewer tokens than our step"

    def _output(self, role: str, ids: Tensor, lower: Tensor | None, width: int) -> Tensor:
        """Log-probabilities of the response tokens, or scores of the states before them: (tokens,)."""
        inputs = {"input_ids": ids} if lower is None else {"inputs_embeds": lower}
        with torch.autocast(ids.device.type, dtype=getattr(torch, DTYPE)):
            hidden = self.upper(**inputs, use_cache=False).last_hidden_state[:, -width - 1 : -1].flatten(0, 1)
            if role in ("policy", "reference"):
                return -nn.functional.cross_entropy(self.head(hidden).float(), ids[:, -width:].flatten(), reduction="none")
        return self.score(hidden.float())[:, 0]


def plain_model(base: Base) -> PreTrainedModel:
    """The base as transformers loads it, on the weights that are in memory already."""
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.model.dtype)
    weights = {name.replace(".base_layer", ""): parameter for name, parameter in base.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        parameter.data = weights[name].data
    plain.generation_config = GenerationConfig()
    return plain.to(base.device).requires_grad_(False).eval()


def with_layers(backbone: nn.Module, layers: slice, norm: nn.Module) -> nn.Module:
    """The backbone with some of its layers."""
    part = copy.copy(backbone)
    part._modules = backbone._modules | {"layers": backbone.layers[layers], "norm": norm}
    return part


class Turns(TrainerCallback):
    """After each cycle of ours the floor of the same work."""

    def __init__(self, micro_batch: int, top_layers: int | None):
        self.micro_batch, self.top_layers = micro_batch, top_layers
        self.phases, self.rounds = Phases(), []

    def begin(self, trainer: Any) -> None:
        self.trainer = trainer
        self.floor = Floor(trainer.unwrapped.base, self.top_layers, self.micro_batch)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        ours = self.phases.stop()
        load = round(os.getloadavg()[0], 2)
        self.phases.start()
        self.floor.run(self.trainer.rollout, self.phases)
        floor = self.phases.stop()
        ratio = sum(ours["seconds"].values()) / sum(floor["seconds"].values())
        self.rounds.append({"ratio": ratio, "ours": ours, "floor": floor, "load_average": load})
        self.phases.start()


def profile(model: str, top_layers: int | None, micro_batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    turns = Turns(micro_batch, top_layers)
    with tempfile.TemporaryDirectory() as output_dir:
        options = COMMON | {"output_dir": output_dir, "per_device_train_batch_size": micro_batch, "use_cpu": not torch.cuda.is_available()}
        options["gradient_accumulation_steps"] = BATCH // micro_batch
        trainer, _, _ = build_ours(model, rounds + 1, options, turns, top_layers=top_layers)
        turns.begin(trainer)
        with phases_of(trainer, turns.phases):
            trainer.train()
    counted = turns.rounds[1:]
    sides = {side: [r[side] for r in counted] for side in ("ours", "floor")}
    names = dict.fromkeys(name for side in ("floor", "ours") for r in sides[side] for name in r["seconds"])
    cycle = {f"{side}_s": statistics.median(sum(r["seconds"].values()) for r in measured) for side, measured in sides.items()}
    return {
        "floor_ratio": round(statistics.median(r["ratio"] for r in counted), 4),
        "cycle": {name: round(value, 3) for name, value in cycle.items()},
        "phases": {name: medians(name, sides) for name in names},
        "settings": COMMON | {"model": model, "dtype": DTYPE, "lora_r": LORA_R, "top_layers": top_layers, "batch": BATCH,
                              "micro_batch": micro_batch, "rounds": rounds, "untimed_rounds": 1, "threads": torch.get_num_threads()},
        "versions": versions(),
        "rounds": counted,
    }  # fmt: skip


def medians(name: str, sides: dict[str, list]) -> dict[str, float | None]:
    """Of one phase, for both sides; None where a side does not have it, or its memory cannot be measured."""
    found = {}
    for side, rounds in sides.items():
        for kind, short in (("seconds", "s"), ("peak_mb", "peak_mb")):
            values = [r[kind][name] for r in rounds if name in r[kind]]
            found[f"{side}_{short}"] = round(statistics.median(values), 3) if values else None
    return found


def print_table(result: dict[str, Any]) -> None:
    print(f"{'':20}{'ours s':>10}{'floor s':>10}{'ratio':>8}{'ours MB':>10}{'floor MB':>10}")
    cycle = {"cycle": result["cycle"] | {"ours_peak_mb": None, "floor_peak_mb": None}}
    for name, phase in (result["phases"] | cycle).items():
        ours, floor = phase["ours_s"], phase["floor_s"]
        ratio = result["floor_ratio"] if name == "cycle" else ours / floor if ours and floor else None
        cells = [(ours, "10.2f"), (floor, "10.2f"), (ratio, "8.2f"), (phase["ours_peak_mb"], "10.0f"), (phase["floor_peak_mb"], "10.0f")]
        print(f"{name:20}" + "".join("-".rjust(int(float(form[:-1]))) if cell is None else format(cell, form) for cell, form in cells))


def layers(text: str) -> int | None:
    """ "all" -> None, "top10" -> 10."""
    if text == "all":
        return None
    if not text.startswith("top") or not text[3:].isdigit():
        raise argparse.ArgumentTypeError(f"{text}: all, or top and a number, as top10")
    return int(text[3:])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=layers, default="all", help="layers with adapters: all, or top10 and so on")
    parser.add_argument("--micro-batch", type=int, default=4, help=f"rows a forward or backward pass, of the {BATCH} of a step")
    parser.add_argument("--rounds", type=int, default=3, help="turns that count")
    parser.add_argument("--model", default="smollm2-135m", help="Hub id or directory of the base")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, settings and every round's numbers")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.micro_batch < 1 or BATCH % args.micro_batch:
        parser.error(f"--rounds must be at least 1, --micro-batch a divisor of {BATCH}")
    quiet_libraries()
    try:
        result = profile(args.model, args.layers, args.micro_batch, args.rounds)
    except InstructLiteError as error:
        raise SystemExit(str(error)) from None
    print_table(result)
    if args.json:
        recording.write(args.json, result)


if __name__ == "__main__":
    main()
