"""The order of prompts and the seeds of a run, as functions of (seed, epoch, cycle, rank): nothing to store, nothing to disturb."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class CycleSampler(Sampler[int]):
    """Each rollout batch of a stateless permutation, repeated for all micro-steps of its cycle.

    TRL's RepeatSampler owns a generator and has no `set_epoch`, so a resume in a later epoch replays the first one's
    order; here the order is a function of (seed, epoch). The last incomplete batch is dropped.
    """

    def __init__(self, size: int, batch: int, repeats: int, seed: int):
        self.size, self.batch, self.repeats, self.seed, self.epoch = size, batch, repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch * self.batch * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=generator(self.seed, self.epoch)).tolist()
        for start in range(0, self.size // self.batch * self.batch, self.batch):
            for _ in range(self.repeats):
                yield from order[start : start + self.batch]


def mix(*numbers: int) -> int:
    """One seed from several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))
