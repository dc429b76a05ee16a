"""Which rows a set trains on, selects by and reports on."""

import pytest
import torch

from cola.errors import DataError
from cola.tasks.splits import NamedRows, Splits, choose_splits, first_rows, hold_out

TRAIN = list(range(100))
VALIDATION = list(range(100, 110))
TEST = list(range(110, 130))


def choose(*names: str, seed: int = 0, **limits: int) -> Splits[int]:
    parts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    return choose_splits({name: parts[name] for name in names}, name="samsum", seed=seed, **limits)


def names(splits: Splits[int]) -> tuple[str, str, str]:
    return splits.train.name, splits.selection.name, splits.report.name


def sizes(splits: Splits[int]) -> tuple[int, int, int]:
    return len(splits.train.rows), len(splits.selection.rows), len(splits.report.rows)


@pytest.mark.parametrize(
    "order", [("train", "validation", "test"), ("test", "validation", "train")]
)
def test_validation_selects_and_test_is_reported_on(order: tuple[str, ...]) -> None:
    splits = choose(*order)
    assert names(splits) == ("train", "validation", "test")
    assert (splits.train.rows, splits.selection.rows) == (TRAIN, VALIDATION)
    assert splits.report.rows == TEST


@pytest.mark.parametrize(("split", "rows"), [("validation", VALIDATION), ("test", TEST)])
def test_one_scored_split_is_reported_on_and_train_selects(split: str, rows: list[int]) -> None:
    splits = choose("train", split)
    assert names(splits) == ("train", "5 % of train", split)
    assert splits.report.rows == rows
    assert sorted([*splits.train.rows, *splits.selection.rows]) == TRAIN
    assert len(splits.selection.rows) == 5


def test_train_alone_gives_all_three() -> None:
    splits = choose("train")
    assert names(splits) == ("train", "5 % of the other 90 % of train", "10 % of train")
    assert sizes(splits) == (86, 4, 10)
    every = [*splits.train.rows, *splits.selection.rows, *splits.report.rows]
    assert sorted(every) == TRAIN


def test_hold_outs_follow_their_seed_alone() -> None:
    torch.manual_seed(0)
    first = choose("train")
    torch.manual_seed(1)
    assert choose("train") == first
    other = choose("train", seed=1)
    assert other.report.rows != first.report.rows
    assert other.selection.rows != first.selection.rows


def test_what_is_reported_on_does_not_depend_on_how_much_is_learned_from() -> None:
    limited = choose("train", max_train_rows=20)
    assert limited.report == choose("train").report
    assert sizes(limited) == (19, 1, 10)
    assert limited.selection.name == "5 % of the first 20 rows of the other 90 % of train"
    assert set(limited.train.rows) | set(limited.selection.rows) < set(TRAIN)


def test_limits_keep_the_first_rows_and_names_say_so() -> None:
    splits = choose("train", "validation", "test", max_train_rows=7, max_eval_rows=10)
    assert splits.train.rows == TRAIN[:7]
    assert names(splits) == ("train", "validation", "first 10 of test")
    assert splits.report.rows == TEST[:10]


def test_first_rows_of_a_short_split_is_that_split() -> None:
    split = NamedRows(name="test", rows=[1, 2])
    assert first_rows(split, 2) is split
    assert first_rows(split, None) is split


def test_set_without_train_is_refused() -> None:
    with pytest.raises(DataError, match="samsum has no train split, only validation, test"):
        choose("validation", "test")
    with pytest.raises(DataError, match="samsum has no train split, only none at all"):
        choose()


@pytest.mark.parametrize("empty", ["train", "validation", "test"])
def test_empty_split_is_refused(empty: str) -> None:
    parts = {"train": [1, 2], "validation": [3], "test": [4]} | {empty: []}
    with pytest.raises(DataError, match=f"dart: split {empty} is empty"):
        choose_splits(parts, name="dart", seed=0)


def test_map_changes_every_row_and_keeps_names() -> None:
    splits = choose("train", "validation", "test")
    doubled = splits.map(lambda row: 2 * row)
    assert names(doubled) == names(splits)
    assert doubled.report.rows == [2 * row for row in TEST]


def test_hold_out_partitions_rows_in_order() -> None:
    kept, held = hold_out(range(100), seed=0)
    assert len(held) == 5
    assert sorted(kept + held) == list(range(100))
    assert kept == sorted(kept)
    assert held == sorted(held)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0])
def test_hold_out_leaves_a_row_on_either_side(fraction: float) -> None:
    kept, held = hold_out([1, 2], fraction=fraction, seed=0)
    assert (len(kept), len(held)) == (1, 1)


def test_hold_out_of_one_row_fails() -> None:
    with pytest.raises(DataError, match=r"1 rows cannot be divided.*max_train_rows"):
        hold_out([1], seed=0)
