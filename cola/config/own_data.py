"""Checks the settings of one's own data (`task=jsonl`) before torch is imported or a file read."""

from pathlib import Path

from cola.config.schema import ExperimentConfig, TaskConfig
from cola.config.template import parse_template
from cola.errors import ConfigError

OWN_DATA_TASK = "jsonl"

_FILES = ("train_file", "validation_file", "test_file")
_KEYS = (*_FILES, "template", "target", "user", "labels")
_SUFFIXES = (".jsonl", ".jsonl.gz")

_EXAMPLE = (
    "cola-train task=jsonl task.train_file=train.jsonl task.target=sentiment "
    "'task.template=\"{text}\"' model=roberta-base"
)


def check_own_data(config: ExperimentConfig) -> None:
    """Refuses settings of one's own data that cannot be used, and those that nothing would read.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    task = config.task
    if task.name != OWN_DATA_TASK:
        for key in _KEYS:
            if getattr(task, key) is not None:
                raise ConfigError(
                    f"task.{key} would have no effect with task={task.name}; use "
                    f"task={OWN_DATA_TASK} or leave it out"
                )
        return
    for key in ("train_file", "target"):
        if not getattr(task, key):
            raise ConfigError(f"task={task.name}: task.{key} is not set; for example: {_EXAMPLE}")
    if config.data_dir is not None:
        raise ConfigError(
            f"data_dir={config.data_dir} would have no effect with task={task.name}, which reads "
            "task.train_file; leave it out"
        )
    _check_files(task, needs_files=not config.dry_run)
    _check_labels(task)
    if task.template is not None and task.target in parse_template(task.template).columns:
        raise ConfigError(
            f"task.template names the target column '{task.target}', so the model would read its "
            "answer; leave it out of the template"
        )


def _check_files(task: TaskConfig, *, needs_files: bool) -> None:
    seen: dict[Path, str] = {}
    for key in _FILES:
        file = getattr(task, key)
        if file is None:
            continue
        if not file.endswith(_SUFFIXES):
            raise ConfigError(
                f"task.{key}={file}: give a file of JSON lines that ends in "
                f"{' or '.join(_SUFFIXES)}; each line is one object with the row's columns"
            )
        path = Path(file).resolve()
        if needs_files and not path.is_file():
            raise ConfigError(f"task.{key}={file}: there is no such file (looked for {path})")
        if path in seen:
            raise ConfigError(
                f"task.{key}={file} is task.{seen[path]} as well, but rows that are learned from "
                "or selected on say nothing when scored; leave it out, and rows are held out"
            )
        seen[path] = key


def _check_labels(task: TaskConfig) -> None:
    if task.labels is None:
        return
    if len(set(task.labels)) < len(task.labels) or len(task.labels) < 2:
        raise ConfigError(
            f"task.labels=[{','.join(task.labels)}]: name at least two classes, each once"
        )
    if task.num_labels not in (0, len(task.labels)):
        raise ConfigError(
            f"task.num_labels={task.num_labels}, but task.labels names {len(task.labels)}; leave "
            "task.num_labels out"
        )
