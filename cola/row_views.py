"""Some rows of a split as a split of its own: views by index, nothing is copied."""

import dataclasses
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from cola.task_data import Batch, Example, Split, TensorRows


class RowView(Sequence[Example]):
    """Rows of another sequence, by index."""

    def __init__(self, rows: Sequence[Example], indices: Tensor) -> None:
        """`indices` are (N,) int64, on the CPU."""
        self._rows = rows
        self._indices: list[int] = indices.tolist()

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._rows[i] for i in self._indices[index]]
        return self._rows[self._indices[index]]


class TensorRowView(Sequence[Example]):
    """The same of rows that lie in whole tensors; implements `interfaces.TensorRows` itself."""

    def __init__(self, rows: TensorRows, indices: Tensor) -> None:
        """`indices` are (N,) int64, on any device."""
        assert isinstance(rows, Sequence)
        self._rows: Sequence[Example] = rows
        self._tensors: TensorRows = rows
        self._indices = indices.to(rows.device)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "TensorRowView": ...
    def __getitem__(self, index: int | slice) -> "Example | TensorRowView":
        if isinstance(index, slice):
            return TensorRowView(self._tensors, self._indices[index])
        return self._rows[int(self._indices[index])]

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._tensors.device

    @property
    def num_bytes(self) -> int:
        """Of all the rows behind the view: they are what a device has to hold."""
        return self._tensors.num_bytes

    def to(self, device: torch.device) -> "TensorRowView":
        """The same view of the rows on another device."""
        moved = self._tensors.to(device)
        assert isinstance(moved, TensorRows)
        return TensorRowView(moved, self._indices)

    def fetch(self, indices: Tensor) -> Batch:
        """Rows (B,) of the view as a batch."""
        return self._tensors.fetch(self._indices[indices])


def pick_rows(split: Split, indices: Tensor) -> Split:
    """The rows (N,) of a split at these indices (int64, on the CPU), with their owners."""
    rows = split.rows
    view = TensorRowView(rows, indices) if isinstance(rows, TensorRows) else RowView(rows, indices)
    owners = None if split.owners is None else split.owners[indices]
    return dataclasses.replace(split, rows=view, owners=owners)
