"""Where rows come from: a folder of gzipped JSON lines or `.npz` files, or the hub.

First stage of every task: raw rows in, checked for the columns that the task needs. The folder
`builtin` stands for a few hand-written rows of every text set, which this package holds (and
`sample_images` for images).
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.tasks.hub import iter_hub_rows, list_hub_splits, load_hub_arrays

Row = Mapping[str, Any]

BUILTIN = "builtin"
"""The `data_dir` that stands for this package's own rows."""

SUFFIXES = (".jsonl.gz", ".jsonl")
ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, kw_only=True)
class ImageArrays:
    """Raw images and classes of both splits.

    Attributes:
        x_train, x_test: (N, height, width) or (N, height, width, channels), uint8.
        y_train, y_test: (N,), integers.
    """

    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def list_splits(task: TaskConfig, data_dir: str | None) -> list[str]:
    """Splits that a set comes with, from its folder or from the hub.

    Raises:
        DataError: a missing folder, no hub.
    """
    if data_dir is None:
        return list_hub_splits(task)
    return _splits_in(_set_folder(_resolve(data_dir), folder_of(task)))


def iter_rows(
    task: TaskConfig,
    split: str,
    *,
    columns: Sequence[str],
    data_dir: str | None,
    limit: int | None = None,
    required: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of one split, in file order, one at a time.

    Args:
        task: names the folder below `data_dir`, or the hub's set and subset.
        split: `train`, `validation` ...
        columns: what every row must have.
        data_dir: folder of local sets, or `builtin`; None reads the hub.
        limit: first rows to keep; None keeps all.
        required: those columns whose lack in a single line of a file is an error here; None: all.

    Raises:
        DataError: a missing folder or split, a broken line, a missing column, no hub.
    """
    if data_dir is None:
        return iter_hub_rows(task, split, columns=columns, limit=limit)
    path = _split_file(_set_folder(_resolve(data_dir), folder_of(task)), split)
    checked = columns if required is None else required
    return (row for _, row in islice(read_lines(path, checked), limit))


def load_arrays(task: TaskConfig, data_dir: str | None) -> ImageArrays:
    """Images and classes from `<data_dir>/<folder>/<last part of folder>.npz`, or from the hub.

    Raises:
        DataError: a missing or unreadable file, a missing array, no hub.
    """
    if data_dir is None:
        return ImageArrays(**load_hub_arrays(task))
    folder = _set_folder(Path(data_dir), folder_of(task))
    path = folder / f"{folder.name}.npz"
    if not path.is_file():
        raise DataError(f"{path} does not exist; it has to hold {', '.join(ARRAY_NAMES)}")
    try:
        with np.load(path) as file:
            missing = [name for name in ARRAY_NAMES if name not in file]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(file)}")
            return ImageArrays(**{name: file[name] for name in ARRAY_NAMES})
    except (OSError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable .npz file: {error}") from error


def folder_of(task: TaskConfig) -> str:
    """The set's folder below `data_dir`.

    Raises:
        ConfigError: the task names none.
    """
    if task.folder is None:
        raise ConfigError(
            f"task={task.name} names no folder below data_dir; set task.folder, e.g. glue/mrpc"
        )
    return task.folder


def choices_hint(given: str, choices: Sequence[str]) -> str:
    """The tail of an error about an unknown name: the nearest choices, then all of them."""
    nearest = get_close_matches(given, choices, n=3)
    hint = f"nearest: {', '.join(nearest)}; " if nearest else ""
    return f"{hint}choose one of {', '.join(choices)}"


def _resolve(data_dir: str) -> Path:
    """The folder of local sets."""
    return Path(__file__).parent / "samples" if data_dir == BUILTIN else Path(data_dir)


def _split_file(directory: Path, split: str) -> Path:
    """The split's file, compressed or plain."""
    for suffix in SUFFIXES:
        path = directory / f"{split}{suffix}"
        if path.is_file():
            return path
    raise DataError(
        f"{directory} has no split '{split}' (tried {split}.jsonl.gz and {split}.jsonl); "
        f"splits there: {', '.join(_splits_in(directory)) or 'none'}"
    )


def _splits_in(directory: Path) -> list[str]:
    """Splits that a set's folder has files of."""
    names = (path.name for path in directory.iterdir())
    return sorted(
        {
            name.removesuffix(suffix)
            for name in names
            for suffix in SUFFIXES
            if name.endswith(suffix)
        }
    )


def _set_folder(data_dir: Path, folder: str) -> Path:
    """The set's folder, or an error that lists what `data_dir` does hold."""
    directory = data_dir / folder
    if directory.is_dir():
        return directory
    if not data_dir.is_dir():
        raise DataError(f"data_dir={data_dir} is not a folder (looked for {directory})")
    # Two levels and no deeper: data_dir may be any folder of the machine.
    patterns = ("*/*.jsonl*", "*/*/*.jsonl*", "*/*.npz", "*/*/*.npz")
    present = sorted(
        {
            path.parent.relative_to(data_dir).as_posix()
            for pattern in patterns
            for path in data_dir.glob(pattern)
        }
    )
    hint = choices_hint(folder, present) if present else "no data set is there"
    raise DataError(f"no folder {directory} for task.folder={folder}; {hint}")


def read_lines(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    """Numbers and rows of a JSON-lines file, plain or gzipped; blank lines are skipped.

    Args:
        path: gzipped if it ends in `.gz`; UTF-8, with or without a byte order mark.
        columns: what every row must have.

    Raises:
        DataError: names the file and the line, counted from 1.
    """
    number = 0
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse_line(line, f"{path}, line {number}", columns)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error}") from error


def _parse_line(line: str, place: str, columns: Sequence[str]) -> Row:
    """One line as a row with every needed column."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: holds a {type(row).__name__}; every line has to be an object")
    missing = [column for column in columns if column not in row]
    if missing:
        raise DataError(
            f"{place}: lacks column {', '.join(missing)}; it has {', '.join(row) or 'none'}"
        )
    return row
