"""Rows of several users as slices and as tiles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola.user_rows import UserRows

COUNTS = st.dictionaries(st.integers(0, 6), st.integers(1, 9), min_size=1)
CPU = torch.device("cpu")


def rows_of(counts: dict[int, int]) -> UserRows:
    return UserRows.of([user for user in sorted(counts) for _ in range(counts[user])])


@given(COUNTS)
def test_tiles_hold_every_row_once_and_no_row_of_another(counts: dict[int, int]) -> None:
    rows = rows_of(counts)
    tiles = rows.tiles(7, CPU)
    owners = torch.tensor(rows.users).repeat_interleave(torch.tensor(rows.counts))
    values = torch.stack([owners, torch.arange(rows.total)], dim=1)  # (N, 2)
    cut = tiles.cut(values)  # (S, c, 2)
    users = torch.arange(7) if tiles.users is None else tiles.users
    assert torch.equal(cut[..., 0], users[:, None].expand(cut.shape[:2]))
    assert torch.equal(tiles.join(cut), values)


@given(COUNTS)
def test_tiles_are_at_most_twice_the_rows_and_one_per_tile(counts: dict[int, int]) -> None:
    rows = rows_of(counts)
    tiles = rows.tiles(7, CPU)
    num_tiles = len(tiles.cut(torch.zeros(rows.total, 1)))
    assert tiles.size == math.ceil(rows.total / len(rows.users))
    assert num_tiles <= 2 * len(rows.users)
    assert num_tiles * tiles.size <= 2 * rows.total + 2 * num_tiles


@given(COUNTS)
def test_fillers_become_zero_where_asked(counts: dict[int, int]) -> None:
    rows = rows_of(counts)
    tiles = rows.tiles(7, CPU)
    ones = tiles.cut(torch.ones(rows.total, 1), fill=0.0)
    assert ones.sum() == rows.total


@given(COUNTS)
def test_adding_up_tiles_equals_adding_up_rows(counts: dict[int, int]) -> None:
    rows = rows_of(counts)
    tiles = rows.tiles(7, CPU)
    values = torch.arange(rows.total, dtype=torch.float64)[:, None]
    total = tiles.add_up(tiles.cut(values, fill=0.0).sum(dim=1), 7)
    wanted = torch.zeros(7, 1, dtype=torch.float64)
    for user, where in rows.slices():
        wanted[user] = values[where].sum()
    assert torch.equal(total, wanted)


def test_even_rows_are_tiles_without_a_copy() -> None:
    values = torch.randn(6, 4)
    tiles = rows_of({0: 2, 1: 2, 2: 2}).tiles(3, CPU)
    assert tiles.users is None
    assert tiles.cut(values).data_ptr() == values.data_ptr()


@given(COUNTS, st.integers(1, 4))
def test_tokens_belong_to_the_user_of_their_row(counts: dict[int, int], factor: int) -> None:
    rows = rows_of(counts)
    spread = rows.spread(rows.total * factor)
    assert spread is not None
    assert spread.users == rows.users
    assert spread.counts == tuple(count * factor for count in rows.counts)


@pytest.mark.parametrize("num_rows", [5, 7, 0])
def test_a_tensor_that_mixes_rows_has_no_owner(num_rows: int) -> None:
    assert rows_of({0: 2, 1: 1}).spread(num_rows) is None


@given(COUNTS, st.integers(0, 7), st.integers(0, 7))
def test_part_is_the_slice_of_some_users(counts: dict[int, int], one: int, other: int) -> None:
    first, last = sorted((one, other))
    rows = rows_of(counts)
    where, own = rows.part(first, last)
    wanted = {user - first: count for user, count in sorted(counts.items()) if first <= user < last}
    assert dict(zip(own.users, own.counts, strict=True)) == wanted
    before = sum(count for user, count in counts.items() if user < first)
    if wanted:
        assert where == slice(before, before + own.total)
    else:
        assert where.start == where.stop


@given(COUNTS, st.frozensets(st.integers(0, 6)))
def test_without_leaves_the_others_rows(counts: dict[int, int], absent: frozenset[int]) -> None:
    rows = rows_of(counts)
    owners = [user for user, where in rows.slices() for _ in range(where.start, where.stop)]
    indices, own = rows.without(absent)
    assert indices == [i for i, owner in enumerate(owners) if owner not in absent]
    assert own == rows_of({u: c for u, c in counts.items() if u not in absent})


def test_rows_that_are_not_grouped_are_refused() -> None:
    with pytest.raises(AssertionError, match="grouped"):
        UserRows.of([0, 1, 0])
