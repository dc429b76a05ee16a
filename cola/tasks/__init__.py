"""Tasks: the data set, how it is encoded and batched, and which metric judges it.

`resolve_problem` and `metric_name` tell what a model and a score have to be built for, without
reading data; `load_task` then reads, splits and encodes. Families share `sources`, `encoding` and
`collate`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cola.config.choices import Family, Objective
from cola.config.schema import TaskConfig
from cola.errors import ConfigError
from cola.interfaces import Problem, Score, TaskData
from cola.tasks.encoding import TaskRequest
from cola.tasks.glue import load_glue, resolve_subset
from cola.tasks.images import load_digits, load_mnist
from cola.tasks.sources import choices_hint
from cola.tasks.synthetic import load_synthetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_task", "metric_name", "resolve_problem"]

_LOADERS: dict[str, Callable[[TaskRequest], TaskData]] = {
    "digits": load_digits,
    "glue": load_glue,
    "mnist": load_mnist,
    "synthetic": load_synthetic,
}


def resolve_problem(task: TaskConfig, family: Family | None) -> Problem:
    """What the model has to be built for; reads no data.

    Args:
        task: the task's settings.
        family: what the model is built for; None follows the task.

    Returns:
        The objective that the task states, or else the one that the family poses, with its
        number of labels (0 for causal models) and shapes.

    Raises:
        ConfigError: an unknown task, or an objective that the task or the model cannot have.
    """
    allowed = _allowed_objectives(task)
    objective = task.objective or _pose(allowed, family)
    if objective not in allowed:
        source = "task.objective" if task.objective else "posed by the model's family"
        raise ConfigError(
            f"objective {objective.name} ({source}) does not fit task={task.name}; allowed: "
            f"{', '.join(one.name for one in allowed)}; choose another model or set task.objective"
        )
    is_image = objective is Objective.image
    if is_image and family is not None:
        raise ConfigError(
            f"task={task.name} holds images, but the model is a text {family.name}; "
            "choose model=linear, model=mlp or model=cnn"
        )
    return Problem(
        objective=objective,
        num_labels=_num_labels(task, objective),
        image_shape=_image_shape(task) if is_image else None,
        max_length=task.max_length,
    )


def metric_name(task: TaskConfig) -> str:
    """Name of the judged metric, for `cola.metrics.build_score`.

    Raises:
        ConfigError: an unknown task or subset.
    """
    _check_name(task)
    return resolve_subset(task).metric if task.name == "glue" else "accuracy"


def load_task(
    task: TaskConfig,
    problem: Problem,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    score: Score,
    data_dir: str | None,
    split_seed: int,
) -> TaskData:
    """Read, split and encode a task.

    Args:
        task: the task's settings.
        problem: from `resolve_problem`.
        tokenizer: the model's; None for image models.
        score: the task's metric.
        data_dir: folder of local sets; None reads the hub (built-in sets read neither).
        split_seed: of the hold-out; apart from the training seed, so that seeds share a split.

    Raises:
        ConfigError: the model does not fit the task.
        DataError: the data is missing or cannot be read.
    """
    _check_name(task)
    request = TaskRequest(
        task=task,
        problem=problem,
        tokenizer=tokenizer,
        score=score,
        data_dir=data_dir,
        split_seed=split_seed,
    )
    return _LOADERS[task.name](request)


def _check_name(task: TaskConfig) -> None:
    if task.name not in _LOADERS:
        raise ConfigError(f"no task={task.name}; {choices_hint(task.name, list(_LOADERS))}")


def _allowed_objectives(task: TaskConfig) -> tuple[Objective, ...]:
    """What a task can be posed as, its natural form first."""
    _check_name(task)
    if task.name == "glue":
        return (resolve_subset(task).objective,)
    if task.name == "synthetic":
        return (Objective.classification, Objective.causal)
    return (Objective.image,)


def _pose(allowed: tuple[Objective, ...], family: Family | None) -> Objective:
    """A decoder continues text; everything else takes the task's natural form."""
    is_text = Objective.image not in allowed
    return Objective.causal if family is Family.decoder and is_text else allowed[0]


def _num_labels(task: TaskConfig, objective: Objective) -> int:
    if task.name == "glue":
        return resolve_subset(task).num_labels
    return 0 if objective is Objective.causal else task.num_labels


def _image_shape(task: TaskConfig) -> tuple[int, int, int]:
    if task.image_shape is None or len(task.image_shape) != 3:
        raise ConfigError(
            f"task.image_shape={task.image_shape}; give [channels, height, width], e.g. [1, 28, 28]"
        )
    channels, height, width = task.image_shape
    return channels, height, width
