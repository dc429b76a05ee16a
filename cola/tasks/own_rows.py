"""Rows of one's own JSON-lines files: read, checked, and their template filled.

What the target column means is not decided here. Every message names the file and the line.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cola.config.schema import TaskConfig
from cola.config.template import Template, parse_template
from cola.errors import ConfigError, DataError
from cola.tasks.sources import Row, choices_hint, read_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A row of a file before its target is understood.

    Attributes:
        text: the filled template.
        target: what the target column holds.
        user: who owns the row, where `task.user` is set.
        place: file, line and target column.
    """

    text: str
    target: Any
    user: str | None
    place: str


def read_files(task: TaskConfig) -> dict[str, list[OwnRow]]:
    """Rows by split, of every file that the task names.

    Raises:
        ConfigError: there is no template, and more than one column that could be meant.
        DataError: a file has no rows, or a line cannot be used.
    """
    files = {"train": task.train_file, "validation": task.validation_file, "test": task.test_file}
    paths = {split: Path(file) for split, file in files.items() if file is not None}
    template = (
        parse_template(task.template) if task.template is not None else _only_text_column(task)
    )
    return {split: _read_file(path, template, task) for split, path in paths.items()}


def _read_file(path: Path, template: Template, task: TaskConfig) -> list[OwnRow]:
    rows = [
        _read_row(row, template, task, f"{path}, line {number}") for number, row in read_lines(path)
    ]
    if not rows:
        raise _empty(path)
    return rows


def _empty(path: Path) -> DataError:
    return DataError(f"{path} holds no rows; give one JSON object per line")


def _read_row(row: Row, template: Template, task: TaskConfig, place: str) -> OwnRow:
    for column in template.columns:
        value_of(row, column, "template", place)
    text = template.fill(row, place)
    if not text.strip():
        raise DataError(f"{place}: the filled template is empty; leave the row out")
    column = target_column(task)
    return OwnRow(
        text=text,
        target=value_of(row, column, "target", place),
        user=None if task.user is None else _user(row, task.user, place),
        place=f"{place}, column '{column}'",
    )


def _only_text_column(task: TaskConfig) -> Template:
    """Without a template, the text is the only column that can be meant."""
    path, others = train_path(task), {"target": target_column(task), "user": task.user}
    number, row = next(read_lines(path), (0, {}))
    if not number:
        raise _empty(path)
    for key, column in others.items():
        if column is not None:  # a misspelt one would count as a text
            value_of(row, column, key, f"{path}, line {number}")
    names = [column for column in row if column not in others.values()]
    texts = [column for column in names if isinstance(row[column], str)]
    if len(texts) != 1:
        raise ConfigError(
            f"{path} has {len(texts)} text columns beside the target, so task.template has to say "
            f"what the model reads; it may name {', '.join(names) or 'no column'}, for example "
            f"'task.template=\"Text: {{{(names or ['text'])[0]}}}\"'"
        )
    return Template(parts=(("", texts[0]),))


def value_of(row: Row, column: str, key: str, place: str) -> Any:
    """A row's value in the column that `task.<key>` names.

    Raises:
        DataError: the row has no such column.
    """
    if column not in row:
        raise DataError(
            f"{place}: no column '{column}' (task.{key}); {choices_hint(column, list(row))}"
        )
    return row[column]


def _user(row: Row, column: str, place: str) -> str:
    value = value_of(row, column, "user", place)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(
            f"{place}, column '{column}': {value!r} is no user; it has to be text or an integer"
        )
    return str(value)


def warn_of_copies(parts: Mapping[str, Sequence[OwnRow]]) -> None:
    """Logs rows that are learned from and scored: the score says less than it seems to."""
    learned = {(row.text, str(row.target)) for row in parts["train"]}
    for split, rows in parts.items():
        copies = sum((row.text, str(row.target)) in learned for row in rows)
        if split != "train" and copies:
            logger.warning("%d of %d rows of %s are in train, too", copies, len(rows), split)


def train_path(task: TaskConfig) -> Path:
    """The train file."""
    assert task.train_file is not None, "checked by config.own_data"
    return Path(task.train_file)


def target_column(task: TaskConfig) -> str:
    """The column of the class, the value or the text to write."""
    assert task.target is not None, "checked by config.own_data"
    return task.target
