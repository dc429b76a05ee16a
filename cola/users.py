"""Whose rows: every row of a task gets the position of its user in the run's order of users.

Users come from what the data says (a row's `user`), or are shards of a set that names nobody.
Paper, Section 3.3 and Table 4; `cola.batches` then lays the rows of a batch user by user.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from cola.config.choices import OtherUsers, UsersMode
from cola.config.keys import nearest_words
from cola.config.schema import ExperimentConfig, UsersConfig
from cola.config.user_settings import UserSettings, list_names, resolve_users
from cola.errors import DataError
from cola.row_views import pick_rows
from cola.task_data import Split, TaskData, TensorRows
from cola.user_choice import choose_users, deal_rows, order_users, shard_names
from cola.user_rows import UserId, user_folder

logger = logging.getLogger(__name__)

MAX_FOLDER_BYTES = 255
"""Longest name of a folder that common file systems take."""

Names = Sequence[UserId | None]
"""Users of a split's rows, N of them; None where a row has none."""


@runtime_checkable
class ColumnRows(Protocol):
    """Rows that give a column as a whole."""

    def column(self, name: str) -> Names | None:
        """N values; None where rows have no such column."""


def assign_users(task: TaskData, config: ExperimentConfig) -> TaskData:
    """Says whose every row is, and leaves out rows of users that the run does not have.

    Args:
        task: `users` is the order in which the set knows its users, if it does; rows of `bad_users`
            are gone already.
        config: `users`, and `split_seed`, which deals rows that name nobody.

    Returns:
        The task with owners in every split, `users` in the run's order, and `user_settings` where
        they have adapters of their own. With `users=one` owners only tell scores apart.

    Raises:
        ConfigError: neither the data nor the configuration says who the users are.
        DataError: a user without training rows, or rows of users that the run does not have.
    """
    splits = [task.train, task.selection, task.report, *task.extra_report]
    columns = [_user_column(split) for split in splits]
    if config.users.name is UsersMode.one:
        return _note_owners(task, splits, columns)
    named: list[Names]
    if any(column is not None for column in columns):
        named = [_complete(task, *pair) for pair in zip(splits, columns, strict=True)]
        names = choose_users(task, config.users, _count(named[:1]))
    else:
        names = shard_names(task, config.users)
        named = [deal_rows(split, names, config.split_seed) for split in splits]
    owning = config.users.name.owns_adapters
    settings = _settings(task, config, names) if owning else ()
    order = tuple(user.name for user in settings) if owning else names
    if others := _count(named).keys() - set(order):
        _refuse_or_log(task, config.users, splits, named, others)
    owned = [_owned(*pair, order) for pair in zip(splits, named, strict=True)]
    task = _with_splits(task, [_without_others(split, task) for split in owned])
    return dataclasses.replace(task, users=order, user_settings=settings, groups_users=owning)


# What the data says -------------------------------------------------------------------------------


def _user_column(split: Split) -> Names | None:
    """Users of a split's rows; None where no row has one."""
    rows = split.rows
    if isinstance(rows, TensorRows):
        return None
    if isinstance(rows, ColumnRows):  # at once: a set may have 400,000 rows
        return rows.column("user")
    users = [row.get("user") for row in rows]
    return users if any(users) else None


def _complete(task: TaskData, split: Split, column: Names | None) -> Names:
    """The users of a split where other splits have some."""
    num_unknown = len(split.rows) if column is None else list(column).count(None)
    if num_unknown or column is None:
        raise DataError(
            f"{task.name} ({split.name}): {num_unknown} of {len(split.rows)} rows name no user; "
            "give them one, or set users.column to a column that does"
        )
    return column


def _count(columns: Sequence[Names | None]) -> Counter[UserId]:
    """Rows of every user."""
    return Counter(user for column in columns for user in column or () if user is not None)


def _note_owners(
    task: TaskData, splits: Sequence[Split], columns: Sequence[Names | None]
) -> TaskData:
    """One user trains on all rows; where all of them are somebody's, scores are told apart."""
    if any(column is None or None in column for column in columns):
        return dataclasses.replace(task, users=())
    order = order_users(_count(columns), task)
    owned = [_owned(split, c or (), order) for split, c in zip(splits, columns, strict=True)]
    return dataclasses.replace(_with_splits(task, owned), users=order)


def _settings(
    task: TaskData, config: ExperimentConfig, names: Sequence[UserId]
) -> tuple[UserSettings, ...]:
    """What each user trains, in the run's order, without users whose rows cannot be read."""
    for name in names:
        if len(user_folder(name)) > MAX_FOLDER_BYTES:
            raise DataError(
                f"user {name[:40]}... has too long a name for the folder of their adapters "
                f"({MAX_FOLDER_BYTES} bytes); does users.column name a column of users?"
            )
    users = resolve_users(config, names)
    return tuple(user for user in users if user.name not in task.bad_users)


# Rows of others -----------------------------------------------------------------------------------


def _refuse_or_log(
    task: TaskData,
    users: UsersConfig,
    splits: Sequence[Split],
    columns: Sequence[Names],
    others: set[UserId],
) -> None:
    sizes = _count(columns)
    shown = list_names([user for user in sizes if user in others])
    if users.others is OtherUsers.refuse:
        near = next(filter(None, (nearest_words(u, users.names or ()) for u in sorted(others))), "")
        raise DataError(
            f"{task.name} has rows of {len(others)} users that the run does not have or that have "
            f"none to train on: {shown}; {near}set users.others=drop to leave their rows out, or "
            "change users.names or users.num"
        )
    lost = ", ".join(
        f"{sum(user in others for user in column)} of {len(column)} rows of {split.name}"
        for split, column in zip(splits, columns, strict=True)
    )
    logger.info("users.others=drop leaves out %d users (%s): %s", len(others), shown, lost)


def _owned(split: Split, column: Names, order: Sequence[UserId]) -> Split:
    """The split with the position of each row's user, -1 for those that the run does not have."""
    position: dict[UserId | None, int] = {user: index for index, user in enumerate(order)}
    owners = torch.tensor([position.get(user, -1) for user in column], dtype=torch.long)
    return dataclasses.replace(split, owners=owners)


def _without_others(split: Split, task: TaskData) -> Split:
    assert split.owners is not None
    kept = (split.owners >= 0).nonzero().flatten()
    if len(kept) == len(split.owners):
        return split
    if not len(kept):
        raise DataError(
            f"{task.name} ({split.name}): none of the {len(split.owners)} rows is of a user of "
            "the run; change users.names or users.num, or raise task.max_eval_rows"
        )
    return pick_rows(split, kept)


def _with_splits(task: TaskData, splits: Sequence[Split]) -> TaskData:
    train, selection, report, *extra = splits
    return dataclasses.replace(
        task, train=train, selection=selection, report=report, extra_report=extra
    )
