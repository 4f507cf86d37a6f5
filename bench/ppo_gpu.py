"""A PPO cycle of Llama-3.1-8B with learned reward, on one GPU: seconds and peak memory of each phase, 4 bits (nf4) against bf16.

    python bench/ppo_gpu.py [--quantization nf4|none|both] [--batch 16] [--micro-batch 4] [--updates 3] [--json FILE]
    python bench/ppo_gpu.py --config tiny        # the same program on a CPU, in a minute

Needs no download: the weights are random, in the shapes of Llama-3.1-8B, and so are the prompts of 64 tokens. Policy, reference, value and
reward are adapters of rank 16 on all linear layers of that one base; gradient checkpointing is on, and every response has all 512 tokens,
since nothing ends it. Speed and memory are those of real weights; what is learnt means nothing.

Each quantization is measured in a process of its own, where there are two. The first update is not timed; its memory counts.
"""

import argparse
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import recording
import torch
from phases import Phases, phases_of
from ppo_vs_trl import COMMON, LORA_R, trainer_of
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from instructlite.errors import InstructLiteError
from instructlite.models.base import Base, keep_bytes, quantization_config
from instructlite.training.recipe import quiet_libraries, versions

PROMPT_LENGTH, DTYPE = 64, torch.bfloat16
CONFIGS = {
    "llama-3.1-8b": dict(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    ),
}  # fmt: skip


def random_base(name: str, quantization: str) -> Base:
    """A base of random weights, quantized as it would be when loaded from files."""
    config = LlamaConfig(**CONFIGS[name], tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    # All are windows of one array, each begins elsewhere: main memory for the largest of them is enough.
    step = 4096
    numbers = torch.randn(max(shape.numel() for shape in shapes.values()) + step * len(shapes), dtype=DTYPE).mul_(0.02)
    weights = {
        name: numbers[step * i :][: shape.numel()].view(shape) if len(shape) > 1 else torch.ones(shape, dtype=DTYPE)
        for i, (name, shape) in enumerate(shapes.items())
    }
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    options = {"quantization_config": quantization_config(quantization, DTYPE)} if quantization != "none" else {}
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=DTYPE, device_map={"": device}, **options)
    model.requires_grad_(False)
    if quantization == "nf4":
        keep_bytes(model)
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    return Base(
        model, tokenizer, id=f"random {name}", path=Path(), revision=None, fingerprint="", quantization=quantization, dtype="bfloat16",
        end_id=1, stop_ids=[1],
    )  # fmt: skip


class EveryCycle(TrainerCallback):
    def __init__(self, phases: Phases):
        self.phases, self.cycles = phases, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.phases.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.cycles.append(self.phases.stop())
        self.phases.start()


