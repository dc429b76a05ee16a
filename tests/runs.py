"""Whole runs in this process, small enough for every test to have its own."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file
from torch import Tensor

from cola.config.schema import ExperimentConfig
from cola.experiment import run_experiment
from cola.tracking import read_metrics
from tests.configs import composed

DROPOUT = (
    "model.architecture.hidden_dropout_prob=0.1",
    "model.architecture.attention_probs_dropout_prob=0.1",
)
CONSTANT_RATE = ("schedule.name=constant", "schedule.warmup_ratio=0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @property
    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.rows if "train/loss" in row]

    @property
    def adapter_bytes(self) -> bytes:
        return (self.folder / "adapters" / "adapters.safetensors").read_bytes()

    @property
    def adapters(self) -> dict[str, Tensor]:
        return load_file(self.folder / "adapters" / "adapters.safetensors")


def config_of(*overrides: str) -> ExperimentConfig:
    tracking = [] if "tracking=wandb" in overrides else ["tracking=files"]
    return composed(*tracking, "device=cpu", *overrides).config


def run(folder: Path, *overrides: str, resume: bool = False, draws: bool = False) -> Run:
    """Trains in `folder`; without `draws` the figure, half of a tiny run's time, is left out."""
    config = config_of(*overrides)
    if resume:
        config = dataclasses.replace(config, resume=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if draws:
        return Run(folder=folder, summary=run_experiment(config, folder))
    with mock.patch("cola.experiment.plot_learning_curve", return_value=folder / "none.png"):
        return Run(folder=folder, summary=run_experiment(config, folder))


def small_synthetic(num: int = 24) -> "mock._patch[Any]":
    """Fewer rows to encode and to score."""
    return mock.patch.multiple(
        "cola.tasks.synthetic", NUM_TRAIN=4 * num, NUM_VALIDATION=num, NUM_TEST=num
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A split as `data_dir` holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
