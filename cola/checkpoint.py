"""Saved states: safetensors for tensors, JSON for the rest, written atomically, newest kept.

A state is any nesting of dictionaries and lists with tensors and JSON values as leaves. It becomes
two files in a folder that is renamed into place when complete: a run killed at any moment leaves
whole checkpoints only.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola.errors import DataError

NEW_PARAMETERS = "base.safetensors"
TENSORS = "tensors.safetensors"
VALUES = "state.json"
BEST = "best"

PEEKS = 5
PEEK_SECONDS = 0.1
"""How often, and how long after one another, a state of a running run is looked for."""


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a state as a folder, replacing one that is there, all or nothing."""
    tensors: dict[str, Tensor] = {}
    values = _split(state, "", tensors)
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file(tensors, draft / TENSORS)
    (draft / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")
    for name in (TENSORS, VALUES):
        _flush(draft / name)
    old = _replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> dict[str, Any]:
    """Reads a folder written by `save_state`.

    Raises:
        DataError: the folder is not a whole checkpoint.
    """
    if not folder.exists() and _replaced(folder).exists():
        _replaced(folder).rename(folder)  # killed between the two renames of a replacement
    try:
        return _read(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} is not a checkpoint that can be read: {error}") from error


def peek_state(checkpoints: Path, *, newest: bool = False) -> dict[str, Any] | None:
    """The best state of a run that may be running, or its newest; nothing is written or renamed.

    The run may replace or remove any folder at any moment, so that a folder counts only if it is
    the same one after both of its files were read, and otherwise is looked for again.

    Args:
        checkpoints: the run's folder of them.
        newest: the newest step in place of the best one.

    Returns:
        None if the run has not saved any.

    Raises:
        DataError: what is there cannot be read.
    """
    for attempt in range(PEEKS):
        folder = _newest(checkpoints) if newest else _standing(checkpoints / BEST)
        if folder is None:
            return None
        try:
            inode = folder.stat().st_ino
            state = _read(folder)
            if folder.stat().st_ino == inode:
                return state
            problem: Exception | None = None
        except (OSError, ValueError, SafetensorError) as error:
            problem = error
        time.sleep(attempt * PEEK_SECONDS)
    raise DataError(f"{folder} is not a checkpoint that can be read: {problem}") from problem


class Checkpoints:
    """The checkpoints of one run, `step-00000120` and so on, and the best one."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Adds the checkpoint of a step and removes those beyond the newest `keep`."""
        save_state(self._folder / f"step-{step:08d}", state)
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old)

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest step, None if the run has not saved any."""
        steps = self._steps()
        return load_state(steps[-1]) if steps else None

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Replaces the state that scored best."""
        save_state(self._folder / BEST, state)

    def load_best(self) -> dict[str, Any]:
        """The state that scored best."""
        return load_state(self._folder / BEST)

    def _steps(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("step-*") if path.is_dir())


def _read(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / TENSORS)
    state = _join(json.loads((folder / VALUES).read_text(encoding="utf-8")), tensors)
    assert isinstance(state, dict)
    return state


def _newest(checkpoints: Path) -> Path | None:
    return max((path for path in checkpoints.glob("step-*") if path.is_dir()), default=None)


def _standing(folder: Path) -> Path | None:
    """A folder, or what it was before a replacement that is under way or was cut short."""
    return next((path for path in (folder, _replaced(folder)) if path.is_dir()), None)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a state, with every tensor replaced by a reference."""
    if isinstance(value, Tensor):
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        return {str(key): _split(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_new_parameters(module: torch.nn.Module, names: frozenset[str], path: Path) -> None:
    """Parameters and buffers that no pretrained file can restore, saved once in the run's folder.

    Args:
        module: the base model before any adapter acts; a file that is there wins over its values.
        names: of these parameters.
        path: `NEW_PARAMETERS` of a run.
    """
    if path.exists():
        restore_parameters(module, load_file(path))
        return
    own = {name: value for name, value in module.state_dict().items() if name in names}
    if own:
        draft = path.with_suffix(".partial")
        save_file({name: tensor.contiguous().clone() for name, tensor in own.items()}, draft)
        draft.replace(path)


@torch.no_grad()
def restore_parameters(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Writes saved parameters and buffers back into a module."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
