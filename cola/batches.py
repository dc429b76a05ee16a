"""The stream of training batches: shuffled once per epoch, and startable at any step.

The order of an epoch is a function of (seed, epoch) and the augmentation of a batch one of (seed,
step), so the position of a run is one number. Where users have adapters of their own, the rows of a
batch lie user by user; which rows it has does not depend on that.
"""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cola.task_data import Batch, Split, TaskData, TensorRows
from cola.user_rows import UserRows

logger = logging.getLogger(__name__)

DATA_SHARE = 0.25
"""Share of a GPU's free memory that a task's rows may take; larger sets stay on the host."""


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
            for _, batch in _load(self._task.train, self._task, order, self._batch_size):
                if step > last_step:
                    return
                yield step, self._augmented(batch.to(self._device), step)
                step += 1

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._task.train.rows), generator=generator)

    def _augmented(self, batch: Batch, step: int) -> Batch:
        if self._task.augment is None:
            return batch
        # Hashed, because torch takes 32 bits: neighbouring seeds and steps must not meet.
        digest = hashlib.sha256(f"{self._seed}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return self._task.augment(batch, generator)


def evaluation_batches(
    split: Split, task: TaskData, *, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Batch]]:
    """All rows of a split, batch by batch in order: each with its rows' indices in the split, (B,).

    Inside a batch rows are in order, too, unless users have adapters of their own.
    """
    order = torch.arange(len(split.rows))
    return ((indices, batch.to(device)) for indices, batch in _load(split, task, order, batch_size))


def place_rows(task: TaskData, device: torch.device) -> TaskData:
    """The task with its tensor rows on a GPU, so that no step copies a batch or waits for one.

    Rows that lie one by one stay on the host, and so do all if they need more than `DATA_SHARE`
    of the free memory.
    """
    splits = [task.train, task.selection, task.report, *task.extra_report]
    needed = sum(split.rows.num_bytes for split in splits if isinstance(split.rows, TensorRows))
    if device.type != "cuda" or not 0 < needed <= DATA_SHARE * torch.cuda.mem_get_info(device)[0]:
        return task
    logger.info("%d MiB of rows are kept on %s", needed // 2**20, device)
    train, selection, report, *extra = (_placed(split, device) for split in splits)
    return dataclasses.replace(
        task, train=train, selection=selection, report=report, extra_report=extra
    )


def _placed(split: Split, device: torch.device) -> Split:
    rows = split.rows
    if not isinstance(rows, TensorRows):
        return split
    return dataclasses.replace(split, rows=rows.to(device))


def _load(
    split: Split, task: TaskData, order: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Batch]]:
    """Indices (B,) and batches of the rows in `order`, on the device where the rows lie."""
    if not task.groups_users:
        yield from _fetch(split, task, order, batch_size)
        return
    assert split.owners is not None, "owners are assigned before batches are grouped"
    order = _grouped(order, split.owners, batch_size)
    for indices, batch in _fetch(split, task, order, batch_size):
        rows = UserRows.of(split.owners[indices].tolist())
        yield indices, dataclasses.replace(batch, rows=rows)


def _grouped(order: Tensor, owners: Tensor, batch_size: int) -> Tensor:
    """Rows (N,) sorted by owner inside each batch; stable, so that a user's rows keep theirs."""
    owner = owners[order]
    by_owner = torch.argsort(owner, stable=True)
    of_batch = torch.argsort(by_owner // batch_size, stable=True)
    return order[by_owner[of_batch]]


def _fetch(
    split: Split, task: TaskData, order: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Batch]]:
    rows, chunks = split.rows, torch.split(order, batch_size)
    if isinstance(rows, TensorRows):  # one copy of all indices, for no step may wait for its own
        moved = torch.split(order.to(rows.device), batch_size)
        yield from zip(chunks, map(rows.fetch, moved), strict=True)
        return
    for chunk in chunks:
        yield chunk, task.collate([rows[i] for i in chunk.tolist()])
