"""Image sets: their pixels and splits, batches as one gather, and augmentation."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cola.batches import BatchStream, evaluation_batches, place_rows
from cola.config.schema import TaskConfig
from cola.errors import DataError
from cola.task_data import Batch, Split, TaskData, TensorRows
from cola.tasks import hub, load_task, resolve_problem
from cola.tasks.collate import collate_images
from cola.tasks.image_rows import CROP_PADDING, ImageRows, crop_and_flip
from cola.tasks.sources import load_arrays
from tests.runs import run

CPU = torch.device("cpu")
DIGITS = TaskConfig(name="digits", num_labels=10, image_shape=[1, 8, 8])
MNIST = TaskConfig(name="mnist", folder="mnist", num_labels=10, image_shape=[1, 28, 28])
CIFAR10 = TaskConfig(name="cifar10", folder="cifar10", num_labels=10, image_shape=[3, 32, 32])


def load(task: TaskConfig, data_dir: Path | None = None, *, split_seed: int = 0) -> TaskData:
    return load_task(
        task,
        resolve_problem(task, None),
        tokenizer=None,
        score=lambda **_: {},
        data_dir=None if data_dir is None else str(data_dir),
        split_seed=split_seed,
    )


def write_set(folder: Path, images: np.ndarray, *, label: int | None = None) -> None:
    """An .npz whose train and test splits are the same images."""
    (folder).mkdir()
    count = len(images)
    labels = np.arange(count, dtype=np.uint8) % 10 if label is None else np.full(count, label)
    np.savez(
        folder / f"{folder.name}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )


@pytest.mark.parametrize("task", [MNIST, CIFAR10], ids=lambda task: task.name)
def test_builtin_images_have_the_shape_of_the_set(task: TaskConfig) -> None:
    data = load(task, Path("builtin"))
    assert (len(data.train.rows), len(data.selection.rows), len(data.report.rows)) == (114, 6, 40)
    pixels, labels = zip(
        *((row["pixels"], int(row["label"])) for row in data.report.rows), strict=True
    )
    assert {tuple(image.shape) for image in pixels} == {tuple(task.image_shape or ())}
    assert set(labels) == set(range(10))
    # A digit's pixel is a square: what was written large can be read small again.
    middle = pixels[0][0, 2:26, 2:26] if task is MNIST else pixels[0][0]
    times = middle.shape[0] // 8
    assert torch.equal(
        middle, middle[::times, ::times].repeat_interleave(times, 0).repeat_interleave(times, 1)
    )
    assert middle.unique().numel() > 2


def test_builtin_images_fit_no_other_shape() -> None:
    with pytest.raises(DataError, match=r"mnist train has images of .*\(1, 28, 28\)"):
        load(dataclasses.replace(MNIST, image_shape=[1, 8, 8]), Path("builtin"))


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels_of(split: Split) -> Tensor:
    return collate_images(split.rows).inputs["pixels"]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    folder = tmp_path_factory.mktemp("data")
    write_set(folder / "cifar10", random_images(40, 32, 32, 3))
    return load(CIFAR10, folder)


# --- sets


def test_digits_are_standardised_and_stratified() -> None:
    data = load(DIGITS)
    pixels = pixels_of(data.train)  # (N, 1, 8, 8)
    assert pixels.shape[1:] == (1, 8, 8)
    assert float(pixels.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(pixels.std()) == pytest.approx(1.0, abs=1e-5)
    counts = Counter(row["label"] for row in data.report.rows)
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_digits_splits_follow_the_split_seed_and_share_no_row() -> None:
    splits = []
    for global_seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(global_seed)
        data = load(DIGITS, split_seed=split_seed)
        parts = [data.train, data.selection, data.report]
        assert sum(len(part.rows) for part in parts) == 1797
        splits.append([pixels_of(part) for part in parts])
    for first, second in zip(splits[0], splits[1], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(splits[0][2], splits[2][2])
    images = torch.cat(splits[0]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images)  # the set has no equal images


def test_mnist_is_standardised_and_split(tmp_path: Path) -> None:
    write_set(tmp_path / "mnist", np.full((40, 28, 28), 255, np.uint8))
    data = load(MNIST, tmp_path)
    assert [len(split.rows) for split in (data.train, data.selection, data.report)] == [38, 2, 40]
    assert (data.selection.name, data.report.name) == ("5 % of train", "test")
    pixels = pixels_of(data.train)
    assert pixels.shape == (38, 1, 28, 28)
    assert float(pixels.mean()) == pytest.approx((1 - 0.1307) / 0.3081, rel=1e-5)
    assert data.augment is None


def test_cifar10_is_standardised_by_channel(cifar10: TaskData) -> None:
    raw = random_images(40, 32, 32, 3).transpose(0, 3, 1, 2) / 255  # (N, 3, 32, 32)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2023, 0.1994, 0.2010])
    expected = (raw - mean[:, None, None]) / std[:, None, None]
    assert np.allclose(pixels_of(cifar10.report).numpy(), expected, atol=1e-5)
    rows = {tuple(row["pixels"].flatten().tolist()) for row in cifar10.train.rows}
    held = {tuple(row["pixels"].flatten().tolist()) for row in cifar10.selection.rows}
    assert (len(rows), len(held), len(rows & held)) == (38, 2, 0)


@pytest.mark.parametrize("task", [DIGITS, MNIST], ids=["digits", "mnist"])
def test_max_rows_limit_every_split(task: TaskConfig, tmp_path: Path) -> None:
    write_set(tmp_path / "mnist", random_images(100, 28, 28))
    limited = TaskConfig(**vars(task) | {"max_train_rows": 60, "max_eval_rows": 3})
    full, data = load(task, tmp_path), load(limited, tmp_path)
    assert (len(data.selection.rows), len(data.report.rows)) == (3, 3)
    assert len(data.train.rows) == (54 if task is DIGITS else 57)
    assert "the first 60 rows of train" in data.selection.name
    assert data.report.name.startswith("first 3 of test")
    if task is MNIST:  # digits are standardised by the rows that are trained on
        assert torch.equal(pixels_of(data.report), pixels_of(full.report)[:3])


@pytest.mark.parametrize(
    ("images", "label", "message"),
    [
        (random_images(4, 20, 28), 0, r"\(1, 20, 28\), but task.image_shape is \(1, 28, 28\)"),
        (random_images(4, 28, 28), 10, "mnist train, row 1: label 10 is not a class from 0 to 9"),
        (np.zeros((4, 28, 28)), 0, "mnist train has images of float64.*have to be uint8"),
        (random_images(4, 784), 0, "mnist train has images of uint8 with 2 axes"),
    ],
)
def test_set_that_does_not_fit_is_refused(
    images: np.ndarray, label: int, message: str, tmp_path: Path
) -> None:
    write_set(tmp_path / "mnist", images, label=label)
    with pytest.raises(DataError, match=message):
        load(MNIST, tmp_path)


def test_images_without_as_many_labels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    arrays: dict[str, Any] = {"x_train": random_images(4, 28, 28), "y_train": np.zeros(3, int)}
    arrays |= {"x_test": arrays["x_train"], "y_test": arrays["y_train"]}
    np.savez(tmp_path / "mnist/mnist.npz", **arrays)
    with pytest.raises(DataError, match="mnist train has 4 images, but 3 labels"):
        load(MNIST, tmp_path)


@pytest.mark.parametrize("column", ["img", "image"])
def test_hub_set_names_its_images_either_way(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = list(random_images(3, 32, 32, 3)), [0, 1, 2]
    monkeypatch.setattr(hub, "_load_split", lambda *_: Table({column: images, "label": labels}))
    arrays = load_arrays(CIFAR10, None)
    assert np.array_equal(arrays.x_train, images)
    assert arrays.y_test.tolist() == labels
    monkeypatch.setattr(hub, "_load_split", lambda *_: Table({column: images, "fine": labels}))
    with pytest.raises(DataError, match=f"lacks column label; it has {column}, fine"):
        load_arrays(CIFAR10, None)


class Table(dict[str, Any]):
    """As much of a `datasets.Dataset` as images are read through."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


