"""One's own data: JSON-lines files, a template over their columns, and a target column.

Encoders classify the filled template (or predict a value); models that write answer it with the
target. Splits follow the rule of every text set. Each message names the file and the line.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from cola.config.choices import Objective
from cola.config.schema import TaskConfig
from cola.config.template import format_value
from cola.errors import ConfigError, DataError
from cola.task_data import TaskData
from cola.tasks.encoding import TaskRequest
from cola.tasks.own_rows import (
    OwnRow,
    read_files,
    target_column,
    train_path,
    value_of,
    warn_of_copies,
)
from cola.tasks.sources import choices_hint, read_lines
from cola.tasks.splits import Splits, choose_splits
from cola.tasks.text import LabelledRow, TextRow, build_labelled_task, build_text_task

logger = logging.getLogger(__name__)

T = TypeVar("T", TextRow, LabelledRow)

NAME = "jsonl"


def load_jsonl(request: TaskRequest) -> TaskData:
    """Read, split and encode the files of `task.train_file` and its companions.

    Raises:
        ConfigError: the template, a column's name or the number of classes does not fit.
        DataError: a file or a line cannot be used.
    """
    objective = request.problem.objective
    parts = read_files(request)
    warn_of_copies(parts)
    if objective is not Objective.classification:
        _refuse_classes(request.task, objective)
        if objective is Objective.regression:
            return build_labelled_task(request, NAME, _split(parts, _valued_row, request))
        return build_text_task(request, NAME, _split(parts, _text_row, request))
    names = class_names(request.task)
    if len(names) != request.problem.num_labels:
        raise ConfigError(
            f"task.num_labels={request.problem.num_labels}, but there are {len(names)} classes "
            f"({', '.join(names)}); leave task.num_labels out, the data decides it"
        )
    logger.info("classes: %s", ", ".join(f"{i} = {name}" for i, name in enumerate(names)))
    indices = {name: index for index, name in enumerate(names)}
    splits = _split(parts, lambda row: _classified_row(row, indices), request)
    return build_labelled_task(request, NAME, splits, label_names=names)


def count_labels(task: TaskConfig) -> int:
    """`Problem.num_labels` of a model that does not write; reads no more than the target column.

    Raises:
        ConfigError: there is no train file to count the classes in.
        DataError: the train file cannot be read, or its target column holds no classes.
    """
    if task.objective is Objective.regression:
        return 1
    return task.num_labels or len(class_names(task))


def class_names(task: TaskConfig) -> tuple[str, ...]:
    """Names of the classes in order: `task.labels`, or what the train file's target holds, sorted.

    Raises:
        ConfigError: there is no train file.
        DataError: the file cannot be read, or its target column holds no classes.
    """
    if task.labels is not None:
        return tuple(task.labels)
    path, column = train_path(task), target_column(task)
    if not path.is_file():  # a dry run takes such a configuration, nothing else does
        raise ConfigError(
            f"{path} does not exist, so its classes are unknown; set task.labels=[NAME,NAME] or "
            "task.num_labels=NUMBER"
        )
    values: dict[str | int, None] = {}  # a set in the order of the file
    problems: list[DataError] = []
    for number, row in read_lines(path):
        place = f"{path}, line {number}"
        try:
            value = value_of(row, column, "task.target", place)
            place = f"{place}, column '{column}'"
            value = _class_value(value, place)
        except DataError as error:  # whom it stops is decided when the rows are read
            problems.append(error)
            continue
        first = next(iter(values), value)
        if type(value) is not type(first):
            raise DataError(
                f"{place}: class {value!r} beside {first!r}; write the classes as text or as "
                "integers throughout, or name them in task.labels"
            )
        values[value] = None
    if len(values) < 2:
        if problems:
            raise problems[0]
        raise DataError(
            f"{path}: column '{column}' holds {len(values)} classes; classification needs two, so "
            "add rows, or name the classes in task.labels"
        )
    return tuple(str(value) for value in sorted(values))


def _refuse_classes(task: TaskConfig, objective: Objective) -> None:
    for key, value in (("labels", task.labels), ("num_labels", task.num_labels)):
        if value:
            raise ConfigError(
                f"task.{key} would have no effect with objective {objective.name}; leave it out, "
                "or set task.objective=classification"
            )


def _split(
    parts: Mapping[str, Sequence[OwnRow]], read: Callable[[OwnRow], T], request: TaskRequest
) -> Splits[T]:
    """Splits of rows whose targets are understood."""
    bad = request.bad_rows
    understood = {
        split: [one for row in rows for one in bad.read(row.user, partial(map, read, [row]))]
        for split, rows in parts.items()
    }
    return choose_splits(
        bad.drop(understood, NAME),
        name=NAME,
        seed=request.split_seed,
        max_train_rows=request.task.max_train_rows,
        max_eval_rows=request.task.max_eval_rows,
    )


def _text_row(row: OwnRow) -> TextRow:
    target = format_value(row.target, row.place)
    if not target.strip():
        raise DataError(
            f"{row.place}: nothing for the model to write; give a text or leave the row out"
        )
    return TextRow(source=row.text, target=target, user=row.user)


def _valued_row(row: OwnRow) -> LabelledRow:
    value = row.target
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{row.place}: {value!r} is not a finite number, which task.objective=regression needs"
        )
    return LabelledRow(text=row.text, label=float(value), user=row.user)


def _classified_row(row: OwnRow, indices: Mapping[str, int]) -> LabelledRow:
    name = str(_class_value(row.target, row.place))
    if name not in indices:
        raise DataError(
            f"{row.place}: class '{name}' is not among those of task.labels or the train file; "
            f"{choices_hint(name, list(indices))}"
        )
    return LabelledRow(text=row.text, label=indices[name], user=row.user)


def _class_value(value: object, place: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(
            f"{place}: {value!r} is no class; classes are text or integers, and numbers to predict "
            "need task.objective=regression"
        )
    return value
