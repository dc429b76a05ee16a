"""Sums of weights and updates: block by block, without large temporaries, rounded once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cola.config.choices import Rounding
from cola.rounded_sums import Update, add_rounded, round_stochastically, sum_dtype
from tests.tolerances import EXACT

ROWS, WIDTH, RANK = 50, 40, 3


def weight_and_updates(dtype: torch.dtype) -> tuple[Tensor, dict[str, Update]]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(torch.float32, dtype)
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=wide).to(dtype)
    left = torch.randn(ROWS, RANK, generator=generator, dtype=wide)
    right = torch.randn(RANK, WIDTH, generator=generator, dtype=wide)
    return weight, {"whole": Update(left @ right), "factors": Update(left, right)}


def small_blocks(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr("cola.rounded_sums.CPU_BLOCK_BYTES", rows * WIDTH * dtype.itemsize)


@pytest.mark.parametrize("form", ["whole", "factors"])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["in blocks", "at once"])
def test_every_row_is_summed_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, form: str
) -> None:
    """Updates are float64: a float32 weight has something to round, a float64 one has not."""
    weight, updates = weight_and_updates(torch.float64)
    small_blocks(monkeypatch, rows, torch.float64)
    pristine = weight.to(dtype)
    out = torch.full_like(pristine, torch.nan)
    add_rounded(pristine, updates[form], out, scale=0.7)
    wanted = (pristine.double() + 0.7 * updates["whole"].left).to(dtype)
    tolerance = EXACT if dtype is torch.float64 else 1.2e-7  # one unit in the last place
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(ROWS, 8, 1, 5), (ROWS, 40)], ids=str)
def test_weights_keep_their_form_and_memory_layout(shape: tuple[int, ...]) -> None:
    weight, updates = weight_and_updates(torch.float32)
    shaped = weight.view(shape)
    if len(shape) == 4:
        shaped = shaped.to(memory_format=torch.channels_last)
    out = torch.empty_like(shaped)
    add_rounded(shaped, updates["whole"], out, scale=1.0)
    assert torch.equal(out.reshape(ROWS, WIDTH), weight + updates["whole"].left)


@pytest.mark.parametrize("form", ["whole", "factors"])
def test_updates_as_narrow_as_the_weight_are_summed_in_float32(form: str) -> None:
    """Factors that were published in the base model's type."""
    weight, updates = weight_and_updates(torch.bfloat16)
    update = updates[form]
    right = None if update.right is None else update.right.bfloat16()
    narrow = Update(update.left.bfloat16(), right)
    out = torch.empty_like(weight)
    add_rounded(weight, narrow, out, scale=0.7)
    exact = narrow.left.double() if right is None else narrow.left.double() @ right.double()
    wanted = (weight.double() + 0.7 * exact).float().bfloat16()
    assert (out == wanted).float().mean() > 0.99  # sums between two values may fall on either side
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-6)


def test_the_sum_is_float32_at_least() -> None:
    whole = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert sum_dtype(whole, Update(whole)) is torch.float32
    assert sum_dtype(whole, Update(whole.double())) is torch.float64
    assert sum_dtype(whole.double(), Update(whole)) is torch.float64


class LargestResult(TorchDispatchMode):
    """Entries of the largest tensor with memory of its own that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            given = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
            if storage.data_ptr() not in given:
                self.num = max(self.num, storage.nbytes() // result.itemsize)
        return result


@pytest.mark.parametrize("rounding", list(Rounding), ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("form", ["whole", "factors"])
def test_no_temporary_is_larger_than_a_block(
    monkeypatch: pytest.MonkeyPatch, form: str, rounding: Rounding
) -> None:
    weight, updates = weight_and_updates(torch.bfloat16)
    small_blocks(monkeypatch, 4, torch.float32)
    out = torch.empty_like(weight)
    with LargestResult() as largest:
        add_rounded(weight, updates[form], out, scale=0.7, rounding=rounding)
    assert 0 < largest.num <= max(4 * WIDTH, RANK * WIDTH)


def test_a_block_is_no_smaller_than_the_factor_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, updates = weight_and_updates(torch.bfloat16)
    small_blocks(monkeypatch, 1, torch.bfloat16)
    out = torch.empty_like(weight)
    with LargestResult() as largest:
        add_rounded(weight, updates["factors"], out, scale=0.7)
    assert largest.num == RANK * WIDTH


@pytest.mark.parametrize("where", [0.25, 0.5, 0.9])
def test_stochastic_rounding_goes_up_as_often_as_it_should(where: float) -> None:
    exact = torch.full((400, 500), 1.5 + where * 2**-7)
    rounded = round_stochastically(exact)
    assert set(rounded.unique().tolist()) == {1.5, 1.5 + 2**-7}
    up = (rounded > 1.5).float()
    spread = (where * (1 - where) / exact.numel()) ** 0.5
    assert abs(up.mean().item() - where) < 4 * spread
    # Neighbours decide on their own.
    for axis in (0, 1):
        both = (up * up.roll(1, axis)).mean().item()
        assert abs(both - where**2) < 8 * spread


def test_stochastic_rounding_is_the_same_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A host with more threads has larger ones (and may multiply factors in another order)."""
    weight, updates = weight_and_updates(torch.bfloat16)
    found = []
    for rows in (RANK, 7, ROWS):
        small_blocks(monkeypatch, rows, torch.float32)
        out = torch.empty_like(weight)
        rounding = Rounding.stochastic
        add_rounded(weight, updates["whole"], out, scale=0.7, rounding=rounding)
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_stochastic_rounding_differs_between_rows_and_from_step_to_step() -> None:
    exact = torch.full((3, 5000), 1.5 + 0.5 * 2**-7)
    exact[2, 0] += 2**-7
    rounded = round_stochastically(exact)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        share = (rounded[one, 1:] == rounded[other, 1:]).float().mean().item()
        assert abs(share - 0.5) < 0.03
    later = exact.clone()
    later[0, 0] += 2**-8
    again = round_stochastically(later)
    assert torch.equal(again[1:], rounded[1:])
    assert abs((again[0, 1:] == rounded[0, 1:]).float().mean().item() - 0.5) < 0.03


def test_stochastic_rounding_keeps_what_needs_none_and_signs() -> None:
    exact = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(round_stochastically(exact), exact)
    assert torch.equal(round_stochastically(torch.zeros(3, 4)), torch.zeros(3, 4))
    towards = round_stochastically(torch.full((200, 200), -1.5 - 0.3 * 2**-7))
    assert (towards < -1.5).float().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_stochastic_rounding_does_not_depend_on_threads(num_threads: int) -> None:
    exact = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    wanted = round_stochastically(exact)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(round_stochastically(exact), wanted)
    finally:
        torch.set_num_threads(before)
