"""The folder that a run and one user's own process share, and what counts as an answer in it.

    adapters.json                       by the run, at its start: what the adapters are
    round-00000012/data.safetensors     by the run: the data of one adaptation, and the adapters
    round-00000012/round.json           by the run: what else belongs to the adaptation
    round-00000012/reply.safetensors    by the user's process: its new parameters,
    round-00000012/reply.error          or what went wrong, a text
    done                                by the run: nothing will follow, and why

Everything is written under another name and renamed into place: what can be seen is complete.
`docs/local-fitting.md` has the names of the tensors. Nothing that is read here is executed.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from cola.errors import OffloadError

FORMAT_VERSION = 1
DESCRIPTION, DONE = "adapters.json", "done"
DATA, FACTS = "data.safetensors", "round.json"
REPLY, FAILURE = "reply.safetensors", "reply.error"

_SHOWN_CHARACTERS = 300
_SHOWN_NAMES = 3
_WIDEST_BYTES = 8
_NAME_BYTES = 1000


class LocalFolder:
    """One user's folder, from the run's side.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, description: Mapping[str, Any]) -> None:
        """Makes the folder ready for a run: rounds and the end of an earlier one are removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.clear()
        (self.path / DONE).unlink(missing_ok=True)
        _write_json(self.path / DESCRIPTION, {"format_version": FORMAT_VERSION, **description})

    def hand_over(
        self, number: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Writes a round, all or nothing.

        Raises:
            OffloadError: it cannot be written.
        """
        draft = self.path / f".{_round(number)}.partial"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, draft / DATA)
            _write_json(draft / FACTS, {"format_version": FORMAT_VERSION, **facts})
            draft.rename(self.path / _round(number))
        except (OSError, SafetensorError) as error:
            raise OffloadError(f"its data cannot be handed over: {error}") from error

    def has_answer(self, number: int) -> bool:
        """Whether the user's process has answered a round, for better or worse."""
        folder = self.path / _round(number)
        return (folder / REPLY).is_file() or (folder / FAILURE).is_file()

    def read_answer(
        self, number: int, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The parameters that came back.

        Args:
            number: of a round with an answer.
            shapes: of all parameters, by the names that they have in the file.
            dtype: that they are needed in.

        Raises:
            OffloadError: the process failed, or what it sent cannot be used; says what.
        """
        folder = self.path / _round(number)
        try:
            if (folder / FAILURE).is_file():
                raise OffloadError(f"its own process failed: {_read_text(folder / FAILURE)}")
            tensors = load(_read_bytes(folder / REPLY, _largest(shapes)))
        except (OSError, SafetensorError) as error:
            raise OffloadError(f"its {REPLY} cannot be read: {error}") from error
        _check_shapes(tensors, shapes)
        return {name: _usable(name, tensor, dtype) for name, tensor in tensors.items()}

    def remove(self, number: int) -> None:
        """Removes a round; a process that still works on it finds that out by itself."""
        _remove(self.path / _round(number))

    def clear(self) -> None:
        """Removes all rounds."""
        for folder in [*self.path.glob("round-*"), *self.path.glob(".round-*")]:
            _remove(folder)

    def end(self, why: str) -> None:
        """Tells the user's process to end."""
        self.clear()
        if self.path.is_dir():
            _write(self.path / DONE, why + "\n")


def _round(number: int) -> str:
    return f"round-{number:08d}"


def _largest(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes that a file with these tensors can have, of the widest type there is."""
    return sum(_WIDEST_BYTES * math.prod(shape) + _NAME_BYTES for shape in shapes.values())


def _read_bytes(path: Path, largest: int) -> bytes:
    """The file as it is now: mapped into memory, its owner could change it under us."""
    with path.open("rb") as file:
        found = file.read(largest + 1)
    if len(found) > largest:
        raise OffloadError(f"its {REPLY} has more than {largest} bytes, too many for its adapters")
    return found


def _check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise OffloadError(f"its {REPLY} lacks {_shown(missing)}; it has to hold every parameter")
    if extra := sorted(found.keys() - wanted.keys()):
        raise OffloadError(f"its {REPLY} holds {_shown(extra)}, which no adapter has")
    for name, shape in wanted.items():
        if list(found[name].shape) != list(shape):
            raise OffloadError(
                f"its {REPLY} holds {name} of shape {list(found[name].shape)}; the adapter has "
                f"{list(shape)}"
            )


def _usable(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise OffloadError(
            f"its {REPLY} holds {name} as {tensor.dtype}; send floating-point values"
        )
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise OffloadError(f"its {REPLY} holds values of {name} that are not finite")
    return tensor


def _shown(names: Sequence[str]) -> str:
    more = "" if len(names) <= _SHOWN_NAMES else f" and {len(names) - _SHOWN_NAMES} more"
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _read_text(path: Path) -> str:
    """The beginning of a text of somebody else's, on one line."""
    with path.open(encoding="utf-8", errors="replace") as file:
        text = " ".join(file.read(4 * _SHOWN_CHARACTERS).split())
    return text[:_SHOWN_CHARACTERS] or "(no reason given)"


def _remove(folder: Path) -> None:
    """Out of sight in one go, then for good."""
    gone = folder.with_name(f".{folder.name.lstrip('.')}.gone")
    try:
        folder.rename(gone)
    except OSError:
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")
