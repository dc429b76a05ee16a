"""Where metrics go: `metrics.jsonl` in the run's folder, always, and Weights & Biases if asked.

Without an API key Weights & Biases writes offline files into the same folder; it never prompts and
its failure never stops a run.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cola.config.choices import TrackingName
from cola.config.schema import TrackingConfig

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    """Receives a run's numbers."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One logged step; every key carries its unit if it has one."""

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The end of a run that succeeded."""

    def close(self) -> None:
        """Releases files, whatever happened."""


class FilesTracker:
    """One JSON line per logged step."""

    def __init__(self, run_dir: Path, *, last_step: int) -> None:
        """Keeps lines up to `last_step`, where a resumed run goes on."""
        self._path = run_dir / METRICS
        kept = [row for row in read_metrics(run_dir) if row["step"] <= last_step]
        draft = self._path.with_suffix(".partial")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        draft.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and hands it to the system, so that a killed run keeps it."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The summary has a file of its own."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbTracker:
    """Weights & Biases, online with a key and offline without."""

    def __init__(self, run_dir: Path, config: TrackingConfig, *, run: Mapping[str, Any]) -> None:
        import wandb

        has_key = bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_key()
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=list(config.tags),
            dir=run_dir,
            id=run["id"],
            name=run["id"],
            group=run["group"],
            config=run["config"],
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of every curve."""
        with _tolerated():
            self._run.log(dict(metrics), step=step)

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The run's summary and figures."""
        import wandb

        with _tolerated():
            self._run.summary.update(dict(summary))
            self._run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    def close(self) -> None:
        """Writes what is left."""
        with _tolerated():
            self._run.finish()


@contextmanager
def _tolerated() -> Iterator[None]:
    """A tracker must not cost a run: its failure is a warning, the run's own files go on."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        logger.warning("Weights & Biases failed (%s); the run goes on with metrics.jsonl", error)


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.finish(summary, figures)

    def close(self) -> None:
        """Every tracker."""
        for tracker in self._trackers:
            tracker.close()


def build_tracker(
    run_dir: Path, config: TrackingConfig, *, run: Mapping[str, Any], last_step: int
) -> Trackers:
    """The trackers of a run; `run` holds its id, group and resolved configuration."""
    trackers: list[Tracker] = [FilesTracker(run_dir, last_step=last_step)]
    if config.name is TrackingName.wandb:
        with _tolerated():
            trackers.append(WandbTracker(run_dir, config, run=run))
    return Trackers(trackers)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All logged lines of a run; a last line cut short by a kill is left out."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _has_netrc_key() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
