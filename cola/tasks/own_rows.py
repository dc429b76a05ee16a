"""Rows of one's own JSON-lines files: read, checked, and their template filled.

What the target column means is not decided here. Every message names the file and the line.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cola.config.schema import TaskConfig
from cola.config.template import Template, parse_template
from cola.errors import ConfigError, DataError
from cola.tasks.encoding import TaskRequest
from cola.tasks.fields import is_user
from cola.tasks.sources import Row, choices_hint, read_lines
from cola.user_rows import UserId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A row of a file before its target is understood.

    Attributes:
        text: the filled template.
        target: what the target column holds.
        user: who owns the row, where a column says so.
        place: file, line and target column.
    """

    text: str
    target: Any
    user: UserId | None
    place: str


def read_files(request: TaskRequest) -> dict[str, list[OwnRow]]:
    """Rows by split, of every file that the task names.

    Raises:
        ConfigError: there is no template, and more than one column that could be meant; or two
            columns that name users.
        DataError: a file has no rows, or a line cannot be used.
    """
    task, user = request.task, _user_column(request)
    files = {"train": task.train_file, "validation": task.validation_file, "test": task.test_file}
    paths = {split: Path(file) for split, file in files.items() if file is not None}
    template = (
        parse_template(task.template)
        if task.template is not None
        else _only_text_column(task, user)
    )
    return {split: _read_file(path, template, request, user) for split, path in paths.items()}


def _user_column(request: TaskRequest) -> tuple[str, str] | None:
    """The key that names the users' column, and the column."""
    given = {"task.user": request.task.user, "users.column": request.user_column}
    columns = {key: column for key, column in given.items() if column is not None}
    if len(set(columns.values())) > 1:
        raise ConfigError(
            f"task.user={request.task.user} and users.column={request.user_column}: both name the "
            "column of a row's user; leave one out"
        )
    return next(iter(columns.items()), None)


def _read_file(
    path: Path, template: Template, request: TaskRequest, user_column: tuple[str, str] | None
) -> list[OwnRow]:
    rows: list[OwnRow] = []
    number = 0
    for number, row in read_lines(path):
        place = f"{path}, line {number}"
        user = None if user_column is None else _user(row, *user_column, place)
        parse = partial(_read_row, row, template, request.task, user, place)
        rows += request.bad_rows.read(user, parse)
    if not number:
        raise _empty(path)
    return rows


def _empty(path: Path) -> DataError:
    return DataError(f"{path} holds no rows; give one JSON object per line")


def _read_row(
    row: Row, template: Template, task: TaskConfig, user: UserId | None, place: str
) -> Iterator[OwnRow]:
    for column in template.columns:
        value_of(row, column, "task.template", place)
    text = template.fill(row, place)
    if not text.strip():
        raise DataError(f"{place}: the filled template is empty; leave the row out")
    column = target_column(task)
    target = value_of(row, column, "task.target", place)
    yield OwnRow(text=text, target=target, user=user, place=f"{place}, column '{column}'")


def _only_text_column(task: TaskConfig, user_column: tuple[str, str] | None) -> Template:
    """Without a template, the text is the only column that can be meant."""
    path = train_path(task)
    others = dict([("task.target", target_column(task)), *([user_column] if user_column else [])])
    number, row = next(read_lines(path), (0, {}))
    if not number:
        raise _empty(path)
    for key, column in others.items():  # a misspelt one would count as a text
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
    """A row's value in the column that a key of the configuration names.

    Raises:
        DataError: the row has no such column.
    """
    if column not in row:
        raise DataError(f"{place}: no column '{column}' ({key}); {choices_hint(column, list(row))}")
    return row[column]


def _user(row: Row, key: str, column: str, place: str) -> UserId:
    value = value_of(row, column, key, place)
    if not is_user(value):
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
