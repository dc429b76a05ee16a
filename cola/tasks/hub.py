"""Reads raw rows and images from the Hugging Face hub, or from its cache without a connection.

`datasets` retries an unreachable hub for half a minute per file. One short request first tells
whether anybody answers; if not, the libraries are put offline for the call, so that a set in the
local cache still loads and a missing one fails at once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0

OFFLINE_CHOICES = (
    "these work offline: data_dir=FOLDER with local data, data_dir=builtin with sample rows of a "
    "text set, task=digits, task=synthetic"
)

CONVERTED = "refs/convert/"
"""Branches in which the hub keeps files that it made of a set's own, a folder per configuration."""

T = TypeVar("T")


def list_hub_splits(task: TaskConfig) -> list[str]:
    """Splits of `task.hub`.

    Raises:
        DataError: the hub did not answer, or the set is missing.
    """
    path, name, options = _location(task)
    import datasets

    return _ask_hub(
        task, path, lambda: list(datasets.get_dataset_split_names(path, name, **options))
    )


def iter_hub_rows(
    task: TaskConfig, split: str, *, columns: Sequence[str], limit: int | None
) -> Iterator[Mapping[str, Any]]:
    """Rows of one split of `task.hub`; arguments as in `sources.iter_rows`.

    Raises:
        DataError: the hub did not answer, or the set, split or a column is missing.
    """
    table = _load_split(task, split)
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise DataError(
            f"hub set {task.hub} ({split}) lacks column {', '.join(missing)}; "
            f"it has {', '.join(table.column_names)}"
        )
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    yield from table.select_columns(list(columns))


def load_hub_arrays(task: TaskConfig) -> dict[str, NDArray[Any]]:
    """x_train, y_train, x_test, y_test of an image set with columns `image` (or `img`) and `label`.

    Raises:
        DataError: the hub did not answer, or the set, a split or a column is missing.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for split in ("train", "test"):
        table = _load_split(task, split)
        column = "img" if "img" in table.column_names else "image"
        for needed in (column, "label"):
            if needed not in table.column_names:
                raise DataError(
                    f"hub set {task.hub} ({split}) lacks column {needed}; "
                    f"it has {', '.join(table.column_names)}"
                )
        arrays[f"x_{split}"] = np.stack([np.asarray(image) for image in table[column]])
        arrays[f"y_{split}"] = np.asarray(table["label"])
    return arrays


def _load_split(task: TaskConfig, split: str) -> Any:
    """A `datasets.Dataset`; the library ships no types."""
    path, name, options = _location(task)
    import datasets

    label = f"{path} ({task.subset}, {split})" if task.subset else f"{path} ({split})"
    return _ask_hub(task, label, lambda: datasets.load_dataset(path, name, split=split, **options))


def _location(task: TaskConfig) -> tuple[str, str | None, dict[str, str | None]]:
    """The set's id, its configuration, and further arguments of the functions that load it.

    The configuration is the third part of `task.hub`, else the subset.
    """
    if task.hub is None:
        raise ConfigError(f"task={task.name} names no hub set; set task.hub or data_dir=FOLDER")
    owner, _, rest = task.hub.partition("/")
    name, _, configuration = rest.partition("/")
    path = f"{owner}/{name}" if name else owner
    chosen = configuration or task.subset
    if (task.revision or "").startswith(CONVERTED):
        # Such a branch describes no configurations: they are plain folders.
        return path, None, {"data_dir": chosen, "revision": task.revision}
    return path, chosen, {"revision": task.revision}


def _ask_hub(task: TaskConfig, name: str, ask: Callable[[], T]) -> T:
    """The answer, or a `DataError` that says what to do."""
    online = _hub_answers(_location(task)[0])
    try:
        with nullcontext() if online else _offline():
            return ask()
    except Exception as error:  # the library raises its own, HTTP, file and Arrow errors
        state = "could not be loaded from" if online else "is not cached and nobody answers at"
        raise DataError(
            f"{name} {state} the hub: {error}; {_advice(task, error)}{OFFLINE_CHOICES}"
        ) from error


def _advice(task: TaskConfig, error: BaseException) -> str:
    """What to change, where the error tells."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    while cause is not None:  # `datasets` wraps it
        if isinstance(cause, GatedRepoError):
            page = f"https://huggingface.co/datasets/{_location(task)[0]}"
            return f"accept the licence on {page} and set HF_TOKEN to your access token; "
        cause = cause.__cause__
    for words, advice in _ADVICE.items():
        if words in str(error):
            return f"{advice}; "
    return ""


_ADVICE = {
    "scripts are no longer supported": "set task.revision=refs/convert/parquet or another task.hub",
    "Revision": "set task.revision to a branch or commit of the set, or to null",
    "BuilderConfig": "name the configuration as the third part of task.hub=OWNER/SET/CONFIGURATION",
    "Config name is missing": "set task.hub=OWNER/SET/CONFIGURATION",
    "Unknown split": "set task.hub to a set that has it",
    "doesn't exist on the Hub": "set task.hub to the id of a public set",
}
"""What to do about an error of `datasets`, which has no class of its own for most, by its words."""


def _hub_answers(hub_id: str) -> bool:
    """Whether the hub can be reached, asked once and without retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(hub_id, timeout=PROBE_SECONDS)
    except HfHubHTTPError:
        return True  # it answered, if only to refuse; loading will say why
    except Exception as error:  # which class depends on the HTTP client of the installed version
        logger.info("The hub does not answer (%s); trying its local cache", error)
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Put the hub libraries offline; they read the environment only when imported."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, Any] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
