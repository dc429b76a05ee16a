"""The files that numbers and samples go to, which survive a kill."""

import json
import sys
from pathlib import Path

import pytest

from cola.tracking import FilesTracker, build_tracker, read_metrics, read_samples
from tests.runs import config_of

# Files -------------------------------------------------------------------------------------------


def log(folder: Path, *steps: int, last_step: int = 0) -> None:
    tracker = FilesTracker(folder, last_step=last_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 2})
    tracker.close()


def test_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = FilesTracker(tmp_path, last_step=0)
    tracker.log(1, {"train/loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    tracker.close()


def test_lines_are_cut_back_to_the_checkpoint_on_resume(tmp_path):
    log(tmp_path, 1, 2, 3, 4)
    log(tmp_path, 3, last_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_fresh_run_starts_without_lines(tmp_path):
    log(tmp_path, 1, 2)
    log(tmp_path, last_step=0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "tra', '{"step"', "\x00\x00"])
def test_torn_last_line_is_left_out(tmp_path, torn):
    log(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    log(tmp_path, 3, last_step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


SAMPLE = {"input": "a", "prediction": "b", "reference": "c"}


def log_samples(folder: Path, *steps: int, last_step: int = 0, split: str = "test") -> None:
    tracker = FilesTracker(folder, last_step=last_step)
    for step in steps:
        tracker.log_samples(step, split, [SAMPLE, SAMPLE])
    tracker.close()


def test_samples_name_their_step_and_split(tmp_path):
    log_samples(tmp_path, 3)
    assert read_samples(tmp_path) == [{"step": 3, "split": "test", **SAMPLE}] * 2


def test_samples_are_cut_back_to_the_checkpoint_on_resume(tmp_path):
    log_samples(tmp_path, 1, 2, 3)
    log_samples(tmp_path, 3, last_step=2)
    assert [row["step"] for row in read_samples(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_samples_of_a_step_and_split_are_written_once(tmp_path):
    log_samples(tmp_path, 1, 2)
    log_samples(tmp_path, 2, last_step=2)  # killed while it reported, and resumed
    log_samples(tmp_path, 2, last_step=2, split="validation")
    found = [(row["step"], row["split"]) for row in read_samples(tmp_path)]
    assert found == [(1, "test")] * 2 + [(2, "test")] * 2 + [(2, "validation")] * 2


def test_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_files_alone_never_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = build_tracker(tmp_path, config_of(), last_step=0)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({}, {})
    tracker.close()
    assert len(read_metrics(tmp_path)) == 1
