"""Tasks: the data set, how it is encoded and batched, and which metric judges it.

`resolve_problem` and `metric_name` tell what a model and a score have to be built for, without
reading data; `load_task` then reads, splits and encodes. A task is an entry of `_TASKS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cola.config.choices import Family, Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.task_data import Problem, Score, TaskData
from cola.tasks.bad_rows import BadRows
from cola.tasks.encoding import TaskRequest
from cola.tasks.glue import load_glue, resolve_subset
from cola.tasks.images import load_digits, load_image_set
from cola.tasks.jsonl import count_labels, load_jsonl
from cola.tasks.sources import choices_hint
from cola.tasks.synthetic import load_synthetic
from cola.tasks.text_sets import TEXT_SETS, load_text_set

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["leaves_objective_open", "load_task", "metric_name", "resolve_problem"]

_WRITING = tuple(objective for objective in Objective if objective.writes)

_POSED = {
    Family.encoder: Objective.classification,
    Family.decoder: Objective.causal,
    Family.seq2seq: Objective.seq2seq,
}
"""How a model's family poses a task that leaves it open."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is known of a task before any data is read.

    Attributes:
        load: reads, splits and encodes.
        objectives: what the task can be posed as, its natural form first.
        num_labels: classes where it is posed as a classification; 1 for values.
    """

    load: Callable[[TaskRequest], TaskData]
    objectives: Callable[[TaskConfig], tuple[Objective, ...]]
    num_labels: Callable[[TaskConfig], int] = lambda task: task.num_labels


def _fixed(*objectives: Objective) -> Callable[[TaskConfig], tuple[Objective, ...]]:
    return lambda task: objectives


_TASKS: dict[str, _Task] = {
    "cifar10": _Task(load=load_image_set, objectives=_fixed(Objective.image)),
    "digits": _Task(load=load_digits, objectives=_fixed(Objective.image)),
    "glue": _Task(
        load=load_glue,
        objectives=lambda task: (resolve_subset(task).objective,),
        num_labels=lambda task: resolve_subset(task).num_labels,
    ),
    "jsonl": _Task(
        load=load_jsonl,
        objectives=_fixed(Objective.classification, Objective.regression, *_WRITING),
        num_labels=count_labels,
    ),
    "mnist": _Task(load=load_image_set, objectives=_fixed(Objective.image)),
    "synthetic": _Task(load=load_synthetic, objectives=_fixed(Objective.classification, *_WRITING)),
} | {
    name: _Task(load=load_text_set, objectives=_fixed(*text_set.objectives))
    for name, text_set in TEXT_SETS.items()
}


def resolve_problem(task: TaskConfig, family: Family | None) -> Problem:
    """What the model has to be built for; reads no data.

    Args:
        task: the task's settings.
        family: what the model is built for; None follows the task.

    Returns:
        The objective that the task states, or else the one that the family poses, with its
        number of labels (0 for models that write) and shapes.

    Raises:
        ConfigError: an unknown task, or an objective that the task or the model cannot have.
    """
    found = _find(task)
    allowed = found.objectives(task)
    objective = task.objective or _pose(allowed, family)
    is_image = Objective.image in allowed
    if is_image and family is not None:
        raise ConfigError(
            f"task={task.name} holds images, but the model is a text {family.name}; "
            "choose model=linear, model=mlp or model=cnn"
        )
    if objective not in allowed:
        source = "task.objective" if task.objective else "posed by the model's family"
        raise ConfigError(
            f"objective {objective.name} ({source}) does not fit task={task.name}; allowed: "
            f"{', '.join(one.name for one in allowed)}; choose another model or set task.objective"
        )
    return Problem(
        objective=objective,
        num_labels=0 if objective.writes else found.num_labels(task),
        image_shape=_image_shape(task) if is_image else None,
        max_length=task.max_length,
    )


def leaves_objective_open(task: TaskConfig) -> bool:
    """Whether the model's family decides what is scored.

    Raises:
        ConfigError: an unknown task or subset.
    """
    return task.objective is None and len(_find(task).objectives(task)) > 1


def metric_name(task: TaskConfig, objective: Objective) -> str:
    """Name of the judged metric, for `cola.metrics.build_score`.

    Args:
        task: the task's settings.
        objective: of its problem; text that is written is judged by ROUGE-L.

    Raises:
        ConfigError: an unknown task or subset.
    """
    _find(task)
    if objective.writes:
        return "rouge_l"
    if task.name == "glue":
        return resolve_subset(task).metric
    return "pearson" if objective is Objective.regression else "accuracy"


def load_task(
    task: TaskConfig,
    problem: Problem,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    score: Score,
    data_dir: str | None,
    split_seed: int,
    decoder_start_id: int | None = None,
    user_column: str | None = None,
    isolates_users: bool = False,
) -> TaskData:
    """Read, split and encode a task.

    Args:
        task: the task's settings.
        problem: from `resolve_problem`.
        tokenizer: the model's; None for image models.
        score: the task's metric.
        data_dir: folder of local sets; `builtin` reads sample rows of this package; None reads
            the hub (built-in sets read neither).
        split_seed: of the hold-out; apart from the training seed, so that seeds share a split.
        decoder_start_id: token id that an encoder-decoder starts writing from.
        user_column: names a row's user; None: the set's own column, if it has one.
        isolates_users: a row that cannot be read stops its user alone, where that is known.

    Raises:
        ConfigError: the model does not fit the task, or images have no users.
        DataError: the data is missing or cannot be read.
    """
    found = _find(task)
    if user_column is not None and problem.objective is Objective.image:
        raise ConfigError(
            f"users.column={user_column}: task={task.name} holds images, which have no columns; "
            "leave it out and set users.num=K to deal them into equal parts"
        )
    bad_rows = BadRows(isolates=isolates_users)
    request = TaskRequest(
        task=task,
        problem=problem,
        tokenizer=tokenizer,
        score=score,
        data_dir=data_dir,
        split_seed=split_seed,
        bad_rows=bad_rows,
        decoder_start_id=decoder_start_id,
        user_column=user_column,
    )
    return replace(found.load(request), bad_users=bad_rows.users)


def _find(task: TaskConfig) -> _Task:
    if task.name not in _TASKS:
        raise ConfigError(f"no task={task.name}; {choices_hint(task.name, list(_TASKS))}")
    return _TASKS[task.name]


def _pose(allowed: tuple[Objective, ...], family: Family | None) -> Objective:
    """The form that a model's family gives a task; an encoder may predict values, too."""
    if family is None or Objective.image in allowed:
        return allowed[0]
    if family is Family.encoder and allowed[0] is Objective.regression:
        return allowed[0]
    return _POSED[family]


def _image_shape(task: TaskConfig) -> tuple[int, int, int]:
    if task.image_shape is None or len(task.image_shape) != 3:
        raise ConfigError(
            f"task.image_shape={task.image_shape}; give [channels, height, width], e.g. [1, 28, 28]"
        )
    channels, height, width = task.image_shape
    return channels, height, width