# --- batches


def assert_equal(first: Batch, second: Batch) -> None:
    assert torch.equal(first.inputs["pixels"], second.inputs["pixels"])
    assert torch.equal(first.labels, second.labels)
    assert first.labels.dtype == second.labels.dtype
    assert first.num_terms == second.num_terms
    assert first.row_terms.tolist() == second.row_terms.tolist()


def row_by_row(data: TaskData) -> TaskData:
    """The same task from rows that cannot be gathered."""
    splits = {name: getattr(data, name) for name in ("train", "selection", "report")}
    rows = {name: Split(name=split.name, rows=list(split.rows)) for name, split in splits.items()}
    return TaskData(**vars(data) | rows)


def test_gathered_batches_are_those_of_collated_rows() -> None:
    fast = load(DIGITS)
    slow = row_by_row(fast)
    assert isinstance(fast.train.rows, TensorRows)
    assert not isinstance(slow.train.rows, TensorRows)
    streams = [BatchStream(data, batch_size=64, seed=3, device=CPU) for data in (fast, slow)]
    steps = streams[0].steps_per_epoch
    for (_, first), (_, second) in zip(
        *(stream.batches(steps - 1, steps + 1) for stream in streams), strict=True
    ):
        assert_equal(first, second)
    for (_, first), (_, second) in zip(
        *(evaluation_batches(d.report, d, batch_size=100, device=CPU) for d in (fast, slow)),
        strict=True,
    ):
        assert_equal(first, second)


