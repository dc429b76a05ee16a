"""Runs every row of some tables or figures as one sweep; what is finished already is skipped.

    python scripts/run_grid.py table2                     # 96 runs of RoBERTa
    python scripts/run_grid.py table9 seed=0,1,2 hydra/launcher=parallel
    python scripts/run_grid.py all --rehearse --sample    # two steps, tiny models, 76 of 335 runs

Overrides hold for every row and win over the row's own; with several values each row is run with
every combination of them. `all` is the whole grid but the computation tables (`cola-bench`).
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence

from cola.cli.console import guard, set_up_logging
from cola.cli.outcome import BAD_CONFIG, FAILED, INTERRUPTED
from cola.cli.train import COMMAND
from cola.errors import ConfigError
from cola.grid import STAND_INS, GridRow, ablation_rows, accuracy_rows, rows_of

logger = logging.getLogger("cola.grid")

REHEARSAL = (
    "data_dir=builtin",
    "device=cpu",
    "tracking=files",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "task.max_eval_rows=8",
    "generation.max_new_tokens=8",
    "hydra.sweep.dir=outputs/smoke-grid",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 if a row failed, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="key=value: overrides"
    )
    parser.add_argument("words", nargs="+", metavar="table2|figure4|all|key=value")
    parser.add_argument("--rehearse", action="store_true", help="two steps on tiny models, CPU")
    parser.add_argument("--sample", action="store_true", help="one run of every experiment")
    arguments = parser.parse_intermixed_args(argv)
    names = [word for word in arguments.words if "=" not in word]
    given = [word for word in arguments.words if "=" in word]
    set_up_logging()
    try:
        return guard("run_grid", lambda: _run(names, given, arguments))
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on")
        return INTERRUPTED


def _run(names: Sequence[str], given: Sequence[str], arguments: argparse.Namespace) -> int:
    from cola.cli.sweep import run_sweep  # Hydra takes half a second, which --help need not wait

    rows = training_rows(names)
    if arguments.sample:
        rows = sample(rows)
    is_tiny = arguments.rehearse
    jobs = [[*row.overrides, *(stand_in(row) if is_tiny else ())] for row in rows]
    shared = ["resume=once", *(REHEARSAL if is_tiny else ()), *given]
    code = run_sweep(COMMAND, shared, rows=unique_jobs(jobs, given))
    return FAILED if code == BAD_CONFIG else code  # rows that cannot run, not the command line


def training_rows(names: Sequence[str]) -> list[GridRow]:
    """Rows of tables and figures in order, each once.

    Raises:
        ConfigError: no name, one that has no rows, or one whose rows `cola-bench` measures.
    """
    if not names:
        raise ConfigError("no table or figure named; give some of table2 ... figure11, or all")
    rows: dict[GridRow, None] = {}
    for name in names:
        every = (*accuracy_rows(), *ablation_rows())
        rows |= dict.fromkeys(every if name == "all" else rows_of(name))
    measured = next((row for row in rows if row.program != COMMAND.name), None)
    if measured is not None:
        table = measured.experiment
        raise ConfigError(f"{table}: nothing is trained; run {measured.program} experiment={table}")
    return list(rows)


def sample(rows: Iterable[GridRow]) -> list[GridRow]:
    """One row of every experiment; their sets, models and intervals take turns."""
    families: dict[str, list[GridRow]] = {}
    for row in rows:
        families.setdefault(row.experiment, []).append(row)
    return [own[turn % len(own)] for turn, own in enumerate(families.values())]


def stand_in(row: GridRow) -> Sequence[str]:
    """The override that rehearses a row on a tiny model; an image model is tiny already."""
    return [f"model={STAND_INS[row.model]}"] if row.model in STAND_INS else []


def unique_jobs(jobs: Iterable[Sequence[str]], given: Sequence[str]) -> list[list[str]]:
    """Jobs without what was given for all of them, and so perhaps fewer.

    Args:
        jobs: overrides of every row.
        given: overrides that win.
    """
    keys = [line.lstrip("+~").partition("=")[0] for line in given]
    left = (tuple(line for line in job if not _is_replaced(line, keys)) for job in jobs)
    return [list(job) for job in dict.fromkeys(left)]


def _is_replaced(line: str, keys: Iterable[str]) -> bool:
    """Whether another choice of the line's key was given, or of the group that it belongs to."""
    key = line.partition("=")[0]
    return any(key == other or key.startswith(f"{other}.") for other in keys)


if __name__ == "__main__":
    sys.exit(main())
