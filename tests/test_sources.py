"""Rows from folders and the hub: what is read, and what each failure says."""

import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cola.config.schema import TaskConfig
from cola.errors import ConfigError, DataError
from cola.tasks import hub
from cola.tasks.sources import Row, iter_rows, list_splits, load_arrays

MRPC = TaskConfig(name="glue", folder="glue/mrpc", hub="nyu-mll/glue", subset="mrpc", num_labels=2)
MNIST = TaskConfig(name="mnist", folder="mnist", hub="ylecun/mnist", num_labels=10)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def as_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [json.dumps(row) for row in rows]


def mrpc_rows(count: int) -> list[dict[str, Any]]:
    return [{"sentence1": f"a{i}", "sentence2": "b", "label": i % 2} for i in range(count)]


def load_rows(*arguments: Any, **settings: Any) -> list[Row]:
    return list(iter_rows(*arguments, **settings))


def read(folder: Path, *, limit: int | None = None) -> list[Mapping[str, Any]]:
    return load_rows(
        MRPC, "train", columns=("sentence1", "label"), data_dir=str(folder), limit=limit
    )


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_iter_rows_reads_compressed_and_plain_files(tmp_path: Path, suffix: str) -> None:
    write_lines(tmp_path / f"glue/mrpc/train{suffix}", [*as_lines(mrpc_rows(3)), ""])
    assert read(tmp_path) == mrpc_rows(3)


def test_iter_rows_keeps_the_first_rows_and_reads_no_further(tmp_path: Path) -> None:
    write_lines(tmp_path / "glue/mrpc/train.jsonl", [*as_lines(mrpc_rows(2)), "{broken"])
    assert read(tmp_path, limit=2) == mrpc_rows(2)


def test_missing_folder_names_path_and_nearest_set(tmp_path: Path) -> None:
    write_lines(tmp_path / "glue/mrcp/train.jsonl", as_lines(mrpc_rows(1)))
    with pytest.raises(DataError, match=r"glue/mrpc.*nearest: glue/mrcp"):
        read(tmp_path)


def test_missing_folder_says_when_no_set_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set is there"):
        read(tmp_path)


def test_missing_data_dir_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_dir=.*absent is not a folder"):
        read(tmp_path / "absent")


def test_splits_are_those_that_have_files(tmp_path: Path) -> None:
    for name in ("train.jsonl.gz", "test.jsonl", "validation.csv"):
        write_lines(tmp_path / "glue/mrpc" / name, as_lines(mrpc_rows(1)))
    assert list_splits(MRPC, str(tmp_path)) == ["test", "train"]


def test_builtin_is_the_packages_own_folder() -> None:
    assert list_splits(MRPC, "builtin") == ["train", "validation"]
    rows = load_rows(MRPC, "train", columns=("sentence1", "label"), data_dir="builtin")
    assert len(rows) == 24


def test_missing_split_lists_the_splits_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "glue/mrpc/validation.jsonl.gz", as_lines(mrpc_rows(1)))
    with pytest.raises(DataError, match=r"no split 'train'.*splits there: validation"):
        read(tmp_path)


