"""Values of a raw row, refused where they cannot be what a task needs: text, labels, users."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cola.config.choices import Objective
from cola.errors import DataError
from cola.task_data import Example, Problem
from cola.tasks.sources import Row
from cola.user_rows import UserId


@dataclass(frozen=True)
class Fields:
    """Reads the values of one raw row, and refuses those that cannot be what they should.

    Attributes:
        row: the raw row.
        place: set, split and number of the row, for messages.
    """

    row: Row
    place: str

    def text(self, *path: str) -> str:
        """The text at a column, or at a field of it.

        Raises:
            DataError: it is no text, or has none in it.
        """
        value = self._value(path)
        if not _is_full(value):
            raise self._error(path, value, "a text that is not empty")
        return str(value)

    def optional_text(self, *path: str) -> str:
        """The same where an empty one is fine; some copies of the sets hold null instead."""
        value = self._value(path)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._error(path, value, "a text")
        return value

    def texts(self, *path: str) -> list[str]:
        """A list of texts, of which some may be empty."""
        value = self._value(path)
        if not _is_texts(value):
            raise self._error(path, value, "a list of texts")
        return list(value)

    def full_texts(self, *path: str) -> list[str]:
        """A list of texts, none of them empty."""
        value = self._value(path)
        if not isinstance(value, list) or not all(_is_full(text) for text in value):
            raise self._error(path, value, "a list of texts, none of them empty")
        return value

    def text_lists(self, *path: str) -> list[list[str]]:
        """A list of lists of texts."""
        value = self._value(path)
        if not isinstance(value, list) or not all(_is_texts(texts) for texts in value):
            raise self._error(path, value, "a list of lists of texts")
        return value

    def word(self, column: str, words: tuple[str, ...]) -> str:
        """The word for a class."""
        label = self._value((column,))
        if type(label) is not int or not 0 <= label < len(words):
            raise self._error((column,), label, f"a class from 0 to {len(words) - 1}")
        return words[label]

    def label(self, column: str, problem: Problem) -> float:
        """A class or a value that the loss can take.

        Raises:
            DataError: it cannot.
        """
        label: float = self._value((column,))
        check_label(label, problem, self.place)
        return label

    def user(self, column: str) -> UserId:
        """The user that a column names.

        Raises:
            DataError: it names nobody.
        """
        value = self._value((column,))
        if not is_user(value):
            raise self._error((column,), value, "the name of a user: text or an integer")
        return str(value)

    def _value(self, path: tuple[str, ...]) -> Any:
        value: Any = self.row
        for depth, name in enumerate(path):
            if not isinstance(value, Mapping) or name not in value:
                raise self._error(path[:depth], value, f"an object with a field {name}")
            value = value[name]
        return value

    def _error(self, path: tuple[str, ...], value: object, wanted: str) -> DataError:
        what = ".".join(path) or "the row"
        return DataError(f"{self.place}: {what} is {value!r:.80}, but has to be {wanted}")


def is_user(value: object) -> bool:
    """Whether a value of a column can be the name of a user."""
    return not isinstance(value, bool) and isinstance(value, str | int) and bool(str(value).strip())


def check_labels(rows: Sequence[Example], problem: Problem, name: str) -> None:
    """Refuse labels that the loss cannot take, before they become an index error in it.

    Args:
        rows: each with a `label`.
        problem: how many classes there are, or that labels are values.
        name: the set and split, for the message.

    Raises:
        DataError: names the first bad row, counted from 1.
    """
    for number, row in enumerate(rows, start=1):
        check_label(row["label"], problem, f"{name}, row {number}")


def check_label(label: object, problem: Problem, place: str) -> None:
    """The same of one row's label.

    Raises:
        DataError: names the place, which is the set, split and number of the row.
    """
    if problem.objective is Objective.regression:
        good, allowed = _is_number(label), "a finite number"
    else:
        good = isinstance(label, int) and 0 <= label < problem.num_labels
        allowed = f"a class from 0 to {problem.num_labels - 1}"
    if not good:
        raise DataError(f"{place}: label {label!r} is not {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_full(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
