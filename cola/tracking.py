"""Where numbers and samples go: files in the run's folder, always, and Weights & Biases if asked.

`metrics.jsonl` has a line per logged step, `samples.jsonl` one per prediction kept to be read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from cola.config.choices import TrackingName
from cola.config.schema import ExperimentConfig
from cola.wandb_tracker import WandbTracker, tolerated

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class Tracker(Protocol):
    """Receives a run's numbers."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One logged step; every key carries its unit if it has one."""

    def log_samples(self, step: int, split: str, samples: Sequence[Mapping[str, str]]) -> None:
        """Predictions of the parameters of a step on a split; all samples have equal keys."""

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The end of a run that succeeded."""

    def close(self) -> None:
        """Releases files, whatever happened."""


class FilesTracker:
    """JSON lines: one per logged step, and one per sample."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Keeps lines up to `last_step`, where a resumed run goes on."""
        self._file, _ = _reopen(run_dir / METRICS, last_step)
        self._samples, kept = _reopen(run_dir / SAMPLES, last_step)
        # A run that was killed while it reported has written the samples of its report already.
        self._sampled = {(row["step"], row["split"]) for row in kept}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and hands it to the system, so that a killed run keeps it."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def log_samples(self, step: int, split: str, samples: Sequence[Mapping[str, str]]) -> None:
        """Appends a line per sample, once for every step and split."""
        if (step, split) in self._sampled:
            return
        self._sampled.add((step, split))
        rows = ({"step": step, "split": split, **sample} for sample in samples)
        self._samples.write("".join(json.dumps(row) + "\n" for row in rows))
        self._samples.flush()

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The summary has a file of its own."""

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._samples.close()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_samples(self, step: int, split: str, samples: Sequence[Mapping[str, str]]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log_samples(step, split, samples)

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.finish(summary, figures)

    def close(self) -> None:
        """Every tracker."""
        for tracker in self._trackers:
            tracker.close()


def build_tracker(run_dir: Path, config: ExperimentConfig, *, last_step: int) -> Trackers:
    """The trackers of a run, which goes on after `last_step`."""
    trackers: list[Tracker] = [FilesTracker(run_dir, last_step=last_step)]
    if config.tracking.name is TrackingName.wandb:
        with tolerated():
            trackers.append(WandbTracker(run_dir, config))
    return Trackers(trackers)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All logged lines of a run; a last line cut short by a kill is left out."""
    return _read_lines(run_dir / METRICS)


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """All samples of a run, each with its step and split; without a line that a kill cut short."""
    return _read_lines(run_dir / SAMPLES)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _reopen(path: Path, last_step: int) -> tuple[IO[str], list[dict[str, Any]]]:
    """A file of lines cut back to a step and opened to go on, and the lines that it keeps."""
    kept = [row for row in _read_lines(path) if row["step"] <= last_step]
    draft = path.with_suffix(".partial")
    draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    draft.replace(path)
    return path.open("a", encoding="utf-8"), kept
