"""Finds the run that `resume=PATH|auto|once` means, and the configuration it goes on with.

A resumed run keeps its own stored configuration and its own folder. Everything else on the command
line has to agree with what is stored, apart from settings that do not change the numbers (tracking,
checkpoints, `trainer.log_every`, which of several GPUs), which take effect.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from cola.config.identity import (
    CONFIG_FILE,
    SUMMARY_FILE,
    config_hash,
    identity_value,
    is_identity,
    load_config,
)
from cola.config.keys import choice_key, find_key, flatten, word
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

logger = logging.getLogger(__name__)

ONCE = "once"
SEARCHES = ("auto", ONCE)
"""Values of `resume` that look for the run; another one is the path of its folder."""


def resolve_resume(
    config: ExperimentConfig, given: Collection[str], run_dir: Path
) -> tuple[ExperimentConfig, Path]:
    """Replaces a configuration by the stored one of the run to go on with.

    Args:
        config: composed from the command line, defaults filled in.
        given: groups and keys set explicitly there.
        run_dir: where a fresh run would write.

    Returns:
        Configuration and folder. `resume` is the folder's path when a run goes on, else null
        (a search that found none starts afresh).

    Raises:
        ConfigError: nothing to resume there, or an explicit setting differs from the stored one.
    """
    if config.resume is None:
        return config, run_dir
    if config.resume in SEARCHES:
        folder = next((run for run in _equal_runs(config, run_dir) if not _is_finished(run)), None)
        if folder is None:
            logger.info(
                "resume=%s: no unfinished run of this configuration; starting afresh", config.resume
            )
            return dataclasses.replace(config, resume=None), run_dir
    else:
        folder = _unfinished_run(config.resume)
    there = load_config(folder / CONFIG_FILE)
    stored, differing = merge_given(
        there,
        config,
        [name for name in given if name != "resume"],
        may_change=lambda path: not is_identity(path) or _is_equal(there, config, path),
    )
    if differing:
        raise ConfigError(
            f"resume={folder}: the run was started with other settings: {', '.join(differing)}; "
            "leave them out, or start a new run"
        )
    return dataclasses.replace(stored, resume=str(folder)), folder


def find_run(key: str, path: str, *, hint: str = "") -> Path:
    """The folder of a run that a key names.

    Raises:
        ConfigError: it holds none; `hint` is what else could be given.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file():
        state = "has no config.yaml" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{key}={path}: {state}; give the folder of a run (outputs/NAME/RUN_ID){hint}"
        )
    return folder


def _unfinished_run(path: str) -> Path:
    folder = find_run("resume", path, hint=", auto or once")
    if _is_finished(folder):
        raise ConfigError(
            f"resume={path}: that run is finished (summary.json exists); start a new run by "
            "leaving out resume"
        )
    return folder


def finished_run(config: ExperimentConfig, run_dir: Path) -> Path | None:
    """The newest finished run of a configuration, where `resume` looks for it; None without one.

    Args:
        config: composed, defaults filled in.
        run_dir: where a fresh run would write: searched itself, then its siblings.
    """
    return next(filter(_is_finished, _equal_runs(config, run_dir)), None)


def _is_finished(folder: Path) -> bool:
    return (folder / SUMMARY_FILE).is_file()


def _equal_runs(config: ExperimentConfig, run_dir: Path) -> Iterator[Path]:
    """The folder itself (a fixed hydra.run.dir), then its siblings, newest first, of equal hash."""
    wanted = config_hash(config)
    siblings = sorted(run_dir.parent.glob("*"), reverse=True)  # run ids sort by time
    for folder in [run_dir, *siblings]:
        path = folder / CONFIG_FILE
        if path.is_file() and _stored_hash(path, path.stat().st_mtime_ns) == wanted:
            yield folder


@functools.cache
def _stored_hash(path: Path, changed_ns: int) -> str | None:
    """Hash of a stored configuration, None if it cannot be read.

    A sweep asks for that of every run once per job, hence remembered until the file changes.
    """
    try:
        return config_hash(load_config(path))
    except ConfigError as error:
        # Killed while writing, or another version's: not the run that is looked for.
        logger.warning("resume: skipped %s: %s", path.parent, error)
        return None


def _is_equal(one: ExperimentConfig, other: ExperimentConfig, path: str) -> bool:
    """Whether two configurations compute the same as far as a key decides it."""
    first, second = (identity_value(path, flatten(config)[path]) for config in (one, other))
    return bool(first == second)


def merge_given(
    stored: ExperimentConfig,
    config: ExperimentConfig,
    given: Collection[str],
    *,
    may_change: Callable[[str], bool],
) -> tuple[ExperimentConfig, list[str]]:
    """A stored configuration with explicit settings put in where they may differ from it.

    Args:
        stored: of a run's folder.
        config: holds the values of what was given.
        given: groups and keys set explicitly.
        may_change: whether a key may differ.

    Returns:
        The merged configuration, and in words every setting that differs and may not.
    """
    stored_values, given_values = flatten(stored), flatten(config)
    differing = []
    for path in _given_keys(given):
        if stored_values[path] == given_values[path]:
            continue
        if may_change(path):
            stored = _replace(stored, path, given_values[path])
        else:
            differing.append(
                f"{path} ({word(stored_values[path])} there, {word(given_values[path])} given)"
            )
    return stored, differing


def _given_keys(given: Collection[str]) -> list[str]:
    """Schema keys that explicit groups and keys stand for.

    A group stands for the one key that names its choice: its other values may have been overridden
    when the run was started.
    """
    return [key.path if (key := find_key(name)) else choice_key(name) for name in sorted(given)]


def _replace(config: ExperimentConfig, path: str, value: Any) -> ExperimentConfig:
    section, _, name = path.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: value})
    node = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: node})
