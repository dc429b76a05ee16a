"""Images of a split as one tensor, and the random crops and flips that training sees.

A batch is one gather, on whichever device the split lies; nothing loops over images. Random
numbers are drawn on the CPU and pixels are only copied, so CPU and GPU see the same images.
Shapes: B rows, C channels.
"""

import dataclasses
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from cola.task_data import Batch, Example

CROP_PADDING = 4
"""Pixels by which a crop may leave the image on every side; what lies there is reflected."""


class ImageRows(Sequence[Example]):
    """Rows of `pixels` (C, height, width) and `label`; implements `interfaces.TensorRows`."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        assert len(pixels) == len(labels), "every image has one label"
        self._pixels = pixels  # (N, C, height, width) float32
        self._labels = labels  # (N,) int64

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageRows": ...

    def __getitem__(self, index: int | slice) -> "Example | ImageRows":
        if isinstance(index, slice):
            return ImageRows(self._pixels[index], self._labels[index])
        return {"pixels": self._pixels[index], "label": int(self._labels[index])}

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self._pixels.device

    @property
    def num_bytes(self) -> int:
        """Of all images and labels."""
        return self._pixels.nbytes + self._labels.nbytes

    def to(self, device: torch.device) -> "ImageRows":
        """The same rows on another device."""
        return ImageRows(self._pixels.to(device), self._labels.to(device))

    def fetch(self, indices: Tensor) -> Batch:
        """Rows (B,) as a batch, the same bits as `collate_images` makes of them one by one."""
        return Batch(
            inputs={"pixels": self._pixels.index_select(0, indices)},
            labels=self._labels.index_select(0, indices),
            num_terms=len(indices),
            row_terms=torch.ones(len(indices), dtype=torch.long),
        )


def crop_and_flip(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirrors every image with probability 1/2, then moves it by up to four pixels each way.

    Equals a crop of the image's size from the image padded by reflection. Augmentation of
    CIFAR-10 in the paper's reference implementation.

    Args:
        batch: `pixels` (B, C, height, width), larger than `CROP_PADDING` both ways.
        generator: on the CPU, wherever the batch is.

    Returns:
        A new batch on the same device.
    """
    pixels = batch.inputs["pixels"]
    size, channels, height, width = pixels.shape
    moves = torch.randint(-CROP_PADDING, CROP_PADDING + 1, (size, 2), generator=generator)
    flips = torch.randint(2, (size, 1), generator=generator)  # 1: mirrored
    # One small copy to the device, and none back: the host does not wait.
    drawn = torch.cat([moves, flips], dim=1).to(pixels.device, non_blocking=True)  # (B, 3)
    rows = _reflected(drawn[:, :1], height)  # (B, height)
    columns = _reflected(drawn[:, 1:2], width)  # (B, width)
    columns = torch.where(drawn[:, 2:].bool(), width - 1 - columns, columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)  # (B, height * width)
    source = source[:, None].expand(-1, channels, -1)
    moved = pixels.flatten(2).gather(2, source).view_as(pixels)
    return dataclasses.replace(batch, inputs={**batch.inputs, "pixels": moved})


def _reflected(moves: Tensor, length: int) -> Tensor:
    """Source indices (B, length) of an axis moved by (B, 1), mirrored at both borders."""
    index = moves + torch.arange(length, device=moves.device)
    last = length - 1
    return last - (last - index.abs()).abs()
