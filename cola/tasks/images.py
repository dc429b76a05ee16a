"""Image classification: scikit-learn's digits (built in) and MNIST, for models from scratch.

Pixels are scaled to [0, 1], standardised once up front and kept as float32 (C, H, W) views of
one tensor, so that a row costs nothing to fetch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cola.errors import DataError
from cola.interfaces import Problem, Split, TaskData
from cola.tasks.collate import collate_images
from cola.tasks.encoding import TaskRequest, check_labels
from cola.tasks.sources import hold_out, load_arrays, train_name

MNIST_MEAN = 0.1307  # of pixels in [0, 1]
MNIST_STD = 0.3081
DIGITS_WHITE = 16.0  # brightest pixel value
DIGITS_TEST_FRACTION = 0.2
DIGITS_SELECTION_FRACTION = 0.1  # 5 % would be 72 images, and one image 1.4 points of accuracy


def load_digits(request: TaskRequest) -> TaskData:
    """1,797 images of 8 x 8 pixels that scikit-learn ships; the set has no official split.

    Raises:
        DataError: `task.image_shape` or `task.num_labels` does not fit the set.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    source = load_sklearn_digits()
    pixels = _scale(source.images, DIGITS_WHITE, request.problem, "digits")
    labels: list[int] = source.target.tolist()
    train_indices, test_indices = _stratified(labels, DIGITS_TEST_FRACTION, request.split_seed)
    train_indices = train_indices[: request.task.max_train_rows]
    train, selection = hold_out(
        train_indices, fraction=DIGITS_SELECTION_FRACTION, seed=request.split_seed
    )
    std, mean = torch.std_mean(pixels[train])
    rows = _rows((pixels - mean) / std, labels, request.problem, "digits")
    limited = train_name(request.task.max_train_rows)
    return TaskData(
        name="digits",
        problem=request.problem,
        train=Split(name="train", rows=[rows[i] for i in train]),
        selection=Split(name=f"10 % of {limited}", rows=[rows[i] for i in selection]),
        report=Split(name="test (stratified 20 %)", rows=[rows[i] for i in test_indices]),
        collate=collate_images,
        score=request.score,
    )


def load_mnist(request: TaskRequest) -> TaskData:
    """The official split; selection is a seeded 5 % of train.

    Raises:
        DataError: the files are missing or do not fit `task.image_shape` or `task.num_labels`.
    """
    arrays = load_arrays(request.task, request.data_dir)
    limit = request.task.max_train_rows
    train_rows = _mnist_rows(arrays.x_train[:limit], arrays.y_train[:limit], request, "mnist train")
    train, selection = hold_out(train_rows, seed=request.split_seed)
    test = _mnist_rows(arrays.x_test, arrays.y_test, request, "mnist test")
    return TaskData(
        name="mnist",
        problem=request.problem,
        train=Split(name="train", rows=train),
        selection=Split(name=f"5 % of {train_name(limit)}", rows=selection),
        report=Split(name="test", rows=test),
        collate=collate_images,
        score=request.score,
    )


def _mnist_rows(
    images: NDArray[Any], labels: NDArray[Any], request: TaskRequest, name: str
) -> list[dict[str, Any]]:
    """Standardised rows of one split."""
    pixels = _scale(images, 255.0, request.problem, name)
    pixels.sub_(MNIST_MEAN).div_(MNIST_STD)  # in place: the split is 190 MB
    return _rows(pixels, labels.tolist(), request.problem, name)


def _scale(images: NDArray[Any], white: float, problem: Problem, name: str) -> Tensor:
    """Images (N, H, W) or (N, H, W, C) as float32 (N, C, H, W) in [0, 1]."""
    if images.ndim == 3:
        images = images[..., None]
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))
    if tuple(pixels.shape[1:]) != problem.image_shape:
        raise DataError(
            f"{name} has images of (channels, height, width) {tuple(pixels.shape[1:])}, "
            f"but task.image_shape is {problem.image_shape}"
        )
    return pixels.div_(white)


def _rows(
    pixels: Tensor, labels: Sequence[int], problem: Problem, name: str
) -> list[dict[str, Any]]:
    """One row per image, its pixels a view of the whole tensor."""
    if len(pixels) != len(labels):
        raise DataError(f"{name} has {len(pixels)} images, but {len(labels)} labels")
    rows = [
        {"pixels": image, "label": label}
        for image, label in zip(pixels.unbind(), labels, strict=True)
    ]
    check_labels(rows, problem, name)
    return rows


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
