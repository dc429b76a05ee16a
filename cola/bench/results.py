"""`results.json`: every row that was measured, by identity, and the calls that measured them.

Written whole after every row, so that a call may end at any moment. Ratios are to rows of the same
machine, settings, model, batch size and lengths, of the same call where that has them.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola.bench.row import FLOOR, BenchRow
from cola.config.identity import config_hash
from cola.config.schema import BenchConfig
from cola.summary import describe_machine

RESULTS_FILE = "results.json"

REFERENCES = ("lora", "lora-bfloat16", FLOOR)
"""Labels of rows that others are divided by."""

_HARDWARE = ("processor", "threads", "gpus")
# Overrides that choose rows or how they are measured, not what all of them are.
_NO_SETTINGS = ("bench.", "experiment=", "hydra.", "data_dir=", "tracking")

Row = dict[str, Any]


class Results:
    """The rows of one folder."""

    def __init__(self, folder: Path, bench: BenchConfig, command: Sequence[str]) -> None:
        """Reads what earlier calls left.

        Args:
            folder: exists.
            bench: how rows are measured.
            command: of this call: program and overrides.
        """
        self._file, self._bench = folder / RESULTS_FILE, bench
        self._settings = sorted(line for line in command[1:] if not line.startswith(_NO_SETTINGS))
        stored: dict[str, Any] = {}
        if self._file.exists():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
        self._calls: list[dict[str, Any]] = stored.get("calls", [])
        self._rows: dict[str, Row] = {row["identity"]: row for row in stored.get("rows", [])}
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._call = {"command": list(command), "started": started, **describe_machine()}
        self._machine = {key: self._call["machine"][key] for key in _HARDWARE}

    @property
    def rows(self) -> list[Row]:
        """All rows of the folder; those that may be compared stand together."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self._rows.values():
            groups.setdefault(_setting(row), []).append(row)
        return [row for group in groups.values() for row in group]

    def identity(self, row: BenchRow) -> str:
        """Equal for rows that would be measured alike, on machines that are alike."""
        facts = [
            row.name,
            config_hash(row.config),
            self._bench.lengths.name,
            self._bench.warmup,
            self._bench.iterations,
            self._machine,
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def has(self, row: BenchRow) -> bool:
        """Whether a row is done: measured, or known not to fit."""
        found = self._rows.get(self.identity(row), {})
        return "seconds" in found or "does_not_fit" in found

    def put(self, row: BenchRow, facts: Mapping[str, Any]) -> None:
        """Keeps a row, on disk too; it takes the place of one that was measured in another way."""
        if self._call not in self._calls:
            self._calls.append(self._call)
        found: Row = {
            "identity": self.identity(row),
            "call": self._calls.index(self._call),
            "machine": self._machine,
            "settings": self._settings,
            **facts,
        }
        for identity, other in list(self._rows.items()):
            if other["label"] == found["label"] and _setting(other) == _setting(found):
                del self._rows[identity]
        self._rows[found["identity"]] = found
        add_ratios(list(self._rows.values()))
        draft = self._file.with_name(f"{RESULTS_FILE}.partial")
        content = {"calls": self._calls, "rows": self.rows}
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._file)


def add_ratios(rows: Sequence[Row]) -> None:
    """Gives every measured row `ratios`: seconds and base memory by those of reference rows."""
    for row in rows:
        if "seconds" in row:
            row["ratios"] = {
                reference["label"]: {
                    "seconds": row["seconds"] / reference["seconds"],
                    "base_mib": row["base_mib"] / reference["base_mib"],
                    "same_call": row["call"] == reference["call"],
                }
                for reference in _references(row, rows)
            }


def _references(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """The rows to divide by, at most one for each label: of the same call, else the newest."""
    for label in REFERENCES:
        candidates = [
            other
            for other in rows
            if other["label"] == label and "seconds" in other and _setting(other) == _setting(row)
        ]
        if candidates:
            yield max(candidates, key=lambda one: (one["call"] == row["call"], one["call"]))


def _setting(row: Row) -> tuple[Any, ...]:
    """What rows have to agree in to be compared."""
    machine = json.dumps(row["machine"], sort_keys=True)
    return machine, tuple(row["settings"]), row["model"], row["lengths"], row["batch_size"]