def measure(quantization: str, args: argparse.Namespace) -> dict[str, Any]:
    """One quantization: memory of the weights, and of each phase seconds (median of the timed cycles) and peak memory."""
    quiet_libraries()
    torch.manual_seed(0)
    phases = Phases()
    clock = EveryCycle(phases)
    try:
        with phases.phase("load"):
            base = random_base(args.config, quantization)
        loading = phases.stop()
        weights_mb = base.model.get_memory_footprint() / 1e6
        rows = torch.randint(3, base.model.config.vocab_size, (args.batch * args.updates, PROMPT_LENGTH)).tolist()
        with tempfile.TemporaryDirectory() as output_dir:
            options = settings(args) | {"output_dir": output_dir}
            trainer = trainer_of(base, [{"input_ids": row} for row in rows], options, clock, top_layers=None)
            with phases_of(trainer, phases):
                trainer.train()
    except torch.OutOfMemoryError as error:
        where = phases.failed_in or phases.running[-1]
        return {"out_of_memory": str(error).partition(". ")[0], "in": where, "cycles": [*clock.cycles, phases.stop()]}
    timed = clock.cycles[1:]
    names = clock.cycles[0]["seconds"]
    seconds = {name: statistics.median(cycle["seconds"][name] for cycle in timed) for name in names}
    peaks = loading["peak_mb"] | {name: max(c["peak_mb"][name] for c in clock.cycles) for name in clock.cycles[0]["peak_mb"]}
    return {
        "weights_mb": round(weights_mb, 1),
        "peak_mb": {name: round(peak) for name, peak in peaks.items()},
        "seconds": {name: round(value, 3) for name, value in (seconds | {"load": loading["seconds"]["load"]}).items()},
        "seconds_per_cycle": round(statistics.median(sum(cycle["seconds"].values()) for cycle in timed), 3),
        "tokens_per_s": round(args.batch * args.response_length / seconds["generate"], 1),
        "cycles": clock.cycles,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return COMMON | {
        "response_length": args.response_length, "gradient_checkpointing": True, "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": args.micro_batch, "gradient_accumulation_steps": args.batch // args.micro_batch,
    }  # fmt: skip


def compare(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """nf4 / bf16, where both were measured."""
    if len(results) < 2 or any("out_of_memory" in result for result in results.values()):
        return {}
    nf4, bf16 = results["nf4"], results["bf16"]
    return {
        "weights_ratio": round(nf4["weights_mb"] / bf16["weights_mb"], 4),
        "peak_ratio": round(peak_of_cycle(nf4) / peak_of_cycle(bf16), 4) if nf4["peak_mb"] else None,
        "speed_ratio": round(bf16["seconds_per_cycle"] / nf4["seconds_per_cycle"], 4),
    }


def peak_of_cycle(result: dict[str, Any]) -> float:
    return max(peak for name, peak in result["peak_mb"].items() if name != "load")


def print_table(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}")
    if "out_of_memory" in result:
        print(f"  does not fit: {result['out_of_memory']} (in: {result['in']})")
        return
    print(f"  {'':20}{'seconds':>10}{'peak MB':>10}")
    for phase, seconds in result["seconds"].items():
        print(f"  {phase:20}{seconds:10.2f}{result['peak_mb'].get(phase, float('nan')):10.0f}")
    per_cycle = f"{result['seconds_per_cycle']:.2f} s a cycle, {result['tokens_per_s']:.0f} generated tokens/s"
    print(f"  {per_cycle}, weights of the base {result['weights_mb']:.0f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="llama-3.1-8b", help="shapes of the base")
    parser.add_argument("--quantization", choices=("nf4", "none", "both"), default="both", help="of the base; none is bf16")
    parser.add_argument("--batch", type=int, default=16, help="episodes a cycle, generated at once")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows a forward or backward pass")
    parser.add_argument("--response-length", type=int, default=512, help="tokens of every response")
    parser.add_argument("--updates", type=int, default=3, help="cycles; the first is not timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables, settings and every cycle's numbers")
    args = parser.parse_args(arguments)
    if args.updates < 2 or args.micro_batch < 1 or args.batch % args.micro_batch:
        parser.error("--updates must be at least 2 (the first is not timed), --batch a multiple of --micro-batch")
    if args.config != "tiny" and not torch.cuda.is_available():
        parser.error(f"--config {args.config} needs a GPU, and torch sees none; --config tiny runs on a CPU")
    try:
        results = measured(args)
    except InstructLiteError as error:
        raise SystemExit(str(error)) from None
    ratios = compare(results)
    if ratios:
        print("\nnf4 / bf16: " + ", ".join(f"{name.removesuffix('_ratio')} {ratio}" for name, ratio in ratios.items()))
    if args.json:
        gpu = {"name": torch.cuda.get_device_name(), "memory_mb": torch.cuda.mem_get_info()[1] / 1e6} if torch.cuda.is_available() else None
        about = {"gpu": gpu, "config": args.config, "dtype": "bfloat16", "lora_r": LORA_R, "prompt_length": PROMPT_LENGTH}
        about["settings"] = settings(args) | {"batch": args.batch, "updates": args.updates, "untimed_updates": 1}
        recording.write(args.json, about | ratios | results | {"versions": versions()})


def measured(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Results by name, each printed as soon as it is there."""
    results = {}
    for quantization in ("nf4", "none") if args.quantization == "both" else (args.quantization,):
        name = "bf16" if quantization == "none" else quantization
        if args.quantization == "both":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results[name] = process.submit(measure, quantization, args).result()
        else:
            results[name] = measure(quantization, args)
        print_table(name, results[name])
    return results


if __name__ == "__main__":
    main()
