"""Runs several configurations and prints them as one table.

    python scripts/compare.py demo
    python scripts/compare.py glue data_dir=DATA model.path=MINILM --json results.json \
        hydra/launcher=parallel hydra.launcher.jobs_per_device=8

The comparison is a file in scripts/comparisons: `common` overrides, `variants` by name, and, if it
has them, `tasks` by name and `seeds`. Further overrides apply to all. It is a sweep of `cola-train`
below outputs/compare: what is finished there is kept, and with --resume what --json holds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cola.cli.console import guard, set_up_logging
from cola.cli.outcome import INTERRUPTED
from cola.cli.train import COMMAND
from cola.config.overrides import is_hydra_line
from cola.errors import ConfigError
from cola.report.text import format_table
from cola.tracking import read_metrics

COMPARISONS = Path(__file__).parent / "comparisons"
ONLY_TASK = ""
MERGE_WORDS = ("unmerged", "merged")


Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a comparison."""

    task: str
    variant: str
    seed: int
    overrides: list[str]

    @property
    def facts(self) -> Result:
        """What tells this run from others."""
        return {
            "task": self.task,
            "variant": self.variant,
            "seed": self.seed,
            "overrides": self.overrides,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; summaries and losses go to --json. Exit codes are those of a sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, epilog="key=value: overrides"
    )
    names = ", ".join(sorted(path.stem for path in COMPARISONS.glob("*.yaml")))
    parser.add_argument("comparison", help=names)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, help="write summaries and losses here")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json holds")
    parser.add_argument("--folder", type=Path, help="of the runs; outputs/compare/NAME")
    arguments = parser.parse_intermixed_args(argv)
    set_up_logging()
    return guard("compare", lambda: _compare(arguments, names))


def _compare(arguments: argparse.Namespace, names: str) -> int:
    from cola.cli.sweep import run_sweep  # Hydra takes half a second, which --help need not wait

    path = COMPARISONS / f"{arguments.comparison}.yaml"
    if not path.is_file():
        raise ConfigError(f"comparison {arguments.comparison!r} does not exist; there are {names}")
    given: list[str] = arguments.overrides
    jobs = list(read_jobs(path, [line for line in given if not is_hydra_line(line)]))
    folder = arguments.folder or Path("outputs", "compare", arguments.comparison)
    kept = _read(arguments.json) if arguments.resume and arguments.json else []
    found = {
        id(job): next((r for r in kept if job.facts.items() <= r.items()), None) for job in jobs
    }
    left = [job for job in jobs if found[id(job)] is None]
    shared = ["resume=once", f"hydra.sweep.dir={folder}", *filter(is_hydra_line, given)]
    try:
        code = run_sweep(COMMAND, shared, rows=[job.overrides for job in left]) if left else 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    found |= {id(job): _result(job, folder) for job in left}
    results = [result for job in jobs if (result := found[id(job)])]
    if arguments.json and results:
        write(arguments.json, results)
    sys.stdout.write(table(results) + "\n" if results else "")
    return code


def write(path: Path, results: list[Result]) -> None:
    """All results so far, with the command and what they were obtained with."""
    from cola.summary import describe_machine

    content = {"command": " ".join(sys.argv), **describe_machine(), "runs": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    runs: list[Result] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return runs


def read_jobs(path: Path, overrides: Sequence[str]) -> Iterator[Job]:
    """Every task, variant and seed of a comparison."""
    comparison = yaml.safe_load(path.read_text(encoding="utf-8"))
    for seed in comparison.get("seeds", [0]):
        for task, task_lines in comparison.get("tasks", {ONLY_TASK: []}).items():
            for variant, lines in comparison["variants"].items():
                yield Job(
                    task=task,
                    variant=variant,
                    seed=seed,
                    overrides=[
                        *comparison["common"], *task_lines, *lines, f"seed={seed}", *overrides
                    ],
                )  # fmt: skip


def _result(job: Job, folder: Path) -> Result | None:
    """What a finished run leaves in the results."""
    from cola.cli.sweep import finished_job

    run_dir = finished_job([f"hydra.sweep.dir={folder}", *job.overrides])
    if run_dir is None:
        return None
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    losses = [row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row]
    summary.pop("run")  # one machine and commit for all
    return {**job.facts, "summary": summary, "losses": [round(loss, 7) for loss in losses]}


def table(results: list[Result]) -> str:
    """One line per variant: costs of a single task, or the scores of several."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    variants = list(dict.fromkeys(result["variant"] for result in results))
    if any(None not in [_scored(result, word) for word in MERGE_WORDS] for result in results):
        return _merge_scores(results, variants)
    if len(tasks) == 1:
        return _costs(results, variants)
    rows = []
    for variant in variants:
        cells = [
            _mean([r for r in results if r["variant"] == variant and r["task"] == task])
            for task in tasks
        ]
        rows.append([variant, *cells])
    return format_table(["method, score in %", *tasks], rows)


def _scored(result: Result, word: str) -> float | None:
    """The judged score with adapters merged or not, where the run has it."""
    found = result["summary"]["result"]
    if found.get(word) is None:
        return None
    score: float = found[word]["scores"][found["split"]][found["metric"]]
    return score


def _merge_scores(results: list[Result], variants: list[str]) -> str:
    """One line per variant, where some were scored both with merged adapters and without."""
    rows = []
    for variant in variants:
        own = [result for result in results if result["variant"] == variant]
        cells = [
            _spread([s for result in own if (s := _scored(result, word)) is not None])
            for word in MERGE_WORDS
        ]
        rows.append([variant, *cells, f"{own[0]['summary']['trainable_parameters']:,}"])
    return format_table(["method, score in %", *MERGE_WORDS, "trainable"], rows)


def _mean(results: list[Result]) -> str:
    """Mean and standard error over seeds, in percent."""
    return _spread([result["summary"]["result"]["value"] for result in results])


def _spread(scores: list[float]) -> str:
    values = [100 * score for score in scores]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "missing"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def _costs(results: list[Result], variants: list[str]) -> str:
    """One line per variant: its score over seeds, and the medians of what its runs cost."""
    header = ["method", "metric", "score, %", "trainable", "peak, MiB", "ms per step", "base ms",
              "offload ms", "run, s"]  # fmt: skip
    rows = []
    for variant in variants:
        own = [result["summary"] for result in results if result["variant"] == variant]
        parts = ("iteration_seconds", "base_seconds", "offload_seconds")
        seconds = [statistics.median(summary[part] for summary in own) for part in parts]
        rows.append(
            [
                variant,
                own[0]["result"]["metric"],
                _spread([summary["result"]["value"] for summary in own]),
                f"{own[0]['trainable_parameters']:,}",
                f"{statistics.median(sum(s['peak_mib'].values()) for s in own):.1f}",
                *(f"{1000 * value:.2f}" for value in seconds),
                f"{statistics.median(summary['wall_seconds'] for summary in own):.1f}",
            ]
        )
    return format_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
