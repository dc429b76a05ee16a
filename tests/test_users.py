"""Users of a task: who they are, whose rows are whose, and what becomes of rows of others."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cola.batches import BatchStream, evaluation_batches, place_rows
from cola.config.choices import AdapterKind, OtherUsers
from cola.config.schema import ExperimentConfig, UserAdapterConfig
from cola.errors import ConfigError, DataError
from cola.experiment import build_base_and_task
from cola.row_views import pick_rows
from cola.synthetic_language import CATEGORY_OPENINGS
from cola.task_data import Example, Split, TaskData, TensorRows
from cola.tasks.collate import TextCollator, collate_images
from cola.tasks.image_rows import ImageRows, crop_and_flip
from cola.tasks.rows import EncodedRows, build_table
from cola.user_rows import UserRows, user_folder
from cola.users import assign_users
from tests.configs import changed
from tests.models import image_problem, text_problem
from tests.runs import config_of, small_synthetic

CPU = torch.device("cpu")
OWNING = ("alone", "collaboration")
DROP = OtherUsers.drop
CATEGORIES = tuple(CATEGORY_OPENINGS)


def rows_of(users: str | Sequence[str | None]) -> list[Example]:
    """One row for each letter; `input_ids` hold the row's number."""
    rows: list[Example] = []
    for number, user in enumerate(users):
        row = {"input_ids": torch.tensor([number]), "label": number % 2}
        rows.append(row if user == "-" else row | {"user": user})
    return rows


def task_of(
    train: Any, selection: Any = "a", report: Any = "a", *extra: Any, **settings: Any
) -> TaskData:
    """Rows of one-letter users in every split; `-` is a row without a user."""
    splits = [
        Split(name=name, rows=rows_of(users))
        for name, users in zip(
            ("train", "validation", "test", "mismatched"),
            (train, selection, report, *extra),
            strict=False,
        )
    ]
    return TaskData(
        name="letters",
        problem=text_problem(),
        train=splits[0],
        selection=splits[1],
        report=splits[2],
        extra_report=splits[3:],
        collate=TextCollator(pad_id=0, pad_type_id=0, length=None, label_dtype=torch.long),
        score=lambda **_: {},
        **settings,
    )


def config_with(mode: str, *overrides: str, **users: Any) -> ExperimentConfig:
    settings = {"merge.mode=merged"} if mode == "collaboration" else set()
    config = changed(f"users.name={mode}", *settings, *overrides)
    return dataclasses.replace(config, users=dataclasses.replace(config.users, **users))


def assigned(task: TaskData, mode: str = "alone", *overrides: str, **users: Any) -> TaskData:
    return assign_users(task, config_with(mode, *overrides, **users))


def owners_of(task: TaskData) -> list[list[int]]:
    found = []
    for split in (task.train, task.selection, task.report, *task.extra_report):
        assert split.owners is not None
        assert len(split.owners) == len(split.rows)
        found.append(split.owners.tolist())
    return found


def numbers_of(split: Split) -> list[int]:
    return [int(row["input_ids"][0]) for row in split.rows]


# Whose rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "groups"), [("joint", False), ("alone", True)])
def test_rows_go_to_the_users_that_the_data_names(mode, groups):
    task = assigned(task_of("baba", "ab", "b", "aab"), mode)
    assert task.users == ("a", "b")
    assert owners_of(task) == [[1, 0, 1, 0], [0, 1], [1], [0, 0, 1]]
    assert task.groups_users is groups
    assert [user.name for user in task.user_settings] == (["a", "b"] if groups else [])


def test_one_user_scores_others_apart_and_keeps_all_rows():
    task = assigned(task_of("bab", "c", "a"), "one")
    assert task.users == ("a", "b", "c")  # c is somebody who is only scored
    assert owners_of(task) == [[1, 0, 1], [2], [0]]
    assert not task.groups_users


def test_one_user_needs_no_names_of_others():
    for train in ("---", "-ab"):
        task = assigned(task_of(train, "b", "a", users=("a", "b")), "one")
        assert task.users == ()
        assert (task.train.owners, task.report.owners) == (None, None)


@pytest.mark.parametrize(("selection", "told"), [("a-", "1 of 2"), ("--", "2 of 2")])
def test_row_that_names_nobody_is_refused_where_others_name_somebody(selection, told):
    message = rf"letters \(validation\): {told} rows name no user; give them one, or set users.col"
    with pytest.raises(DataError, match=message):
        assigned(task_of("ab", selection, "a"), "joint")


