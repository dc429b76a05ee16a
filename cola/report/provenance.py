"""How numbers were obtained: runs, machines, versions and the commands that make them again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cola.grid import GridRow
from cola.report.matching import Match
from cola.report.names import task_label
from cola.report.runs import BUILT_IN, Run

# Settings that a command names, so that it does not depend on defaults.
_SETTINGS = (
    "task.max_train_rows",
    "task.max_eval_rows",
    "task.max_length",
    "optimizer.lr",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "evaluation.select_on",
)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run for a reader who wants to check it."""

    source: str
    label: str
    task: str
    seed: int
    score: float
    steps: int
    seconds: float
    environment: str
    command: str


def run_facts(runs: Iterable[Run], rows: Mapping[int, GridRow]) -> list[RunFacts]:
    """What is known of how each run came about.

    Args:
        runs: finished.
        rows: of the grid, by the `id()` of the run that belongs to them.
    """
    return [
        RunFacts(
            source=run.source,
            label=run.label,
            task=task_label(run.task),
            seed=run.seed,
            score=100 * run.score,
            steps=run.summary["steps"],
            seconds=run.summary["wall_seconds"],
            environment=environment(run.summary["run"]),
            command=run.command or _command(run, rows.get(id(run))),
        )
        for run in runs
    ]


def rows_by_run(matches: Sequence[Match]) -> dict[int, GridRow]:
    """The grid's row of every run that has one, by the run's `id()`."""
    return {id(match.run): match.row for match in matches}


def environment(facts: Mapping[str, Any]) -> str:
    """Machine, versions and commit in words.

    Args:
        facts: of a run or of a call of `cola-bench`; what is missing is not said.
    """
    machine, versions = facts.get("machine") or {}, facts.get("versions") or {}
    if isinstance(machine, str):
        hardware = machine
    else:
        gpus = machine.get("gpus") or []
        where = f"{len(gpus)} x {gpus[0]}" if gpus else machine.get("processor", "")
        threads = machine.get("threads")
        hardware = f"{where}, {threads} threads" if threads else where
    words = [f"{name} {number}" for name, number in versions.items()]
    commit = facts.get("commit")
    return "; ".join(filter(None, [hardware, ", ".join(words), f"commit {commit}" * bool(commit)]))


def _command(run: Run, row: GridRow | None) -> str:
    """The row's command with the run's own settings; without a row those have to do."""
    settings = run.settings
    parts = [row.command] if row else ["cola-train", f"task={run.task.partition('/')[0]}"]
    if row is None or run.model != row.model:
        parts.append(f"model={settings.get('model.name', run.model)}")
    if row is None:
        parts += _choices(run)
    parts += [f"{k}={_word(settings[k])}" for k in _SETTINGS if settings.get(k) is not None]
    if run.data_dir:
        parts.append(f"data_dir={BUILT_IN if run.data_dir == BUILT_IN else 'DATA'}")
    return " ".join([*parts, f"seed={run.seed}"])


def _choices(run: Run) -> list[str]:
    """What a row's experiment would say."""
    subset = run.task.partition("/")[2]
    parts = [f"task.subset={subset}"] if subset else []
    parts.append(f"method={run.method}")
    if run.adapter:
        parts += [f"adapter={run.adapter}", f"merge={run.merge}", f"users={run.users}"]
        parts.append(f"trainer.interval={run.interval}")
    return parts


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
