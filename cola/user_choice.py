"""Which users take part: named, the largest, all, or equal parts of a set that names nobody."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from cola.config.keys import nearest_words
from cola.config.schema import UsersConfig
from cola.config.user_settings import list_names
from cola.errors import ConfigError, DataError
from cola.task_data import Split, TaskData
from cola.user_rows import UserId


def order_users(sizes: Mapping[UserId, int], task: TaskData) -> tuple[UserId, ...]:
    """The set's own order, then the largest first."""
    own = [user for user in task.users if user in sizes]
    rest = sorted(sizes.keys() - set(own), key=lambda user: (-sizes[user], user))
    return (*own, *rest)


def choose_users(task: TaskData, users: UsersConfig, sizes: Counter[UserId]) -> tuple[UserId, ...]:
    """Users of the run in the data's order. Bad ones are among them: nobody else's place moves.

    Args:
        task: see `assign_users`.
        users: their names or number.
        sizes: training rows of every user that has any.

    Raises:
        ConfigError: there are fewer users than `users.num`.
        DataError: a named one has no training row.
    """
    place = f"{task.name} ({task.train.name})"
    every = {**dict.fromkeys(task.bad_users, 0), **sizes}
    if users.names is not None:
        if missing := [name for name in users.names if name not in every]:
            near, there = nearest_words(missing[0], every), order_users(every, task)
            raise DataError(
                f"users.names: {missing[0]} has no row in {place}; {near}users there: "
                f"{list_names(there)}"
            )
        return tuple(users.names)
    if users.num is not None and users.num > len(every):
        raise ConfigError(
            f"users.num={users.num}: {place} has rows of {len(every)} users; lower users.num, or "
            "leave it out to have them all"
        )
    if users.num is None or users.num > len(sizes):
        return order_users(every, task)
    largest = sorted(sizes, key=lambda user: (-sizes[user], user))[: users.num]
    return order_users({user: sizes[user] for user in largest}, task)


def shard_names(task: TaskData, users: UsersConfig) -> tuple[UserId, ...]:
    """Names of the users that get equal parts of a set which names nobody.

    Raises:
        ConfigError: it is not said how many there are.
        DataError: there are more of them than training rows.
    """
    if users.names is None and users.num is None:
        raise ConfigError(
            f"users={users.name.name}: rows of {task.name} name no user; set users.num=K (or "
            "users.names) to deal them into equal parts, or users.column to a column that does"
        )
    names = users.names or [f"user{number + 1}" for number in range(users.num or 0)]
    if users.num not in (None, len(names)):
        raise ConfigError(
            f"users.num={users.num}, but users.names has {len(names)}; leave users.num out"
        )
    if len(names) > len(task.train.rows):
        raise DataError(
            f"{task.name} ({task.train.name}): {len(task.train.rows)} rows cannot be dealt to "
            f"{len(names)} users; lower users.num or raise task.max_train_rows"
        )
    return tuple(names)


def deal_rows(split: Split, names: Sequence[UserId], split_seed: int) -> list[UserId]:
    """Users of a split's rows, in equal parts at random."""
    generator = torch.Generator().manual_seed(split_seed)
    order = torch.randperm(len(split.rows), generator=generator)
    return [names[place % len(names)] for place in order.tolist()]
