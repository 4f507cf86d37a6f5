"""The same PPO work done by stock TRL 1.12 and by InstructLite: memory of the weights, peak memory, speed.

    python bench/ppo_vs_trl.py [--rounds 3] [--updates 3] [--micro-batch 8] [--trl-micro-batch 16] [--json FILE]

Same model, prompts (the same token ids), rollout batch, response length (nothing ends a response early, so both make the same number
of tokens), one epoch, one minibatch, bf16, and a LoRA policy of rank 16 on all linear layers. TRL holds value and reward model as full
models; here they are adapters of the policy's base. `all_layers` has adapters on every layer, `shared_lower_layers` on the top 10 only,
so that the layers below run once for all roles. Our reference is an adapter that is computed like any other; TRL's is the bare base.

The rows of a backward pass are each side's own choice, for they change memory and not what is computed: TRL takes the whole update, as
its own examples do, ours parts of it. (`--trl-micro-batch 4` gives both the same.) `…_64` is our side with another shape of the work: 64
answers are generated at once and make four updates of 16, so that an update is the same size but three of four see answers that
the policy of up to three updates before gave.

Every measurement is a process of its own, the sides take turns, and the first rollout of each process and its updates are not timed.
TRL 1.12, the last release with a PPOTrainer, is installed into bench/.trl-1.12 and seen by its own processes only.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import recording

ROOT = Path(__file__).resolve().parent.parent
TRL, TRL_VERSION = Path(__file__).resolve().parent / ".trl-1.12", "1.12.0"
OURS = ("all_layers", "shared_lower_layers", "all_layers_64", "shared_lower_layers_64")
LARGE = 4  # updates from one rollout, in the sides whose name ends with _64
MEASURES = ("weights_mb", "peak_rss_mb", "episodes_per_s", "seconds_per_update")
BATCH, LORA_R, TOP_LAYERS, DTYPE = 16, 16, 10, "bfloat16"
CHUNK = 128  # tokens whose logits are in memory at once, on our side; TRL has those of all
# Options of both trainers, by the same names.
COMMON = dict(
    num_ppo_epochs=1, num_mini_batches=1, response_length=64, temperature=1.0, learning_rate=1e-5, gradient_checkpointing=False,
    report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0,
)  # fmt: skip


# --- one measurement, in a process of its own: heavy imports are inside ----------------------------------------------------


def prompts(tokenizer: Any, number: int) -> list[dict[str, list[int]]]:
    """Chat prompts of equal length in tokens: in whatever order a trainer takes them, its batches have the same shape."""
    from instructlite.models.base import TEMPLATES, encode_prompt

    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = [{"input_ids": encode_prompt(tokenizer, f"Write a short note about topic number {100 + i}.")} for i in range(number)]
    if len({len(row["input_ids"]) for row in rows}) > 1:
        raise SystemExit("prompts of unequal length: this tokenizer does not split numbers into digits")
    return rows


def build_trl(model: str, updates: int, options: dict[str, Any], callback: Any) -> tuple[Any, list, list]:
    """Stock TRL: policy with LoRA, full value model, full reward model. Gives trainer, models, prompts."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    rows = prompts(tokenizer, BATCH * updates)
    dtype = getattr(torch, DTYPE)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    value, reward = (AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype) for _ in range(2))
    args = PPOConfig(
        **options, total_episodes=len(rows), local_rollout_forward_batch_size=BATCH, bf16=True, num_sample_generations=0, stop_token=None
    )
    data = Dataset.from_list(rows)
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value, train_dataset=data,
        eval_dataset=data.select(range(2)), callbacks=[callback],
        peft_config=LoraConfig(r=LORA_R, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    return trainer, [trainer.policy_model, value, reward], rows


def build_ours(model: str, updates: int, options: dict[str, Any], callback: Any, *, top_layers: int | None) -> tuple[Any, list, list]:
    """Policy, reference, value and reward as adapters of one base."""
    from instructlite.models.base import load_base

    base = load_base(model, dtype=DTYPE, chat_template="chatml")
    rows = prompts(base.tokenizer, BATCH * updates)
    options |= {"share_lower_layers": top_layers is not None, "logp_chunk_size": CHUNK}
    trainer = trainer_of(base, rows, options, callback, top_layers=top_layers)
    return trainer, [trainer.model], rows


def trainer_of(base: Any, rows: list, options: dict[str, Any], callback: Any, *, top_layers: int | None) -> Any:
    """A PPOTrainer with all roles as fresh adapters, whose responses all have the full length."""
    from instructlite.config import Lora
    from instructlite.models.base import lora_config
    from instructlite.models.roles import RoleModel
    from instructlite.training.ppo_trainer import PPOConfig, PPOTrainer

    roles = RoleModel.for_ppo(base, lora_config(Lora(r=LORA_R, top_layers=top_layers), base.model, "CAUSAL_LM"))
    roles.copy_role("policy", "reference")
    roles.copy_role("policy", "reward")
    roles.add_head("reward")
    roles.heads["reward"].weight.data.normal_()  # scores that vary, like those of TRL's fresh score head
    never = base.model.config.vocab_size  # no token has this id, so nothing stops a response
    args = PPOConfig(**options, total_episodes=len(rows), stop_token_ids=[never])
    return PPOTrainer(roles, args, train_dataset=rows, callbacks=[callback])


def measure(side: str, model: str, updates: int, micro_batch: int) -> dict[str, Any]:
    import torch
    import transformers

    ticks, generated, generate = [], [], transformers.GenerationMixin.generate

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ticks.append(time.perf_counter())

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = generate(self, *args, **kwargs)
        ids = getattr(output, "sequences", output)
        generated.append(len(ids) * (ids.shape[1] - kwargs["input_ids"].shape[1]))
        return output

    transformers.GenerationMixin.generate = counted
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as output_dir:
        options = COMMON | {"output_dir": output_dir, "per_device_train_batch_size": micro_batch}
        options["gradient_accumulation_steps"] = BATCH // micro_batch
        first = 1
        if side == "trl":
            trainer, models, rows = build_trl(model, updates, options, Clock())
        else:
            if side.endswith("_64"):
                first, updates = LARGE, LARGE * 2
                options |= {"num_mini_batches": LARGE, "generation_batch_size": BATCH * LARGE}
            top_layers = TOP_LAYERS if side.startswith("shared_lower_layers") else None
            trainer, models, rows = build_ours(model, updates, options, Clock(), top_layers=top_layers)
        trainer.train()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    seconds = [after - before for before, after in pairwise(ticks[first - 1 :])]  # from the end of the first rollout's updates on
    return {
        "side": side,
        "weights_mb": sum(storages.values()) / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024) / 1e6,
        "episodes_per_s": BATCH * len(seconds) / sum(seconds),
        "seconds_per_update": sum(seconds) / len(seconds),
        "seconds": seconds,
        "tokens_generated": generated,
        "prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "trl")},
    }


