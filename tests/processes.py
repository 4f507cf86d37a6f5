"""Two processes as a launcher starts them (gloo, CPU): forks of a server that has imported everything once."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import torch
from torch.multiprocessing import start_processes


def process(rank: int, processes: int, port: int, out: str, function, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.save(function(*arguments), f"{out}/result-{rank}.pt")
    with suppress(RuntimeError):  # the other one may be gone
        torch.distributed.destroy_process_group()


def in_two_processes(function, base: Path, out: Path, *arguments, killed: bool = False) -> list:
    """What function(base, out, 2, *arguments) gives in each. killed: the second one is, and gives nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("forkserver")
    modules = ("training.ppo", "training.reward", "training.dpo", "evaluation.compare")
    context.set_forkserver_preload([f"instructlite.{name}" for name in modules])
    started = start_processes(
        process, (2, port, str(out), function, (str(base), str(out), 2, *arguments)), nprocs=2, join=not killed, start_method="forkserver"
    )
    if killed:
        for one in started.processes:
            one.join(120)
        assert [one.exitcode for one in started.processes] == [0, -9]
    return [torch.load(out / f"result-{rank}.pt", weights_only=False) for rank in range(1 if killed else 2)]
