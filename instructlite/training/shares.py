"""Several processes learn, update by update, what one process learns from batches as large as all of theirs together.

accelerate deals whole batches of an order that it takes to be the same everywhere, and fills the last ones up with rows from the epoch's
beginning. But grouping by length depends on the size of a batch, dropout leaves each process with another random state (and so, from
the second epoch on, with another order), and rows that are there twice count twice. Here the order is that of one process, each of its
batches is dealt row by row, and what is missing to a last batch is filled up with rows that teach nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

Row = dict[str, Any]


class Shares(BatchSampler):
    """This process's rows of each batch, which has `size` for each process; -1 - i is row i as one that teaches nothing."""

    def __init__(self, sampler: Sampler[int], size: int, rank: int, processes: int, drop_last: bool = False):
        self.sampler, self.batch_size, self.drop_last = sampler, size, drop_last
        self.rank, self.processes = rank, processes

    @property
    def batch_sampler(self) -> Shares:
        """Where Trainer._run_epoch (transformers 5.23) looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        whole = self.batch_size * self.processes
        return len(self.sampler) // whole if self.drop_last else -(-len(self.sampler) // whole)

    def __iter__(self) -> Iterator[list[int]]:
        # The order is drawn with torch's own random state, as by one process; that of the main process, whoever used it for what.
        state = [torch.get_rng_state()]
        broadcast_object_list(state)
        torch.set_rng_state(state[0])
        order, whole = list(self.sampler), self.batch_size * self.processes
        for number in range(len(self)):
            batch = order[number * whole : (number + 1) * whole]
            share = -(-len(batch) // self.processes)  # of each process; DPO gathers rows and needs as many of each
            own = batch[self.rank :: self.processes]
            yield own + [-1 - batch[0]] * (share - len(own))


class Filled(Dataset):
    """A data set with rows that teach nothing at negative numbers."""

    def __init__(self, rows: Sequence[Row], blank: Any):
        self.rows, self.blank = rows, blank

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number] if number >= 0 else self.blank(self.rows[-1 - number])


class Together(ABC):
    """Mixin before a TRL trainer: its processes see what one process sees, and each row of an update counts the same.

    Relies on transformers 5.23: `_get_dataloader` gives a loader of accelerate's, `_run_epoch` calls `set_epoch` of its batch sampler's
    `batch_sampler`.
    """

    @abstractmethod
    def blank(self, row: Row) -> Row:
        """A short row like this one that adds nothing to the loss, its gradient, and what it is divided by."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= self.args.world_size
        return sampler

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, is_training: bool = False, *args: Any, **kwargs: Any
    ) -> DataLoader:
        loader = super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, *args, **kwargs)
        if self.args.world_size == 1 or not is_training or self.args.train_sampling_strategy == "batch_rebalance":  # which deals itself
            return loader
        sampler = loader.batch_sampler.batch_sampler.sampler  # inside of accelerate's BatchSamplerShard
        shares = Shares(sampler, batch_size, self.args.process_index, self.args.world_size, self.args.dataloader_drop_last)
        same = ("collate_fn", "num_workers", "pin_memory", "worker_init_fn", "multiprocessing_context", "persistent_workers", "in_order")
        options = {name: getattr(loader, name) for name in (*same, "prefetch_factor")}
        return DataLoader(Filled(loader.dataset, self.blank), batch_sampler=shares, **options)


class EqualRows(Together):
    """... where the loss is a mean over rows.

    Relies on transformers 5.23: what `_get_num_items_in_batch` gives for the batches of an update reaches `compute_loss`.
    """

    loss_is_scaled_for_ga = True

    @abstractmethod
    def rows_that_count(self, inputs: dict[str, Tensor]) -> int:
        """How many rows the loss of a batch is the mean of."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        rows = torch.tensor(sum(map(self.rows_that_count, batch_samples)), device=device)
        return self.accelerator.reduce(rows, "sum") if self.args.world_size > 1 else rows

    def of_update(self, loss: Tensor, inputs: dict[str, Tensor], rows: Tensor | None) -> Tensor:
        """A batch's mean as its part of the mean over all `rows` of the update (None: it is not about an update).

        DDP will divide the sum over processes by their number.
        """
        return loss if rows is None else loss * (self.rows_that_count(inputs) * self.args.world_size / rows.clamp(min=1))


def dealt(lengths: Sequence[int], size: int, rank: int, processes: int) -> list[tuple[list[int], bool]]:
    """Batches of at most `size` rows for this process, each of them alone (True) or of all of them (False), as many for every process.

    By length, so that there is less padding. The rows that would not give all a batch of the same size are everyone's: whoever gathers
    gets what one process would have got.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    whole = len(order) // (size * processes) * size * processes if processes > 1 else 0
    own = [(order[start : start + size], True) for start in range(rank * size, whole, size * processes)]
    return own + [(order[start : start + size], False) for start in range(whole, len(order), size)]
