"""Two processes (gloo, CPU) give the numbers of one process with the same global batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from test_ppo_trainer import PROMPTS, PTX, config, digest, roles, share_of_vowels

from instructlite.models.base import load_base
from instructlite.models.sampling import Sampling
from instructlite.training import rollout
from instructlite.training.ppo_trainer import PPOTrainer


def run(rank: int, processes: int, port: int, base: str, out: str, resume: bool) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    # Sampled answers differ from process to process; greedy ones are those of the prompt, wherever it is answered.
    greedy = rollout.generate
    rollout.generate = lambda m, p, r, s, **k: greedy(m, p, r, Sampling(s.max_new_tokens, 0.0), **{**k, "batch_size": 1})
    model = roles(load_base(base, dtype="float32", chat_template="chatml"), top_layers=2)
    args = config(
        Path(out), per_device_train_batch_size=8 // processes, num_mini_batches=1, num_ppo_epochs=2, max_steps=6, kl_controller="adaptive",
        target=0.1, horizon=50, ptx_coef=0.1, save_strategy="steps", save_steps=3, target_kl=10.0, learning_rate=1e-3, ddp_backend="gloo",
    )  # fmt: skip
    trainer = PPOTrainer(model, args, train_dataset=PROMPTS[:32], ptx_dataset=PTX, reward_model=share_of_vowels)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-3" if resume else None)
    weights = [p for role in ("policy", "value") for p in trainer.unwrapped.role_parameters(role)]
    logs = [{k: v for k, v in log.items() if "time" not in k and "per_s" not in k} for log in trainer.state.log_history]
    state = {
        "weights": torch.cat([p.detach().flatten() for p in weights]),
        "kl_coef": trainer.kl_coef,
        "scale": trainer.scale.mean,
        "logs": logs,
    }
    torch.save(state | {"sha": digest(weights)}, f"{out}/result-{processes}-{rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def start(processes: int, base: Path, out: Path, resume: bool = False) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, args=(processes, port, str(base), str(out), resume), nprocs=processes)
    return [torch.load(f"{out}/result-{processes}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two(tiny_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return start(2, tiny_path, out), out


def test_t17_two_processes_equal_one_with_the_same_global_batch(two, tiny_path, tmp_path):
    (first, second), _ = two
    (one,) = start(1, tiny_path, tmp_path)
    assert first["sha"] == second["sha"] and first["kl_coef"] == second["kl_coef"] and first["scale"] == second["scale"]
    assert (first["weights"] - one["weights"]).abs().max() < 1e-5
    assert first["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-6) and first["scale"] == pytest.approx(one["scale"], abs=1e-6)
    for ours, theirs in zip(first["logs"], one["logs"], strict=True):
        for name in ("objective/kl", "objective/score", "objective/advantage_std_raw", "rollout/length_mean"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_two_processes_resume_bit_for_bit_in_the_middle_of_a_cycle(two, tiny_path):
    (first, _), out = two
    assert (out / "checkpoint-3" / "rollout_1.safetensors").is_file()
    again = start(2, tiny_path, out, resume=True)
    assert again[0]["sha"] == first["sha"] == again[1]["sha"]
