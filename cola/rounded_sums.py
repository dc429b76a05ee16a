"""Sums of a pristine weight and an update, rounded once, in blocks that a cache holds.

A merge moves far more bytes than it computes on: every block of rows is read, summed in float32 (or
wider) and written once, and neither the product of two factors nor a wide copy of the weight ever
exists as a whole. On a GPU a few such blocks are all the memory that a merge takes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cola.config.choices import Rounding

CPU_BLOCK_BYTES = 8 << 20
"""Of the sum. Larger ones leave the cache; in smaller ones workers wait for the interpreter, which
every call of a kernel takes anew, longer than kernels run (`docs/offload.md`)."""

GPU_BLOCK_BYTES = 64 << 20
"""Of the sum, within the second-level cache of large GPUs: every block costs four launches."""

GOLDEN = -1640531527
"""2**32 by the golden ratio, as int32: its multiples are far apart."""


@dataclass(frozen=True)
class Update:
    """What is added to a weight of P rows: left (P, Q) as it is, or left (P, R) @ right (R, Q)."""

    left: Tensor
    right: Tensor | None = None

    def rows(self, rows: slice) -> Tensor:
        """Some of its rows, (p, Q)."""
        left = self.left[rows]
        return left if self.right is None else left @ self.right


def sum_dtype(weight: Tensor, update: Update) -> torch.dtype:
    """The type that a weight and its update are added in: float32 at least."""
    wide = torch.promote_types(torch.float32, weight.dtype)
    return torch.promote_types(wide, update.left.dtype)


@torch.no_grad()
def add_rounded(
    weight: Tensor,
    update: Update,
    out: Tensor,
    *,
    scale: float,
    rounding: Rounding = Rounding.nearest,
) -> None:
    """Writes round(weight + scale * update), summed in `sum_dtype`, on the device of `out`.

    Args:
        weight: (P, ...), Q entries in each row; on any device, like the update.
        update: of P rows.
        out: as the weight, which it may not overlap.
        scale: factor of the update.
        rounding: stochastic has an effect on bfloat16 alone.
    """
    dtype, device = sum_dtype(weight, update), out.device
    is_stochastic = rounding is Rounding.stochastic and out.dtype is torch.bfloat16
    right = update.right
    if right is not None:
        right = right.to(device, dtype, non_blocking=True)
    if out.dtype is dtype and out.is_contiguous():  # nothing to round, and no block is needed
        out.copy_(weight, non_blocking=True)
        _add_to(out.view(len(out), -1), update.left.to(device, dtype), right, scale)
        return
    # Kernels of a GPU mix dtypes at no cost.
    is_here = weight.device == device and device.type == "cuda"
    if is_here and not is_stochastic and right is None:
        torch.add(weight, update.left.view_as(weight), alpha=scale, out=out)
        return
    width = weight[:1].numel()
    size = _block_rows(len(weight), width * dtype.itemsize, device, update)
    flat = torch.empty(size, width, dtype=dtype, device=device)
    shaped = flat.view(size, *weight.shape[1:])
    # As few calls as can be: each of them takes the interpreter, which all workers share.
    tensors = (weight, update.left, out)
    parts = zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
    for number, (pristine, left, target) in enumerate(parts):
        if len(target) < size:  # the last one
            flat, shaped = flat[: len(target)], shaped[: len(target)]
        if pristine.device != device:
            pristine = pristine.to(device, non_blocking=True)
        if left.device != device or left.dtype is not dtype:
            left = left.to(device, dtype, non_blocking=True)
        if is_here and not is_stochastic and right is not None:
            torch.mm(left, right, out=flat)
            torch.add(pristine, shaped, alpha=scale, out=target)
            continue
        shaped.copy_(pristine)
        _add_to(flat, left, right, scale)
        if is_stochastic:
            target.copy_(round_stochastically(flat, first=number * size).view(target.shape))
        else:
            target.copy_(shaped)


def _add_to(total: Tensor, left: Tensor, right: Tensor | None, scale: float) -> None:
    if right is None:
        total.add_(left, alpha=scale)
    else:
        total.addmm_(left, right, alpha=scale)


def _block_rows(num_rows: int, row_bytes: int, device: torch.device, update: Update) -> int:
    """Rows of every block but for the last, which may have fewer."""
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    # Every block reads the right factor once: it should be no larger than the block itself.
    rank = 0 if update.right is None else len(update.right)
    return min(num_rows, max(1, rank, block_bytes // row_bytes))


def round_stochastically(exact: Tensor, *, first: int = 0) -> Tensor:
    """Rounds to bfloat16's values, up or down with probabilities that make the mean exact.

    bfloat16 is the upper half of float32: adding 16 random bits below it and cutting them off
    carries with just the right probability. The bits are a hash of an entry's place and of the sum
    of its row, so that a resumed run rounds alike without a generator to save, in blocks of any
    size, and a GPU does not wait for a seed.

    Args:
        exact: (P, ...), rows of a weight.
        first: which of its rows the first one is.

    Returns:
        float32 tensor whose values bfloat16 can hold.
    """
    bits = exact.float().contiguous().view(torch.int32).view(len(exact), -1)
    rows = torch.arange(first, first + len(bits), dtype=torch.int32, device=bits.device)
    sums = bits.sum(dim=1, dtype=torch.int64).to(torch.int32)  # of integers: exact in any order
    seeds = _mix(_mix(rows.mul_(GOLDEN)).add_(sums))  # (P,)
    places = torch.arange(bits.shape[1], dtype=torch.int32, device=bits.device)
    noise = _mix(places.mul_(GOLDEN) + seeds[:, None])  # (P, ...)
    noise.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    return noise.add_(bits).bitwise_and_(-65536).view(torch.float32).view(exact.shape)


def _mix(values: Tensor) -> Tensor:
    """MurmurHash3's finalizer but for its last shift, in place: int32 that look random."""
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        values.bitwise_xor_(values >> shift).mul_(factor)
    return values
