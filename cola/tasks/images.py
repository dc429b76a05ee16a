"""Image classification for models from scratch: scikit-learn's digits (built in), MNIST, CIFAR-10.

Pixels are scaled to [0, 1], standardised once up front and kept as one float32 tensor per split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola.errors import DataError
from cola.task_data import Batch, Problem, Split, TaskData
from cola.tasks.collate import collate_images
from cola.tasks.encoding import TaskRequest
from cola.tasks.fields import check_labels
from cola.tasks.image_rows import ImageRows, crop_and_flip
from cola.tasks.sample_images import sample_arrays
from cola.tasks.sources import BUILTIN, load_arrays
from cola.tasks.splits import NamedRows, first_rows, hold_out, train_name

WHITE = 255.0  # brightest pixel value
DIGITS_WHITE = 16.0
DIGITS_TEST_FRACTION = 0.2
DIGITS_SELECTION_FRACTION = 0.1  # 5 % would be 72 images, and one image 1.4 points of accuracy


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Static facts of a published set.

    Attributes:
        mean, std: per channel, of pixels in [0, 1].
        augment: what training batches go through; None leaves them as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable[[Batch, torch.Generator], Batch] | None = None


IMAGE_SETS: dict[str, ImageSet] = {
    "mnist": ImageSet(mean=(0.1307,), std=(0.3081,)),
    "cifar10": ImageSet(
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment=crop_and_flip
    ),
}


def load_digits(request: TaskRequest) -> TaskData:
    """1,797 images of 8 x 8 pixels that scikit-learn ships; the set has no official split.

    Raises:
        DataError: `task.image_shape` or `task.num_labels` does not fit the set.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    source, task = load_sklearn_digits(), request.task
    _check(source.images, source.target, request.problem, "digits")
    rest, test = _stratified(source.target.tolist(), DIGITS_TEST_FRACTION, request.split_seed)
    train, held = hold_out(
        rest[: task.max_train_rows], fraction=DIGITS_SELECTION_FRACTION, seed=request.split_seed
    )
    pixels, labels = _scale(source.images, DIGITS_WHITE), _labels(source.target)
    std, mean = torch.std_mean(pixels[train])
    pixels.sub_(mean).div_(std)
    limited = train_name(task.max_train_rows)
    scored = (
        NamedRows(name=f"10 % of {limited}", rows=held),
        NamedRows(name="test (stratified 20 %)", rows=test),
    )
    parts = (first_rows(part, task.max_eval_rows) for part in scored)
    selection, report = (
        Split(name=part.name, rows=ImageRows(pixels[part.rows], labels[part.rows]))
        for part in parts
    )
    return TaskData(
        name="digits",
        problem=request.problem,
        train=Split(name="train", rows=ImageRows(pixels[train], labels[train])),
        selection=selection,
        report=report,
        collate=collate_images,
        score=request.score,
    )


def load_image_set(request: TaskRequest) -> TaskData:
    """MNIST or CIFAR-10 in the official splits; selection is a seeded 5 % of train.

    `data_dir=builtin` has sample images in their place.

    Raises:
        DataError: the files are missing or do not fit `task.image_shape` or `task.num_labels`.
    """
    task, facts = request.task, IMAGE_SETS[request.task.name]
    is_sample = request.data_dir == BUILTIN
    arrays = sample_arrays(task.name) if is_sample else load_arrays(task, request.data_dir)
    official = (arrays.x_train[: task.max_train_rows], arrays.y_train[: task.max_train_rows])
    test = (arrays.x_test, arrays.y_test)
    _check_bytes(*official, request.problem, f"{task.name} train")
    _check_bytes(*test, request.problem, f"{task.name} test")
    train, held = hold_out(range(len(official[0])), seed=request.split_seed)
    selection = NamedRows(name=f"5 % of {train_name(task.max_train_rows)}", rows=held)
    report = NamedRows(name="test", rows=range(len(test[0])))
    return TaskData(
        name=task.name,
        problem=request.problem,
        train=_standardised(NamedRows(name="train", rows=train), *official, facts),
        selection=_standardised(first_rows(selection, task.max_eval_rows), *official, facts),
        report=_standardised(first_rows(report, task.max_eval_rows), *test, facts),
        collate=collate_images,
        augment=facts.augment,
        score=request.score,
    )


def _standardised(
    part: NamedRows[int], images: NDArray[Any], labels: NDArray[Any], facts: ImageSet
) -> Split:
    """The images that `part` counts, chosen as bytes because they are a quarter of the size."""
    indices = list(part.rows)
    pixels = _scale(images[indices], WHITE)
    mean, std = (torch.tensor(values)[:, None, None] for values in (facts.mean, facts.std))
    pixels.sub_(mean).div_(std)  # in place: 580 MB for CIFAR-10
    return Split(name=part.name, rows=ImageRows(pixels, _labels(labels[indices])))


def _scale(images: NDArray[Any], white: float) -> Tensor:
    """Images (N, H, W) or (N, H, W, C) as float32 (N, C, H, W) in [0, 1]."""
    channels_first = torch.from_numpy(_with_channels(images)).permute(0, 3, 1, 2)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(white)


def _labels(labels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))  # (N,)


def _check(images: NDArray[Any], labels: NDArray[Any], problem: Problem, name: str) -> None:
    """Refuses a set that does not fit the problem, before anything is computed from it."""
    if len(images) != len(labels):
        raise DataError(f"{name} has {len(images)} images, but {len(labels)} labels")
    shape = _with_channels(images).transpose(0, 3, 1, 2).shape[1:]
    if shape != problem.image_shape:
        raise DataError(
            f"{name} has images of (channels, height, width) {shape}, "
            f"but task.image_shape is {problem.image_shape}"
        )
    check_labels([{"label": label} for label in labels.tolist()], problem, name)


def _check_bytes(images: NDArray[Any], labels: NDArray[Any], problem: Problem, name: str) -> None:
    """As `_check`, for images that come from a file."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{name} has images of {images.dtype} with {images.ndim} axes; they have to be uint8 "
            "(0 to 255), (N, height, width) or (N, height, width, channels)"
        )
    _check(images, labels, problem, name)


def _with_channels(images: NDArray[Any]) -> NDArray[Any]:
    return images[..., None] if images.ndim == 3 else images


def _stratified(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of (rest, `fraction` of every class), each in ascending order."""
    rest: list[int] = []
    chosen: list[int] = []
    for label in sorted(set(labels)):
        members = [index for index, other in enumerate(labels) if other == label]
        kept, held = hold_out(members, fraction=fraction, seed=seed)
        rest += kept
        chosen += held
    return sorted(rest), sorted(chosen)
