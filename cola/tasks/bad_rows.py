"""Rows that cannot be read: they end the run, or only their user's part in it.

Where every user has adapters of their own, one user's bad data is nobody else's problem: the user
is left out with all rows, says a warning, and the others go on.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from cola.errors import DataError
from cola.user_rows import UserId

logger = logging.getLogger(__name__)

MAX_WARNINGS = 10
"""Users who are named with their row; the others are counted."""


class OwnedRow(Protocol):
    """A row that may have a user."""

    @property
    def user(self) -> UserId | None:
        """Who owns it."""


T = TypeVar("T")
R = TypeVar("R", bound=OwnedRow)


class BadRows:
    """Collects users with a row that cannot be read, while a task is read."""

    def __init__(self, *, isolates: bool) -> None:
        """Without `isolates` the first bad row is an error."""
        self._isolates = isolates
        self._reasons: dict[UserId, DataError] = {}

    @property
    def users(self) -> tuple[UserId, ...]:
        """Who had a bad row, in the order in which they were met."""
        return tuple(self._reasons)

    @property
    def isolates(self) -> bool:
        """Whether a bad row stops nobody but its user."""
        return self._isolates

    def read(self, user: UserId | None, parse: Callable[[], Iterable[T]]) -> list[T]:
        """What `parse` makes of one row; nothing where the row is bad and stops only its user.

        Raises:
            DataError: the row is bad, and it stops the run.
        """
        try:
            return list(parse())
        except DataError as error:
            if user is None or not self._isolates:
                raise
            self._reasons.setdefault(user, error)
            return []

    def drop(self, parts: Mapping[str, Sequence[R]], name: str) -> Mapping[str, Sequence[R]]:
        """Every split without the rows of users who had a bad one.

        Args:
            parts: rows by split, all of them read.
            name: the set, for messages.

        Raises:
            DataError: no row is left of a split, as where every user had a bad one.
        """
        if not self._reasons:
            return parts
        lost = dict.fromkeys(self._reasons, 0)
        kept: dict[str, list[R]] = {split: [] for split in parts}
        for split, rows in parts.items():
            for row in rows:
                if row.user in lost:
                    lost[row.user] += 1
                else:
                    kept[split].append(row)
        if emptied := [split for split, rows in kept.items() if not rows]:
            first = next(iter(self._reasons.values()))
            raise DataError(
                f"{name}: no row of {emptied[0]} is left without the {len(lost)} users who have a "
                f"row that cannot be read, the first one: {first}"
            )
        for user, num in list(lost.items())[:MAX_WARNINGS]:
            logger.warning(
                "user %s is left out of the run with %d good rows, because of a bad one: %s",
                user, num, self._reasons[user],
            )  # fmt: skip
        if len(lost) > MAX_WARNINGS:
            logger.warning("%d more users are left out likewise", len(lost) - MAX_WARNINGS)
        return kept
