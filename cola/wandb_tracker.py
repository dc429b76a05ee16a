"""A run in Weights & Biases: named, grouped and tagged, its numbers over steps, its summary.

Without a key it writes offline files into the run's folder; it never prompts, and its failure never
stops a run. `scripts/wandb_dashboards.py` makes views of what is sent here.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cola.config.identity import config_values
from cola.config.schema import ExperimentConfig
from cola.run_labels import describe, run_group, run_name

logger = logging.getLogger(__name__)

STEP = "step"
"""Axis of every number. Not W&B's own step, which counts calls and drops what comes late: samples
of an earlier step, and the lines that a resumed run writes again."""

NUMBERS: dict[str, str | None] = {
    "train/*": None,
    "train/loss": "min,last",
    "selection/*": "max,last",
    "selection/loss": "min,last",
    "memory/*": "max",
    "time/*": None,
    "wire/*": None,
    "merge/*": None,
    "adalora/*": None,
    "samples/*": None,
}
"""What the summary keeps of numbers by name; None: the last one. Patterns must not overlap (one of
them would win by chance), nor may a pattern with a summary hold tables (they would be taken apart).
"""


class WandbTracker:
    """Weights & Biases, online with a key and offline without."""

    def __init__(self, run_dir: Path, config: ExperimentConfig) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        labels = describe(config)
        self._run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            dir=run_dir,
            id=run_dir.name,
            name=run_name(config),
            group=run_group(config),
            job_type=labels.method,
            tags=list(dict.fromkeys([*labels.tags, *config.tracking.tags])),
            config={**config_values(config), "labels": asdict(labels)},
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, init_timeout=30, console="off"),
        )
        self._run.define_metric(STEP, hidden=True)
        for name, kept in NUMBERS.items():
            self._run.define_metric(name, step_metric=STEP, summary=kept)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of every curve."""
        with tolerated():
            self._run.log(_plain_keys({STEP: step, **metrics}))

    def log_samples(self, step: int, split: str, samples: Sequence[Mapping[str, str]]) -> None:
        """A table; its rows name their step, for tables are often looked at alone."""
        import wandb

        if not samples:
            return
        columns: list[str | int] = [STEP, *samples[0]]
        rows = [[step, *sample.values()] for sample in samples]
        with tolerated():
            table = wandb.Table(columns=columns, data=rows)
            self._run.log({STEP: step, f"samples/{split}": table})

    def finish(self, summary: Mapping[str, Any], figures: Mapping[str, Path]) -> None:
        """The run's summary and figures."""
        import wandb

        with tolerated():
            self._run.summary.update(_plain_keys(summary))
            self._run.log({name: wandb.Image(str(path)) for name, path in figures.items()})

    def close(self) -> None:
        """Writes what is left."""
        with tolerated():
            self._run.finish()


@contextmanager
def tolerated() -> Iterator[None]:
    """A tracker must not cost a run: its failure is a warning, the run's own files go on."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        logger.warning("Weights & Biases failed (%s); the run goes on with metrics.jsonl", error)


def has_key() -> bool:
    """Whether there is an API key, in the environment or of an earlier login."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _plain_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`cuda0` for `cuda:0`: a column of W&B is called section:name, so names have no colon."""
    return {
        key.replace(":", ""): _plain_keys(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }
