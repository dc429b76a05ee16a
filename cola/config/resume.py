"""Finds the run that `resume=PATH|auto` means, and the configuration it goes on with.

A resumed run keeps its own stored configuration and its own folder. Everything else on the command
line has to agree with what is stored, apart from settings that do not change the numbers (tracking,
checkpoints, `trainer.log_every`), which take effect.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cola.config.identity import (
    CONFIG_FILE,
    SUMMARY_FILE,
    config_hash,
    is_identity,
    load_config,
)
from cola.config.keys import choice_key, find_key, flatten, word
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError

logger = logging.getLogger(__name__)


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
        (`resume=auto` that found none starts afresh).

    Raises:
        ConfigError: nothing to resume there, or an explicit setting differs from the stored one.
    """
    if config.resume is None:
        return config, run_dir
    if config.resume == "auto":
        folder = _newest_unfinished(config, run_dir)
        if folder is None:
            logger.info("resume=auto: no unfinished run of this configuration; starting afresh")
            return dataclasses.replace(config, resume=None), run_dir
    else:
        folder = _unfinished_run(config.resume)
    stored, differing = merge_given(
        load_config(folder / CONFIG_FILE),
        config,
        [name for name in given if name != "resume"],
        may_change=lambda path: not is_identity(path),
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
    folder = find_run("resume", path, hint=", or auto")
    if (folder / SUMMARY_FILE).is_file():
        raise ConfigError(
            f"resume={path}: that run is finished (summary.json exists); start a new run by "
            "leaving out resume"
        )
    return folder


def _newest_unfinished(config: ExperimentConfig, run_dir: Path) -> Path | None:
    """The folder itself (a fixed hydra.run.dir), else its newest sibling, of equal hash."""
    wanted = config_hash(config)
    siblings = sorted(run_dir.parent.glob("*"), reverse=True)  # run ids sort by time
    for folder in [run_dir, *siblings]:
        if (folder / SUMMARY_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
            continue
        try:
            stored = load_config(folder / CONFIG_FILE)
        except ConfigError as error:
            # Killed while writing, or another version's: not the run that is looked for.
            logger.warning("resume=auto: skipped %s: %s", folder, error)
            continue
        if config_hash(stored) == wanted:
            return folder
    return None


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
