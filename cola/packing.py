"""Tensors side by side in one memory, so that one copy moves all of them.

A copy to another device takes a host several calls, whatever its size, and a block of a large model
has half a dozen tensors to send in each direction.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

ALIGNMENT = 512
"""Bytes that every tensor's memory begins at a multiple of, as if it had been allocated alone."""

COPIED_ALONE_BYTES = 1 << 20
"""From this size on a tensor has a copy of its own, as a GPU copies any memory; one kernel for many
tensors is made for small ones, whose launches would take longer than they do."""


def pack(tensors: Sequence[Tensor], rows: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Copies of tensors, contiguous; those of one dtype and device in one memory.

    Args:
        tensors: to copy.
        rows: of some only these are copied, (N', D) of (..., D): their indices, int64; None: all.
    """
    rows = rows or [None] * len(tensors)
    pairs = list(zip(_memory_for(tensors, rows), tensors, rows, strict=True))
    small = []
    for into, out_of, picked in pairs:
        if picked is not None:
            torch.index_select(out_of.reshape(-1, out_of.shape[-1]), 0, picked, out=into)
        elif into.nbytes < COPIED_ALONE_BYTES:
            small.append((into, out_of))
        else:
            into.copy_(out_of)
    if small:
        torch._foreach_copy_([into for into, _ in small], [out_of for _, out_of in small])
    return [into for into, _, _ in pairs]


def _memory_for(tensors: Sequence[Tensor], rows: Sequence[Tensor | None]) -> list[Tensor]:
    """Where copies of these rows of tensors go."""
    shapes = [
        tensor.shape if picked is None else torch.Size([len(picked), tensor.shape[-1]])
        for tensor, picked in zip(tensors, rows, strict=True)
    ]
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        like = zip(tensors, shapes, strict=True)
        return [torch.empty(shape, dtype=x.dtype, device=x.device) for x, shape in like]
    step = ALIGNMENT // tensors[0].element_size()
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + -(-shape.numel() // step) * step)
    memory = torch.empty(starts[-1], dtype=tensors[0].dtype, device=tensors[0].device)
    return [
        memory[start : start + shape.numel()].view(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


def packed_memory(tensors: Sequence[Tensor]) -> Tensor | None:
    """What several packed tensors lie in, (num,), from the first to the last; None: apart."""
    first, last = tensors[0], tensors[-1]
    is_one = all(
        tensor.dtype is first.dtype
        and tensor.is_contiguous()
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for tensor in tensors
    )
    gaps = [
        after.storage_offset() - before.storage_offset() - before.numel()
        for before, after in pairwise(tensors)
    ]
    largest = ALIGNMENT // first.element_size()
    if len(tensors) < 2 or not is_one or not all(0 <= gap < largest for gap in gaps):
        return None
    start = first.storage_offset()
    return first.as_strided((last.storage_offset() + last.numel() - start,), (1,), start)


def unpack(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in a copy of the memory that `packed_memory` found of `like`."""
    start = like[0].storage_offset()
    return [
        memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)
        for tensor in like
    ]
