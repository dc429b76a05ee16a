"""Reads raw rows and images from the Hugging Face hub, or from its cache without a connection.

`datasets` retries an unreachable hub for half a minute per file. One short request first tells
whether anybody answers; if not, the libraries are put offline for the call, so that a set in the
local cache still loads and a missing one fails at once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0

OFFLINE_CHOICES = "these work offline: data_dir=FOLDER with local data, task=digits, task=synthetic"


def load_hub_rows(
    task: TaskConfig, split: str, *, columns: Sequence[str], limit: int | None
) -> list[Mapping[str, Any]]:
    """Rows of one split of `task.hub`; arguments as in `sources.load_rows`.

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
    rows: list[Mapping[str, Any]] = table.to_list()
    return rows


def load_hub_arrays(task: TaskConfig) -> dict[str, NDArray[Any]]:
    """x_train, y_train, x_test, y_test of an image set with columns `image` and `label`.

    Raises:
        DataError: the hub did not answer, or the set or a split is missing.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for split in ("train", "test"):
        table = _load_split(task, split)
        arrays[f"x_{split}"] = np.stack([np.asarray(image) for image in table["image"]])
        arrays[f"y_{split}"] = np.asarray(table["label"])
    return arrays


def _load_split(task: TaskConfig, split: str) -> Any:
    """A `datasets.Dataset`; the library ships no types."""
    if task.hub is None:
        raise ConfigError(f"task={task.name} names no hub set; set task.hub or data_dir=FOLDER")
    import datasets

    online = _hub_answers(task.hub)
    name = f"{task.hub} ({task.subset}, {split})" if task.subset else f"{task.hub} ({split})"
    try:
        with nullcontext() if online else _offline():
            return datasets.load_dataset(task.hub, task.subset, split=split)
    except Exception as error:  # the library raises its own, HTTP, file and Arrow errors
        state = "could not be loaded from" if online else "is not cached and nobody answers at"
        raise DataError(f"{name} {state} the hub: {error}; {OFFLINE_CHOICES}") from error


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