def test_rows_are_a_sequence_of_examples() -> None:
    rows = ImageRows(torch.arange(12.0).view(3, 1, 2, 2), torch.tensor([5, 6, 7]))
    assert [row["label"] for row in rows] == [5, 6, 7]
    assert [row["label"] for row in rows[1:]] == [6, 7]
    assert torch.equal(rows[-1]["pixels"], torch.arange(8.0, 12.0).view(1, 2, 2))


def test_rows_stay_on_the_host_without_a_gpu(cifar10: TaskData) -> None:
    assert place_rows(cifar10, CPU) is cifar10


# The meta device stands in for a GPU: rows may move there, and nothing else would.
@pytest.mark.parametrize(("free", "moves"), [(2**30, True), (2**20, False)])
def test_rows_move_once_where_they_fit(
    free: int, moves: bool, cifar10: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**40))
    monkeypatch.setattr(
        "cola.tasks.image_rows.ImageRows.to", lambda rows, _: _moved.append(rows) or rows
    )
    _moved: list[ImageRows] = []
    place_rows(cifar10, torch.device("cuda"))
    assert len(_moved) == (3 if moves else 0)


# --- augmentation


def augmented_slowly(batch: Batch, generator: torch.Generator) -> Tensor:
    """Image by image: mirror, pad by reflection, cut."""
    pixels = batch.inputs["pixels"]
    size, pad = len(pixels), CROP_PADDING
    moves = torch.randint(-pad, pad + 1, (size, 2), generator=generator).tolist()
    flips = torch.randint(2, (size,), generator=generator).tolist()
    images = []
    for image, (down, right), flip in zip(pixels, moves, flips, strict=True):
        image = image.flip(2) if flip else image
        padded = torch.nn.functional.pad(image, (pad,) * 4, mode="reflect")
        rows, columns = pad + down, pad + right
        images.append(padded[:, rows : rows + image.shape[1], columns : columns + image.shape[2]])
    return torch.stack(images)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 7, 5)])
def test_augmentation_equals_a_slow_loop(shape: tuple[int, ...]) -> None:
    pixels = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs={"pixels": pixels}, labels=torch.arange(64), num_terms=64)
    found = crop_and_flip(batch, torch.Generator().manual_seed(1))
    wanted = augmented_slowly(batch, torch.Generator().manual_seed(1))
    assert torch.equal(found.inputs["pixels"], wanted)
    assert torch.equal(found.labels, batch.labels)
    assert found.num_terms == 64


def stream_of(data: TaskData, *, seed: int = 0) -> BatchStream:
    return BatchStream(data, batch_size=8, seed=seed, device=CPU)


def test_augmentation_is_a_function_of_seed_and_step(cifar10: TaskData) -> None:
    torch.manual_seed(5)
    first = dict(stream_of(cifar10).batches(1, 7))
    torch.manual_seed(6)
    again = dict(stream_of(cifar10).batches(4, 7))  # as a resumed run starts
    for step, batch in again.items():
        assert_equal(batch, first[step])
    plain = TaskData(**vars(cifar10) | {"augment": None})
    for step, batch in stream_of(plain).batches(1, 7):
        assert torch.equal(batch.labels, first[step].labels)
        assert not torch.equal(batch.inputs["pixels"], first[step].inputs["pixels"])


def test_augmentation_differs_between_seeds_and_steps(cifar10: TaskData) -> None:
    drawn: list[list[float]] = []

    def record(batch: Batch, generator: torch.Generator) -> Batch:
        drawn.append(torch.rand(4, generator=generator).tolist())
        return batch

    data = TaskData(**vars(cifar10) | {"augment": record})
    for seed in (0, 1):
        assert len(list(stream_of(data, seed=seed).batches(1, 10))) == 10
    assert len({tuple(numbers) for numbers in drawn}) == 20


def test_evaluation_is_never_augmented(cifar10: TaskData) -> None:
    batches = evaluation_batches(cifar10.report, cifar10, batch_size=16, device=CPU)
    pixels = torch.cat([batch.inputs["pixels"] for _, batch in batches])
    assert torch.equal(pixels, pixels_of(cifar10.report))


def test_augmented_run_that_resumes_ends_with_the_same_bits(tmp_path: Path) -> None:
    write_set(tmp_path / "cifar10", random_images(40, 32, 32, 3))
    settings = ("task=cifar10", "model=linear", f"data_dir={tmp_path}", "trainer.batch_size=8")
    settings += ("trainer.eval_every=3", "schedule.name=constant", "trainer.log_every=1")
    whole = run(tmp_path / "whole", *settings, "trainer.max_steps=6")
    run(tmp_path / "parts", *settings, "trainer.max_steps=3")
    parts = run(tmp_path / "parts", *settings, "trainer.max_steps=6", resume=True)
    assert parts.adapter_bytes == whole.adapter_bytes
    assert parts.losses == whole.losses