def test_column_of_a_large_set_makes_no_row(monkeypatch):
    rows = EncodedRows(build_table([({"input_ids": [1]}, 0)] * 3), {"user": ["b", "a", "b"]})
    monkeypatch.setattr(EncodedRows, "_row", lambda *_: pytest.fail("a row was made"))
    split = Split(name="train", rows=rows)
    task = dataclasses.replace(task_of(""), train=split, selection=split, report=split)
    assert owners_of(assigned(task)) == [[0, 1, 0]] * 3
    assert numbers(assigned(task, names=["b"], others=DROP)) == [2, 2, 2]


def numbers(task: TaskData) -> list[int]:
    return [len(split.rows) for split in (task.train, task.selection, task.report)]


# Who and in which order --------------------------------------------------------------------------


def test_order_is_the_sets_own_then_the_largest_then_the_name():
    assert assigned(task_of("abbccd"), "joint").users == ("b", "c", "a", "d")
    own = task_of("abbccd", users=("d", "x", "a"))
    assert assigned(own, "joint").users == ("d", "a", "b", "c")


def test_names_are_the_order():
    task = assigned(task_of("abc", "a", "c"), names=["c", "a", "b"])
    assert task.users == ("c", "a", "b")
    assert owners_of(task) == [[1, 2, 0], [1], [0]]


def test_number_picks_the_largest_in_the_sets_order():
    task = task_of("abbccc", "c", "b", users=("a", "b", "c"))
    assert assigned(task, num=2, others=DROP).users == ("b", "c")
    assert assigned(task, num=3).users == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"users.num=4: letters \(train\) has rows of 3 users; l"):
        assigned(task, num=4)


def test_users_of_one_cohort_are_neighbours_and_settings_follow():
    adapters = [UserAdapterConfig(user="b", kind=AdapterKind.linear)]
    task = assigned(task_of("abc", "ab", "bc"), adapters=adapters, names=["a", "b", "c"])
    assert task.users == ("a", "c", "b")
    assert [user.kind.name for user in task.user_settings] == ["lowrank", "lowrank", "linear"]
    assert owners_of(task) == [[0, 2, 1], [0, 2], [2, 1]]
    # One set of adapters for all has no cohorts.
    assert assigned(task_of("abc"), "joint", names=["a", "b", "c"]).users == ("a", "b", "c")


@pytest.mark.parametrize("mode", ["joint", *OWNING])
def test_named_user_without_training_rows_is_refused(mode):
    message = (
        r"users.names: bo has no row in letters \(train\); nearest: bob; users there: bob, ann$"
    )
    task = task_of(["bob", "bob", "ann"], ["bo"], ["ann"])
    with pytest.raises(DataError, match=message):
        assigned(task, mode, names=["ann", "bo"])


def test_settings_of_a_user_that_does_not_exist_are_refused():
    adapters = [UserAdapterConfig(user="x", alpha=2.0)]
    with pytest.raises(ConfigError, match=r"users.adapters: no user 'x'"):
        assigned(task_of("ab"), adapters=adapters)


def test_name_that_no_folder_can_have_is_refused():
    assert user_folder("a/b ü") == "a%2Fb %C3%BC"
    message = r"user a{40}\.\.\. has too long a name for the folder of their adapters \(255 bytes\)"
    with pytest.raises(DataError, match=message):
        assigned(task_of(["a" * 256], ["a" * 256], ["a" * 256]))
    assert assigned(task_of(["a" * 256], ["a" * 256], ["a" * 256]), "joint").users == ("a" * 256,)


# Rows of others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", *OWNING])
def test_rows_of_others_are_refused(mode):
    message = (
        "letters has rows of 2 users that the run does not have or that have none to train on: "
        r"an, c; nearest: ann; set users.others=drop to leave their rows out"
    )
    with pytest.raises(DataError, match=message):
        assigned(task_of(["ann", "an"], ["c"], ["ann"]), mode, names=["ann"])


@pytest.mark.parametrize("split", [1, 2, 3])
def test_user_who_is_scored_but_not_trained_on_is_an_other(split):
    parts = ["ab", "a", "a", "a"]
    parts[split] = "ac"
    with pytest.raises(DataError, match="1 users that the run does not have or that have none to"):
        assigned(task_of(*parts))
    assert owners_of(assigned(task_of(*parts), others=DROP))[split] == [0]


def test_rows_of_others_are_dropped_from_every_split_and_counted(caplog):
    with caplog.at_level(logging.INFO):
        task = assigned(task_of("abcab", "ca", "bb", "acb"), names=["b", "a"], others=DROP)
    assert owners_of(task) == [[1, 0, 1, 0], [1], [0, 0], [1, 0]]
    parts = (task.train, task.selection, task.report, *task.extra_report)
    assert [numbers_of(split) for split in parts] == [[0, 1, 3, 4], [1], [0, 1], [0, 2]]
    assert caplog.messages == [
        "users.others=drop leaves out 1 users (c): 1 of 5 rows of train, 1 of 2 rows of "
        "validation, 0 of 2 rows of test, 1 of 3 rows of mismatched"
    ]


