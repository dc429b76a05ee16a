"""Finished runs as the report sees them, whichever file they were found in.

A run is its `summary.json`, the settings that it ran with and the scores on the way. Nothing here
needs torch: a thousand runs are read in a second.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cola.config.identity import is_identity
from cola.report.names import method_label, task_label

METRICS_FILE = "metrics.jsonl"
COLA, ONE_USER, BUILT_IN = "cola", "one", "builtin"

Point = tuple[int, float]
"""Step and value."""

# What a score does not depend on beyond rounding: seeds are averaged, devices are where, not what.
_NO_VARIANT = (
    "seed",
    "device",
    "data_dir",
    "model.path",
    "offload.name",
    "offload.device",
    "offload.workers",
    "offload.payload",
    "offload.base_gradients",
    "offload.drop_padding",
    "users.local",
    "evaluation.batch_size",
    "evaluation.num_samples",
    "generation.batch_size",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        source: the run's folder, or the file that holds it and its place there.
        settings: by dotted key; all of them, or what was overridden where a file keeps no more.
        summary: content of `summary.json`.
        command: the command line that was recorded for it; empty if none was.
        metrics: its `metrics.jsonl`; None where a file holds the points themselves.
        points: of the selection metric, where `metrics` is None.
    """

    source: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    command: str = ""
    metrics: Path | None = None
    points: tuple[Point, ...] = ()

    @property
    def id(self) -> str:
        """Name of the run's folder."""
        return str(self.summary["run"]["id"])

    @property
    def seed(self) -> int:
        """Seed of training."""
        return int(self.summary["run"]["seed"])

    @property
    def experiment(self) -> str:
        """Name of the experiment it was started by; empty without one."""
        return str(self.settings.get("experiment_name") or "")

    @property
    def model(self) -> str:
        """Base model by its name here; the folder's name for one of the user's own."""
        name = str(self.settings.get("model.name") or self.summary["model"])
        return Path(str(self.summary["model"])).name if name == "hf" else name

    @property
    def task(self) -> str:
        """With its subset, as `glue/mrpc`."""
        return str(self.summary["task"])

    @property
    def method(self) -> str:
        """`cola` or a baseline."""
        return str(self.summary["method"])

    @property
    def adapter(self) -> str:
        """Of gradient learning: the kind, or the users' kinds joined by `-`; else empty."""
        if self.method != COLA:
            return ""
        kinds = self.settings.get("users.kinds") or [self.summary["adapter"]]
        return kinds if isinstance(kinds, str) else "-".join(kinds)

    @property
    def merge(self) -> str:
        """Of gradient learning: how it was trained; else empty."""
        return str(self.summary["merge"]) if self.method == COLA else ""

    @property
    def users(self) -> str:
        """one, joint, alone or collaboration."""
        return str(self.summary["users"])

    @property
    def interval(self) -> int:
        """Batches per adaptation."""
        return int(self.settings.get("trainer.interval", 1))

    @property
    def batch_size(self) -> int | None:
        """Rows of a step; None where it is not known."""
        size = self.settings.get("trainer.batch_size")
        return None if size is None else int(size)

    @property
    def label(self) -> str:
        """The method in words, users included where there are several."""
        name = method_label(self.method, self.adapter, self.merge)
        return name if self.users == ONE_USER else f"{self.users}: {name}"

    @property
    def data_dir(self) -> str:
        """Where its data was read; empty for the hub."""
        return str(self.settings.get("data_dir") or "")

    @property
    def subject(self) -> str:
        """What was trained on what."""
        rows = " (built-in rows)" if self.data_dir == BUILT_IN else ""
        return f"{task_label(self.task)}{rows}, {self.model}"

    @property
    def length(self) -> str:
        """How long it trained: epochs, or steps where only these are known or were limited."""
        epochs = self.settings.get("trainer.epochs")
        if self.settings.get("trainer.max_steps") is None and epochs is not None:
            return f"{epochs} epoch{'s' * (epochs != 1)}"
        return f"{self.summary['steps']:,} steps"

    @property
    def metric(self) -> str:
        """Name of the judged metric."""
        return str(self.summary["result"]["metric"])

    @property
    def score(self) -> float:
        """The judged metric on the split of the report, as a share."""
        return float(self.summary["result"]["value"])

    @cached_property
    def variant(self) -> frozenset[tuple[str, str]]:
        """Settings that decide the score; equal for seeds that may be averaged."""
        return frozenset(
            (key, json.dumps(value, sort_keys=True))
            for key, value in self.settings.items()
            if is_identity(key) and not key.startswith(_NO_VARIANT)
        )

    def curve(self) -> list[Point]:
        """Selection metric by step, from the file of metrics if there is one."""
        if self.metrics is None:
            return list(self.points)
        key = f"selection/{self.metric}"
        return [(row["step"], row[key]) for row in _logged(self.metrics, key)]


def _logged(file: Path, key: str) -> Iterable[dict[str, Any]]:
    """Lines that hold a key; the others, nearly all, are not parsed."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if f'"{key}"' in line:
                yield json.loads(line)


def of_one_variant(runs: Iterable[Run]) -> list[Run]:
    """One run for each seed, all of one variant: of most seeds, fewest settings, found last."""
    variants: dict[frozenset[tuple[str, str]], dict[int, Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, {})[run.seed] = run
    by_size = sorted(variants, key=lambda variant: (len(variants[variant]), -len(variant)))
    return list(variants[by_size[-1]].values()) if by_size else []


def differences(shown: Iterable[Run], others: Iterable[Run]) -> list[str]:
    """Settings of some runs, as key=value, that not all others share."""
    common = frozenset.intersection(*(run.variant for run in others))
    own = frozenset[tuple[str, str]]().union(*(run.variant for run in shown))
    return [f"{key}={value}" for key, value in sorted(own - common)]
