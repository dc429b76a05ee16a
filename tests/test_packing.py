"""Tensors in one memory: what is copied as a whole comes out as it was."""

import pytest
import torch
from torch import Tensor

from cola.packing import ALIGNMENT, COPIED_ALONE_BYTES, pack, packed_memory, unpack

SHAPES = [(2, 3, 5), (7,), (4, 256), (1, 1)]


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [*made, made[0].transpose(0, 2)]  # not contiguous


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(torch.equal(a, b) and a.dtype is b.dtype for a, b in pairs)


@pytest.mark.parametrize("alone", [0, 600, COPIED_ALONE_BYTES], ids=["all", "one", "none"])
def test_packed_tensors_are_copies_in_one_aligned_memory(
    monkeypatch: pytest.MonkeyPatch, alone: int
) -> None:
    monkeypatch.setattr("cola.packing.COPIED_ALONE_BYTES", alone)
    given = tensors(torch.bfloat16)
    packed = pack(given)
    assert same(packed, given)
    assert len({tensor.untyped_storage().data_ptr() for tensor in packed}) == 1
    assert all(t.storage_offset() * t.element_size() % ALIGNMENT == 0 for t in packed)
    given[0].zero_()
    assert packed[0].any(), "a copy"


def test_tensors_of_several_dtypes_are_copied_one_by_one() -> None:
    given = [*tensors(), *tensors(torch.float64)]
    packed = pack(given)
    assert same(packed, given)
    assert packed_memory(packed) is None


def test_rows_of_some_tensors_are_packed_with_all_of_others() -> None:
    given = tensors(torch.bfloat16)
    rows = [torch.tensor([4, 1]), None, torch.tensor([0]), None, torch.tensor([9, 0, 3])]
    packed = pack(given, rows)
    flat = [x.reshape(-1, x.shape[-1]) for x in given]
    wanted = [
        x if own is None else rows_of[own]
        for x, rows_of, own in zip(given, flat, rows, strict=True)
    ]
    assert same(packed, wanted)
    assert packed_memory(packed) is not None
    assert all(t.storage_offset() * t.element_size() % ALIGNMENT == 0 for t in packed)


def test_rows_of_tensors_of_several_dtypes_are_copied_one_by_one() -> None:
    given = [torch.rand(2, 3, 5), torch.rand(6, 4, dtype=torch.float64)]
    packed = pack(given, [torch.tensor([5, 0]), torch.tensor([1])])
    assert same(packed, [given[0].flatten(0, 1)[[5, 0]], given[1][[1]]])


def test_a_copy_of_the_whole_holds_every_part() -> None:
    given = tensors()
    for part in (slice(None), slice(1, 3), slice(2, None)):
        packed = pack(given)[part]
        memory = packed_memory(packed)
        assert memory is not None
        assert memory.dim() == 1
        found = unpack(memory.clone(), packed)
        assert same(found, given[part])
        assert found[0].untyped_storage().data_ptr() != packed[0].untyped_storage().data_ptr()


def test_rows_of_packed_tensors_still_lie_together() -> None:
    packed = [tensor.flatten(0, -2) for tensor in pack([torch.rand(2, 3, 5), torch.rand(2, 3, 4)])]
    memory = packed_memory(packed)
    assert memory is not None
    assert same(unpack(memory.clone(), packed), packed)


def test_what_lies_apart_or_in_another_order_is_not_one_memory() -> None:
    packed = pack(tensors())
    assert packed_memory(packed[:1]) is None, "nothing to gain"
    assert packed_memory([packed[0], packed[2]]) is None, "what is between is not to be sent"
    assert packed_memory(packed[::-1]) is None
    assert packed_memory([packed[0], packed[1].clone()]) is None
    assert packed_memory([packed[0], packed[1], packed[1]]) is None
    assert packed_memory([packed[2], packed[3], packed[4].transpose(0, 1)]) is None
    assert pack([]) == []
