"""The same PPO work done by stock TRL 1.12 and by InstructLite: memory of the weights, peak memory, speed.

    python bench/ppo_vs_trl.py [--rounds 3] [--updates 3] [--json FILE]

Same model, prompts (the same token ids), rollout batch, response length (nothing ends a response early, so both make the same
number of tokens), one epoch, one minibatch, bf16, a LoRA policy of rank 16 on all linear layers. TRL holds value and reward model as
full models, as its users do; here they are adapters of the policy's base. `all_layers` has them on every layer,
`shared_lower_layers` on the top 10 only, so that the layers below run once for all roles. (Our reference and reward are adapters that
are computed like any trained one; TRL's reference is the bare base.)

Every measurement is a process of its own, the sides take turns, and the first update of each process is not timed.
TRL 1.12 (the last release with a PPOTrainer) is installed by this script into bench/.trl-1.12, for its own processes only.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRL, TRL_VERSION = Path(__file__).resolve().parent / ".trl-1.12", "1.12.0"
OURS = ("all_layers", "shared_lower_layers")
SHARED = {"batch": 16, "response_length": 64, "lora_r": 16, "top_layers": 10, "temperature": 1.0, "dtype": "bfloat16"}
MEASURES = ("weights_mb", "peak_rss_mb", "episodes_per_s", "seconds_per_update")
# Both trainers' own options of the same names and values.
COMMON = dict(
    per_device_train_batch_size=SHARED["batch"], gradient_accumulation_steps=1, num_ppo_epochs=1, num_mini_batches=1,
    response_length=SHARED["response_length"], temperature=SHARED["temperature"], learning_rate=1e-5, gradient_checkpointing=False,
    report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0,
)  # fmt: skip


# --- one measurement: runs in a process of its own, so heavy imports are inside ---------------------------------------------------


def prompts(tokenizer: Any, number: int) -> list[dict[str, list[int]]]:
    """Chat prompts of equal length in tokens: whatever order a trainer takes them in, its batches have the same shape."""
    from instructlite.models.base import TEMPLATES, encode_prompt

    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = [{"input_ids": encode_prompt(tokenizer, f"Write a short note about topic number {100 + i}.")} for i in range(number)]
    assert len({len(row["input_ids"]) for row in rows}) == 1, "prompts of unequal length"
    return rows


def build_trl(model: str, updates: int, output_dir: str, callback: Any) -> tuple[Any, list, list]:
    """Stock TRL: policy with LoRA, full value model, full reward model. Gives trainer, models, prompts."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    rows = prompts(tokenizer, SHARED["batch"] * updates)
    dtype = getattr(torch, SHARED["dtype"])
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype) for _ in range(2))
    args = PPOConfig(
        output_dir=output_dir, **COMMON, total_episodes=len(rows), local_rollout_forward_batch_size=SHARED["batch"], bf16=True,
        num_sample_generations=0, stop_token=None,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value, train_dataset=data,
        eval_dataset=data.select(range(2)), callbacks=[callback],
        peft_config=LoraConfig(r=SHARED["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    return trainer, [trainer.policy_model, value, reward], rows


def build_ours(model: str, updates: int, output_dir: str, callback: Any, side: str) -> tuple[Any, list, list]:
    """Policy, reference, value and reward as adapters of one base."""
    from instructlite.config import Lora
    from instructlite.models.base import load_base, lora_config
    from instructlite.models.roles import RoleModel
    from instructlite.training.ppo_trainer import PPOConfig, PPOTrainer

    shared = side == "shared_lower_layers"
    base = load_base(model, dtype=SHARED["dtype"], chat_template="chatml")
    rows = prompts(base.tokenizer, SHARED["batch"] * updates)
    lora = Lora(r=SHARED["lora_r"], top_layers=SHARED["top_layers"] if shared else None)
    roles = RoleModel.for_ppo(base, lora_config(lora, base.model, "CAUSAL_LM"))
    roles.copy_role("policy", "reference")
    roles.copy_role("policy", "reward")
    roles.add_head("reward")
    roles.heads["reward"].weight.data.normal_()  # scores that vary, as TRL's fresh score head gives
    never = base.model.config.vocab_size  # no token has this id: nothing stops a response
    args = PPOConfig(
        output_dir=output_dir, **COMMON, total_episodes=len(rows), stop_token_ids=[never], share_lower_layers=shared,
    )  # fmt: skip
    return PPOTrainer(roles, args, train_dataset=rows, callbacks=[callback]), [roles], rows


def measure(side: str, model: str, updates: int) -> dict[str, Any]:
    import torch
    import transformers

    ticks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ticks.append(time.perf_counter())

    generated: list[int] = []
    generate = transformers.GenerationMixin.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = generate(self, *args, **kwargs)
        ids = getattr(output, "sequences", output)
        generated.append(len(ids) * (ids.shape[1] - kwargs["input_ids"].shape[1]))
        return output

    transformers.GenerationMixin.generate = counted
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as output_dir:
        build: Callable = build_trl if side == "trl" else lambda *a: build_ours(*a, side)
        trainer, models, rows = build(model, updates, output_dir, Clock())
        trainer.train()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    seconds = [b - a for a, b in pairwise(ticks)]  # from the end of the first update on
    return {
        "side": side,
        "weights_mb": sum(storages.values()) / 1e6,
        "peak_rss_mb": peak_rss_mb(),
        "episodes_per_s": SHARED["batch"] * len(seconds) / sum(seconds),
        "seconds_per_update": sum(seconds) / len(seconds),
        "seconds": seconds,
        "tokens_generated": generated,
        "prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "trl")},
    }


def peak_rss_mb() -> float:
    """Of this process; ru_maxrss would also count what the parent held when it started us."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def model_path(model: str) -> dict[str, str]:
    """Where the weights lie. The embedded model is converted here, once, so that no measurement includes it."""
    from instructlite.models.base import load_base

    return {"path": str(load_base(model, dtype=SHARED["dtype"], chat_template="chatml").path)}


# --- the parent: imports nothing heavy ----------------------------------------------------------------------------------------------


def install_trl() -> None:
    if not (TRL / f"trl-{TRL_VERSION}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), f"trl=={TRL_VERSION}"]
        subprocess.run(pip, check=True)


def child(side: str, model: str, updates: int) -> dict[str, Any]:
    path = [str(TRL)] if side == "trl" else []
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    load = round(os.getloadavg()[0], 2)
    command = [sys.executable, __file__, "--side", side, "--model", model, "--updates", str(updates)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load_average_before": load}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds and the ratios ours / theirs."""
    work = {json.dumps([r["prompts_sha256"], r["tokens_generated"]]) for r in rounds}
    if len(work) != 1:
        raise SystemExit(f"not the same work, nothing to compare: {work}")
    median = {
        side: {name: round(statistics.median(r[name] for r in rounds if r["side"] == side), 4) for name in MEASURES}
        for side in ("trl", *OURS)
    }
    trl = median["trl"]
    return {
        side: {
            "ours": median[side],
            "trl": trl,
            "weights_ratio": round(median[side]["weights_mb"] / trl["weights_mb"], 4),
            "peak_ratio": round(median[side]["peak_rss_mb"] / trl["peak_rss_mb"], 4),
            "speed_ratio": round(median[side]["episodes_per_s"] / trl["episodes_per_s"], 4),
        }
        for side in OURS
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "cpu": (names or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "memory_gb": round(memory, 1),
        "system": platform.system(),
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'':22}{'weights MB':>12}{'peak MB':>10}{'episodes/s':>12}{'s/update':>10}   {'ours / TRL: weights, peak, speed'}"]
    for name, row in [("TRL " + TRL_VERSION, results[OURS[0]]["trl"]), *((side, results[side]["ours"]) for side in OURS)]:
        lines.append(
            f"{name:22}{row['weights_mb']:12.0f}{row['peak_rss_mb']:10.0f}{row['episodes_per_s']:12.3f}{row['seconds_per_update']:10.2f}"
        )
        if name in OURS:
            r = results[name]
            lines[-1] += f"   {r['weights_ratio']:.3f}, {r['peak_ratio']:.3f}, {r['speed_ratio']:.2f}"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, taking turns; medians are reported")
    parser.add_argument("--updates", type=int, default=3, help="updates a measurement; the first is not timed")
    parser.add_argument("--model", default="smollm2-135m", help="Hub id or directory of the base")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results and every raw number")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("\n" + json.dumps(model_path(args.model) if args.side == "path" else measure(args.side, args.model, args.updates)))
        return
    if args.updates < 2:
        parser.error("--updates must be at least 2: the first is not timed")
    install_trl()
    path = child("path", args.model, 0)["path"]
    rounds = []
    for number in range(args.rounds):
        for side in ("trl", *OURS):
            rounds.append(child(side, path, args.updates) | {"round": number})
            shown = " ".join(f"{name} {rounds[-1][name]:.3f}" for name in MEASURES)
            print(f"round {number + 1} {side}: {shown} (load {rounds[-1]['load_average_before']})", flush=True)
    results = summary(rounds)
    print(table(results))
    if args.json:
        settings = SHARED | {"model": args.model, "updates": args.updates, "untimed_updates": 1, "common_options": COMMON}
        about = {"date": date.today().isoformat(), "machine": machine(), "settings": settings, "rounds": rounds}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results | about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
