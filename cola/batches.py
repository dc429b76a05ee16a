"""The stream of training batches: shuffled once per epoch, and startable at any step.

The order of an epoch is a function of (seed, epoch), so the position of a run is one number.
"""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from cola.interfaces import Batch, Split, TaskData


class BatchStream:
    """Batches of the training split, epoch after epoch."""

    def __init__(self, task: TaskData, *, batch_size: int, seed: int, device: torch.device) -> None:
        self._task = task
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self.steps_per_epoch = math.ceil(len(task.train.rows) / batch_size)

    def batches(self, first_step: int, last_step: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for first_step..last_step, both counted from 1. Algorithm 1, line 2."""
        step = first_step
        while step <= last_step:
            epoch, offset = divmod(step - 1, self.steps_per_epoch)
            order = self._order(epoch)[offset * self._batch_size :]
            for batch in _load(self._task.train, self._task, order, self._batch_size):
                if step > last_step:
                    return
                yield step, batch.to(self._device)
                step += 1

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self._task.train.rows), generator=generator).tolist()
        return order


def evaluation_batches(
    split: Split, task: TaskData, *, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """All rows of a split in order."""
    order = list(range(len(split.rows)))
    return (batch.to(device) for batch in _load(split, task, order, batch_size))


def _load(split: Split, task: TaskData, order: list[int], batch_size: int) -> "DataLoader[Batch]":
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rows: Dataset[Batch] = split.rows  # type: ignore[assignment]
    # A generator of its own: the loader would draw from the global one, which dropout uses.
    own = torch.Generator()
    return DataLoader(rows, batch_sampler=chunks, collate_fn=task.collate, generator=own)
