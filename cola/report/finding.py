"""Finds runs and measurements below folders, in whichever of the project's files they are.

A run's folder holds `config.yaml` and, once it has finished, `summary.json`; files of
`scripts/compare.py` and our own `runs.json` hold many runs, `results.json` of `cola-bench` rows of
the computation tables. What is broken is named and left out.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cola.config.identity import CONFIG_FILE, SUMMARY_FILE
from cola.errors import DataError
from cola.report.runs import METRICS_FILE, Run

RUNS_FILE = "runs.json"
_NEEDED = (
    "run",
    "model",
    "task",
    "method",
    "adapter",
    "merge",
    "users",
    "offload",
    "result",
    "steps",
    "trainable_parameters",
    "peak_mib",
    "wall_seconds",
)
_GROUPS = ("model", "task", "adapter", "merge", "method", "users", "offload", "tracking")

BenchRow = dict[str, Any]


@dataclass(kw_only=True)
class Found:
    """What lies below some folders.

    Attributes:
        runs: finished, each once.
        bench_rows: of `cola-bench`, finished or not, each once, those of one section together.
        unfinished: folders of runs that go on or were stopped.
        broken: one message for each file that cannot be read.
    """

    runs: list[Run] = field(default_factory=list)
    bench_rows: list[BenchRow] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.runs and not self.bench_rows


def find(paths: Sequence[Path]) -> Found:
    """Everything below some folders, and in some files.

    Raises:
        DataError: a path does not exist, or a file given by name holds no results.
    """
    found = Found()
    for path in paths:
        if path.is_dir():
            _search(path, found)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder; give folders of runs, as outputs")
        elif not _read_results(path, found):
            raise DataError(
                f"{path}: holds no results; give a folder of runs, {RUNS_FILE}, or a JSON file "
                "that cola-bench or scripts/compare.py wrote"
            )
    # The same run may lie in its folder and in a file that was made of it: folders came first.
    by_identity = {_identity(run): run for run in reversed(found.runs)}
    found.runs = list(reversed(by_identity.values()))
    found.bench_rows = _newest(found.bench_rows)
    return found


_SECTION = ("machine", "settings", "table", "model", "dtype", "users", "lengths", "batch_size")
"""What rows of `cola-bench` agree in that stand in one section."""


def _newest(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Every row once, as it was measured last, and those of one section together."""

    def key(row: BenchRow) -> tuple[str, object]:
        return json.dumps([row.get(fact) for fact in _SECTION], sort_keys=True), row.get("label")

    def age(row: BenchRow) -> tuple[bool, str]:
        return "seconds" in row, row["source"].get("started", "")

    newest = {key(row): row for row in sorted(rows, key=age)}
    sections: dict[str, list[BenchRow]] = {}
    for section, label in dict.fromkeys(map(key, rows)):
        sections.setdefault(section, []).append(newest[section, label])
    return [row for own in sections.values() for row in own]


def _identity(run: Run) -> tuple[object, ...]:
    # No two runs of one name and configuration take the same time to the microsecond.
    return run.id, run.summary["run"].get("config_hash"), run.summary["wall_seconds"]


def _search(top: Path, found: Found) -> None:
    results: list[Path] = []
    for name, folders, files in os.walk(top):
        folders.sort()
        folder = Path(name)
        if CONFIG_FILE in files or SUMMARY_FILE in files:
            folders.clear()  # checkpoints and adapters: nothing of ours
            _read_folder(folder, is_finished=SUMMARY_FILE in files, found=found)
        else:
            results += [folder / file for file in sorted(files) if file.endswith(".json")]
    for path in results:
        _read_results(path, found)


def _read_folder(folder: Path, *, is_finished: bool, found: Found) -> None:
    if not is_finished:
        found.unfinished.append(folder)
        return
    try:
        run = Run(
            source=str(folder),
            settings=_settings(folder / CONFIG_FILE),
            summary=_checked(json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))),
            metrics=folder / METRICS_FILE,
        )
    except (OSError, ValueError, yaml.YAMLError) as error:
        found.broken.append(f"{folder}: {_first_line(error)}")
    else:
        found.runs.append(run)


def _settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    # The C loader where PyYAML has it: ten times as fast.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no settings")
    return dict(_flatten(content))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _checked(summary: Any) -> dict[str, Any]:
    """A summary with what every table needs.

    Raises:
        ValueError: what is missing.
    """
    if not isinstance(summary, dict):
        raise ValueError(f"{SUMMARY_FILE} holds no summary")
    missing = [key for key in _NEEDED if key not in summary]
    if not missing:
        missing = [f"result.{key}" for key in ("metric", "value", "split", "selected_on")
                   if key not in summary["result"]]  # fmt: skip
    if missing:
        raise ValueError(f"no {', '.join(missing)} in the summary")
    if not isinstance(summary["result"]["value"], (int, float)):
        raise ValueError(f"result.value={summary['result']['value']!r} is no number")
    return summary


def _read_results(path: Path, found: Found) -> bool:
    """Takes what a JSON file holds; whether it is one of ours at all."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.broken.append(f"{path}: {_first_line(error)}")
        return True
    if not isinstance(content, dict):
        return False
    if "calls" in content and "rows" in content:
        calls = content["calls"]
        found.bench_rows += [row | {"source": calls[row["call"]]} for row in content["rows"]]
        return True
    entries = content.get("runs")
    if not isinstance(entries, list) or not all("summary" in entry for entry in entries):
        return False
    for index, entry in enumerate(entries):
        try:
            found.runs.append(_stored_run(path, index, entry, content))
        except (KeyError, ValueError) as error:
            found.broken.append(f"{path}, run {index}: {_first_line(error)}")
    return True


def _stored_run(
    path: Path, index: int, entry: Mapping[str, Any], content: Mapping[str, Any]
) -> Run:
    """A run of a file; what a file says once for all of them is filled in."""
    lines = entry.get("overrides", [])
    facts = {
        "id": f"{path.stem}-{index}",
        "seed": entry.get("seed", 0),
        **{key: content[key] for key in ("commit", "versions", "machine") if key in content},
    }
    return Run(
        source=entry.get("source", f"{path}, run {index}"),
        settings=entry.get("settings") or dict(map(_override, lines)),
        summary=_checked({"run": facts} | entry["summary"]),
        command=" ".join(("cola-train", *lines)) if lines else "",
        points=tuple((step, value) for step, value in entry.get("points", [])),
    )


def _override(line: str) -> tuple[str, Any]:
    """Key and value of a line as `trainer.epochs=3`; a group's choice is its name."""
    key, _, value = line.lstrip("+").partition("=")
    return f"{key}.name" if key in _GROUPS else key, yaml.safe_load(value)


def runs_json(runs: Sequence[Run]) -> str:
    """Runs as one file, to be kept and to be read again by `find`."""
    entries = [
        {
            "source": run.source,
            "settings": dict(run.settings),
            "summary": dict(run.summary),
            "points": run.curve(),
        }
        for run in runs
    ]
    return json.dumps({"runs": entries}, indent=1) + "\n"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