def test_split_of_others_alone_is_refused():
    message = r"letters \(test\): none of the 2 rows is of a user of the run"
    with pytest.raises(DataError, match=message):
        assigned(task_of("ab", "a", "bb"), names=["a"], others=DROP)


# Shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", *OWNING])
def test_set_that_names_nobody_is_dealt_in_equal_parts(mode):
    task = assigned(task_of("-" * 31, "-" * 12, "-" * 11, "-" * 2), mode, num=3)
    assert task.users == ("user1", "user2", "user3")
    counts = [torch.bincount(torch.tensor(own), minlength=3).tolist() for own in owners_of(task)]
    assert counts == [[11, 10, 10], [4, 4, 4], [4, 4, 3], [1, 1, 0]]
    assert owners_of(task)[0] != sorted(owners_of(task)[0])
    assert owners_of(task)[0][:3] * 10 != owners_of(task)[0][:30]  # at random, not in turn
    assert owners_of(task)[1] != owners_of(task)[0][:12]


def test_shards_follow_the_split_seed_alone():
    task = task_of("-" * 40, "--", "--")
    dealt = [
        owners_of(assigned(task, "alone", f"seed={seed}", f"split_seed={split}", num=4))
        for seed, split in ((0, 0), (1, 0), (0, 1))
    ]
    assert dealt[0] == dealt[1] != dealt[2]


def test_shards_take_names():
    assert assigned(task_of("----", "-", "-"), names=["x", "y"]).users == ("x", "y")
    with pytest.raises(ConfigError, match=r"users.num=3, but users.names has 2; leave users.num"):
        assigned(task_of("----", "-", "-"), names=["x", "y"], num=3)


@pytest.mark.parametrize("mode", ["joint", *OWNING])
def test_set_that_names_nobody_needs_a_number(mode):
    message = f"users={mode}: rows of letters name no user; set users.num=K .* or users.column"
    with pytest.raises(ConfigError, match=message):
        assigned(task_of("--", "-", "-"), mode)


def test_more_shards_than_rows_are_refused():
    with pytest.raises(DataError, match=r"letters \(train\): 2 rows cannot be dealt to 3 users"):
        assigned(task_of("--", "-", "-"), num=3)


# Bad users ---------------------------------------------------------------------------------------


def test_bad_user_is_left_out_and_nobody_else_changes():
    settings = {"names": ["a", "b", "c", "d"], "kinds": ["lowrank-linear"]}
    settings["adapters"] = [UserAdapterConfig(user="b", alpha=3.0)]
    task = assigned(task_of("acd", "a", "d", bad_users=("b",)), **settings)
    assert task.users == ("a", "c", "d")
    # With three users c would be of the first part.
    assert [user.kind.name for user in task.user_settings] == ["lowrank", "linear", "linear"]


def test_bad_user_keeps_its_place_in_the_sets_order():
    task = task_of("acd", "a", "d", bad_users=("b",), users=("a", "b", "c", "d"))
    kinds = [user.kind.name for user in assigned(task, kinds=["lowrank-linear"]).user_settings]
    assert kinds == ["lowrank", "linear", "linear"]


def test_bad_users_count_among_the_number():
    task = task_of("aaccd", "a", "a", bad_users=("b",))
    assert assigned(task, num=4).users == ("a", "c", "d")
    assert assigned(task, num=2, others=DROP).users == ("a", "c")
    task = dataclasses.replace(task, users=("a", "b", "c", "d"))
    kinds = assigned(task, num=4, kinds=["lowrank-linear"]).user_settings
    assert [user.kind.name for user in kinds] == ["lowrank", "linear", "linear"]


# Views -------------------------------------------------------------------------------------------


def images(num: int) -> ImageRows:
    return ImageRows(torch.arange(4.0 * num).view(num, 1, 2, 2), torch.arange(num))


def test_picked_rows_are_a_view_with_owners():
    split = Split(name="test", rows=rows_of("abcd"), owners=torch.tensor([3, 2, 1, 0]))
    picked = pick_rows(split, torch.tensor([3, 1]))
    assert (picked.name, len(picked.rows), numbers_of(picked)) == ("test", 2, [3, 1])
    assert picked.owners is not None
    assert picked.owners.tolist() == [0, 2]
    assert picked.rows[-1] is split.rows[1]
    assert picked.rows[1:] == [split.rows[1]]
    with pytest.raises(IndexError):
        picked.rows[2]