def model_path(model: str) -> dict[str, str]:
    """Where the weights lie; the embedded model is converted here, once, so that no measurement includes it."""
    from instructlite.models.base import load_base

    return {"path": str(load_base(model, dtype=DTYPE, chat_template="chatml").path)}


# --- the parent: imports nothing heavy, so that it adds nothing to the memory of its children --------------------------------


def child(side: str, model: str, updates: int, micro_batch: int) -> dict[str, Any]:
    path = [str(TRL), str(ROOT)] if side == "trl" else [str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    load = round(os.getloadavg()[0], 2)
    command = [sys.executable, __file__, "--side", side, "--model", model, "--updates", str(updates), "--micro-batch", str(micro_batch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"load_average_before": load}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios ours / TRL's."""
    work = {json.dumps([r["prompts_sha256"], sum(r["tokens_generated"])]) for r in rounds if not r["side"].endswith("_64")}
    if len(work) != 1:
        raise SystemExit(f"not the same work, nothing to compare (prompts, generated tokens): {work}")
    median = {s: {m: round(statistics.median(r[m] for r in rounds if r["side"] == s), 4) for m in MEASURES} for s in ("trl", *OURS)}
    ratios = {"weights_ratio": "weights_mb", "peak_ratio": "peak_rss_mb", "speed_ratio": "episodes_per_s"}
    return {
        s: {"ours": median[s], "trl": median["trl"]} | {r: round(median[s][m] / median["trl"][m], 4) for r, m in ratios.items()}
        for s in OURS
    }


def print_table(results: dict[str, Any]) -> None:
    print(f"\n{'':24}{'weights MB':>12}{'peak MB':>10}{'episodes/s':>12}{'s/update':>10}   ours / TRL: weights, peak, speed")
    for name, row in [("TRL " + TRL_VERSION, results[OURS[0]]["trl"]), *((side, results[side]["ours"]) for side in OURS)]:
        ratios = ", ".join(f"{results[name][r]:.2f}" for r in ("weights_ratio", "peak_ratio", "speed_ratio")) if name in OURS else ""
        numbers = f"{row['weights_mb']:12.0f}{row['peak_rss_mb']:10.0f}{row['episodes_per_s']:12.3f}{row['seconds_per_update']:10.2f}"
        print(f"{name:24}{numbers}   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side, in turns; medians are reported")
    parser.add_argument("--updates", type=int, default=3, help="updates a measurement; the first is not timed")
    parser.add_argument("--micro-batch", type=int, default=8, help=f"rows of a backward pass, of the {BATCH} of an update, on our side")
    parser.add_argument("--trl-micro-batch", type=int, default=BATCH, help="the same on TRL's side")
    parser.add_argument("--model", default="smollm2-135m", help="Hub id or directory of the base")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results, settings and every round's numbers")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.updates < 2 or args.rounds < 1 or any(m < 1 or BATCH % m for m in (args.micro_batch, args.trl_micro_batch)):
        parser.error(f"--updates must be at least 2 (the first is not timed), --rounds at least 1, both micro-batches divisors of {BATCH}")
    if args.side:
        result = model_path(args.model) if args.side == "path" else measure(args.side, args.model, args.updates, args.micro_batch)
        print("\n" + json.dumps(result))
        return
    if not (TRL / f"trl-{TRL_VERSION}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TRL), f"trl=={TRL_VERSION}"]
        subprocess.run(pip, check=True)
    path = child("path", args.model, args.updates, args.micro_batch)["path"]
    sides = {"trl": args.trl_micro_batch} | dict.fromkeys(OURS, args.micro_batch)
    rounds = []
    for number in range(args.rounds):
        for side, micro_batch in sides.items():
            rounds.append(child(side, path, args.updates, micro_batch) | {"round": number, "micro_batch": micro_batch})
            shown = ", ".join(f"{name} {rounds[-1][name]:.3f}" for name in MEASURES)
            print(f"round {number + 1}, {side}: {shown} (load average before: {rounds[-1]['load_average_before']})", flush=True)
    results = summary(rounds)
    print_table(results)
    if args.json:
        lora = {"lora_r": LORA_R, "top_layers": {"all_layers": None, "shared_lower_layers": TOP_LAYERS}}
        settings = COMMON | lora | {"model": args.model, "dtype": DTYPE, "batch": BATCH, "micro_batch": sides, "logp_chunk_size": CHUNK}
        settings |= {"updates": args.updates, "untimed_updates": 1, "rounds": args.rounds}
        versions = rounds[-1]["versions"] | {"trl_baseline": TRL_VERSION}
        recording.write(args.json, results | {"versions": versions, "settings": settings, "rounds": rounds})


if __name__ == "__main__":
    main()
