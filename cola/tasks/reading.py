"""Reads the rows of a set's split into plain words: the one place where a row meets its user.

A row's user is known before anything else of it is read, so that a row which cannot be read is
somebody's.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from cola.tasks.encoding import TaskRequest
from cola.tasks.fields import Fields
from cola.tasks.sources import iter_rows
from cola.tasks.text import LabelledRow, TextRow

R = TypeVar("R", TextRow, LabelledRow)


def read_split(
    request: TaskRequest,
    split: str,
    parse: Callable[[Fields], Iterable[R]],
    *,
    name: str,
    columns: Sequence[str],
    own_user: str | None = None,
    limit: int | None = None,
) -> list[R]:
    """Rows of one split, in order, without those that stop only their user.

    Args:
        request: says which column names a row's user, and what becomes of bad rows.
        split: `train`, `validation` ...
        parse: the rows that one raw row makes.
        name: the set, for messages.
        columns: what every raw row must have.
        own_user: column by which the set itself names users; null there is nobody.
        limit: first raw rows to read; None reads all.

    Raises:
        DataError: the split is missing or cannot be read, or a row cannot be used.
    """
    bad, column = request.bad_rows, request.user_column or own_user
    users: tuple[str, ...] = () if column is None else (column,)
    needed = tuple(dict.fromkeys((*columns, *users)))
    raw = iter_rows(
        request.task,
        split,
        columns=needed,
        # What else a row lacks may be its user's own trouble, which `parse` finds.
        required=users if users and bad.isolates else needed,
        data_dir=request.data_dir,
        limit=limit,
    )
    rows: list[R] = []
    for number, row in enumerate(raw, start=1):
        fields = Fields(row, f"{name} ({split}), row {number}")
        user = None
        if request.user_column is not None:
            user = fields.user(request.user_column)
        elif own_user is not None:
            user = fields.optional_text(own_user) or None
        found = bad.read(user, partial(parse, fields))
        rows += found if user is None else [dataclasses.replace(one, user=user) for one in found]
    return rows