def test_task_without_folder_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set task\.folder"):
        load_rows(TaskConfig(name="glue"), "train", columns=(), data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line 3: not valid JSON"),
        ("[1]", "line 3: holds a list"),
        ('{"sentence1": "a", "sentence2": "b"}', "line 3: lacks column label; it has sentence1"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_bad_line_names_file_and_line(tmp_path: Path, line: str, reason: str, suffix: str) -> None:
    path = tmp_path / f"glue/mrpc/train{suffix}"
    write_lines(path, [*as_lines(mrpc_rows(2)), line])
    with pytest.raises(DataError, match=reason) as error:
        read(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("broken", ["truncated", "not gzip", "not UTF-8"])
def test_unreadable_file_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "glue/mrpc/train.jsonl.gz"
    write_lines(path, as_lines(mrpc_rows(50)))
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "not gzip": b"hello",
        "not UTF-8": gzip.compress(b"\xff\xfe"),
    }
    path.write_bytes(damaged[broken])
    with pytest.raises(DataError, match=r"train.jsonl.gz cannot be read after line"):
        read(tmp_path)


def test_load_arrays_reads_npz(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    images, labels = np.zeros((2, 28, 28), np.uint8), np.arange(2)
    np.savez(
        tmp_path / "mnist/mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
    )
    arrays = load_arrays(MNIST, str(tmp_path))
    assert arrays.x_test.shape == (2, 28, 28)
    assert arrays.y_train.tolist() == [0, 1]


def test_load_arrays_names_missing_file_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    with pytest.raises(DataError, match=r"mnist.npz does not exist; it has to hold x_train"):
        load_arrays(MNIST, str(tmp_path))
    np.savez(tmp_path / "mnist/mnist.npz", x_train=np.zeros(1))
    with pytest.raises(DataError, match=r"lacks y_train, x_test, y_test; it holds x_train"):
        load_arrays(MNIST, str(tmp_path))
    (tmp_path / "mnist/mnist.npz").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        load_arrays(MNIST, str(tmp_path))


class FakeTable:
    """As much of `datasets.Dataset` as the hub reader uses."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def select(self, indices: range) -> "FakeTable":
        return FakeTable([self.rows[index] for index in indices])

    def select_columns(self, columns: list[str]) -> "FakeTable":
        return FakeTable([{name: row[name] for name in columns} for row in self.rows])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class FakeHub:
    """Stands in for the `datasets` and `huggingface_hub` packages."""

    def __init__(
        self, rows: list[dict[str, Any]], *, answers: bool = True, error: Exception | None = None
    ) -> None:
        self.rows = rows
        self.answers = answers
        self.error = error
        self.offline_flags: list[bool] = []
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(
        self, path: str, name: str | None, *, split: str, **options: str | None
    ) -> FakeTable:
        self.offline_flags.append(sys.modules["datasets.config"].HF_HUB_OFFLINE)
        self.asked.append((path, name, options))
        if self.error is not None:
            raise self.error
        return FakeTable(self.rows)

    def get_dataset_split_names(
        self, path: str, name: str | None, **options: str | None
    ) -> list[str]:
        self.asked.append((path, name, options))
        return ["train", "test"]


class GatedRepoError(Exception):
    """Stands in for the error of `huggingface_hub`."""


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeHub) -> None:
    """Replace the hub packages, whose import takes seconds."""
    config, constants = ModuleType("datasets.config"), ModuleType("huggingface_hub.constants")
    datasets, package = ModuleType("datasets"), ModuleType("huggingface_hub")
    errors = ModuleType("huggingface_hub.errors")
    for module in (config, constants):
        vars(module)["HF_HUB_OFFLINE"] = False
    vars(datasets).update(
        config=config,
        load_dataset=fake.load_dataset,
        get_dataset_split_names=fake.get_dataset_split_names,
    )
    vars(package).update(constants=constants, errors=errors)
    vars(errors).update(GatedRepoError=GatedRepoError)
    for module in (datasets, package, config, constants, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hub, "_hub_answers", lambda hub_id: fake.answers)


@pytest.mark.parametrize("answers", [True, False])
def test_hub_rows_are_read_online_or_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    fake = FakeHub(mrpc_rows(5), answers=answers)
    install(monkeypatch, fake)
    rows = load_rows(MRPC, "train", columns=("label",), data_dir=None, limit=3)
    assert rows == [{"label": 0}, {"label": 1}, {"label": 0}]
    assert fake.offline_flags == [not answers]
    assert sys.modules["datasets.config"].HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("answers", "reason"), [(False, "nobody answers"), (True, "could not be loaded")]
)
def test_hub_failure_names_what_works_offline(
    monkeypatch: pytest.MonkeyPatch, answers: bool, reason: str
) -> None:
    install(monkeypatch, FakeHub([], answers=answers, error=ConnectionError("no route")))
    expected = f"nyu-mll/glue.*{reason}.*data_dir=FOLDER.*task=digits, task=synthetic"
    with pytest.raises(DataError, match=expected):
        load_rows(MRPC, "train", columns=(), data_dir=None)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("Dataset scripts are no longer supported, but found x.py", r"task\.revision=refs/convert"),
        (
            "Revision 'x' doesn't exist for dataset 'a/b' on the Hub.",
            r"set task\.revision to a bra",
        ),
        ("BuilderConfig 'x' not found. Available: ['5768']", "third part of task.hub=OWNER/SET/CO"),
        ("Config name is missing.\nPlease pick one", "set task.hub=OWNER/SET/CONFIGURATION"),
        ('Unknown split "train". Should be one of', r"set task\.hub to a set that has it"),
        (
            "Dataset 'a/b' doesn't exist on the Hub or cannot",
            r"set task\.hub to the id of a public",
        ),
    ],
)
def test_hub_failure_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, error: str, advice: str
) -> None:
    install(monkeypatch, FakeHub([], error=ValueError(error)))
    with pytest.raises(DataError, match=f"(?s)could not be loaded from the hub.*{advice}"):
        load_rows(MRPC, "train", columns=(), data_dir=None)


def test_gated_set_asks_for_its_licence_and_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = FileNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.")
    wrapped.__cause__ = GatedRepoError("401")
    install(monkeypatch, FakeHub([], error=wrapped))
    expected = "accept the licence on https://huggingface.co/datasets/nyu-mll/glue and set HF_TOKEN"
    with pytest.raises(DataError, match=expected):
        load_rows(MRPC, "train", columns=(), data_dir=None)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"hub": "a/b"}, ("a/b", None, {"revision": None})),
        ({"hub": "imdb"}, ("imdb", None, {"revision": None})),
        ({"hub": "a/b", "subset": "c"}, ("a/b", "c", {"revision": None})),
        ({"hub": "a/b/c", "revision": "main"}, ("a/b", "c", {"revision": "main"})),
        (
            {"hub": "a/b/c", "revision": "refs/convert/parquet"},
            ("a/b", None, {"data_dir": "c", "revision": "refs/convert/parquet"}),
        ),
    ],
)
def test_hub_set_is_found_by_configuration_and_revision(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], asked: tuple[Any, ...]
) -> None:
    fake = FakeHub(mrpc_rows(1))
    install(monkeypatch, fake)
    task = TaskConfig(name="fpb", **settings)
    assert list_splits(task, None) == ["train", "test"]
    load_rows(task, "train", columns=("label",), data_dir=None)
    assert fake.asked == [asked, asked]


@pytest.mark.slow
def test_converted_branch_is_read_by_folder(tmp_path: Path) -> None:
    """What `datasets` makes of the files that such a branch holds, read from a folder."""
    import datasets

    for configuration, split in (("a", "train"), ("a", "dev"), ("b", "train")):
        folder = tmp_path / "set" / configuration / split
        folder.mkdir(parents=True)
        table = datasets.Dataset.from_list([{"text": f"{configuration} {split}"}])
        table.to_parquet(str(folder / "0000.parquet"))
    options: dict[str, Any] = {"data_dir": "a", "cache_dir": str(tmp_path / "cache")}
    loaded = datasets.load_dataset(str(tmp_path / "set"), None, **options)
    assert {name: list(split["text"]) for name, split in loaded.items()} == {
        "train": ["a train"],
        "validation": ["a dev"],
    }
    names = datasets.get_dataset_split_names(str(tmp_path / "set"), None, data_dir="a")
    assert names == ["train", "validation"]


def test_hub_set_without_a_column_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHub(mrpc_rows(1), answers=True))
    with pytest.raises(DataError, match=r"lacks column premise; it has sentence1"):
        load_rows(MRPC, "train", columns=("premise",), data_dir=None)


def test_hub_images_become_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": np.full((28, 28), i, np.uint8), "label": i} for i in range(3)]
    install(monkeypatch, FakeHub(rows, answers=True))
    arrays = load_arrays(MNIST, None)
    assert arrays.x_train.shape == (3, 28, 28)
    assert arrays.y_test.tolist() == [0, 1, 2]


def test_task_without_hub_set_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"set task\.hub or data_dir=FOLDER"):
        load_rows(TaskConfig(name="glue"), "train", columns=(), data_dir=None)


@pytest.mark.parametrize(("failure", "answers"), [("refused", True), ("unreachable", False)])
def test_probe_tells_a_refusal_from_silence(
    monkeypatch: pytest.MonkeyPatch, failure: str, answers: bool
) -> None:
    class HfHubHTTPError(Exception):
        pass

    class HfApi:
        def dataset_info(self, hub_id: str, timeout: float) -> None:
            raise HfHubHTTPError(hub_id) if failure == "refused" else OSError(f"{timeout} s")

    package, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(package).update(HfApi=HfApi, errors=errors)
    vars(errors).update(HfHubHTTPError=HfHubHTTPError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert hub._hub_answers("nyu-mll/glue") is answers