def test_picked_images_are_gathered_and_moved():
    rows = pick_rows(Split(name="test", rows=images(5)), torch.tensor([4, 0, 2])).rows
    assert isinstance(rows, TensorRows)
    batch = rows.fetch(torch.tensor([2, 0]))
    assert batch.labels.tolist() == [2, 4]
    assert batch.inputs["pixels"][0].flatten().tolist() == [8, 9, 10, 11]
    assert [row["label"] for row in rows] == [4, 0, 2]
    assert [row["label"] for row in rows[1:]] == [0, 2]
    assert (rows.device, rows.num_bytes) == (CPU, images(5).num_bytes)
    moved = rows.to(torch.device("meta"))
    assert isinstance(moved, TensorRows)
    assert moved.device.type == "meta"
    assert len(moved) == 3


# Batches -----------------------------------------------------------------------------------------

LETTERS = "cabcabbacaccbabcabbac"  # 21 rows


def stream_of(task: TaskData, batch_size: int = 6) -> BatchStream:
    return BatchStream(task, batch_size=batch_size, seed=3, device=CPU)


def ids(batch: Any) -> list[int]:
    return [int(number) for number in batch.inputs["input_ids"][:, 0]]


def test_batches_lie_user_by_user_and_have_the_rows_they_would_have_anyway():
    grouped, plain = (assigned(task_of(LETTERS), mode) for mode in ("alone", "joint"))
    pairs = zip(stream_of(grouped).batches(1, 9), stream_of(plain).batches(1, 9), strict=True)
    owners = grouped.train.owners
    assert owners is not None
    for (_, batch), (_, wanted) in pairs:
        assert wanted.rows is None
        by_user = sorted(ids(wanted), key=lambda number: owners[number])  # stable
        assert ids(batch) == by_user
        assert batch.rows == UserRows.of([int(owners[number]) for number in by_user])
        assert batch.labels.tolist() == [number % 2 for number in by_user]


def test_stream_may_start_anywhere():
    task = assigned(task_of(LETTERS))
    whole = [ids(batch) for _, batch in stream_of(task).batches(1, 9)]
    assert [ids(batch) for _, batch in stream_of(task).batches(3, 9)] == whole[2:]


@pytest.mark.parametrize("mode", ["joint", "alone"])
def test_evaluation_batches_say_which_rows_they_have(mode):
    task = assigned(task_of(LETTERS, LETTERS, LETTERS), mode)
    found = list(evaluation_batches(task.report, task, batch_size=8, device=CPU))
    assert [sorted(indices.tolist()) for indices, _ in found] == [
        [*range(8)], [*range(8, 16)], [*range(16, 21)],
    ]  # fmt: skip
    assert all(indices.tolist() == ids(batch) for indices, batch in found)
    assert (found[0][0].tolist() == [*range(8)]) is (mode == "joint")


def test_images_of_users_are_gathered_user_by_user_and_keep_their_users_when_changed():
    rows = ImageRows(torch.randn(6, 1, 8, 8), torch.arange(6))
    split = Split(name="train", rows=rows)
    task = TaskData(
        name="images", problem=image_problem(1, 8, 8), train=split, selection=split, report=split,
        collate=collate_images, score=lambda **_: {}, augment=crop_and_flip,
    )  # fmt: skip
    task = assigned(task, num=2)
    owners = task.train.owners
    assert owners is not None
    for _, batch in stream_of(task, 4).batches(1, 2):
        assert batch.rows is not None
        assert batch.row_terms is not None
        assert batch.rows == UserRows.of([int(owners[label]) for label in batch.labels])
        assert batch.row_terms.tolist() == [1] * batch.num_terms


def test_owners_stay_when_rows_move_to_a_gpu(monkeypatch):
    split = Split(name="train", rows=images(4), owners=torch.tensor([0, 1, 1, 0]))
    task = TaskData(
        name="images", problem=image_problem(1, 2, 2), train=split, selection=split, report=split,
        collate=collate_images, score=lambda **_: {},
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(ImageRows, "to", lambda rows, device: rows)
    placed = place_rows(task, torch.device("cuda:0"))
    assert placed is not task
    assert placed.train.owners is split.owners


# The whole way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["one", "joint", "alone"])
def test_run_knows_its_users(mode):
    with small_synthetic():
        _, task = build_base_and_task(config_of("task=synthetic", f"users={mode}"))
    assert task.users == CATEGORIES
    assert task.groups_users is (mode == "alone")
    _, batch = next(stream_of(task, 8).batches(1, 1))
    assert (batch.rows is not None) is (mode == "alone")
