"""Runs several configurations side by side and prints them as one table.

    python scripts/compare.py demo
    python scripts/compare.py glue data_dir=DATA model.path=MINILM --jobs 8 --json results.json

The comparison is a file in scripts/comparisons: `common` overrides, `variants` by name, and, if it
has them, `tasks` by name and `seeds`. Further overrides apply to all. Every run has a folder of its
own under outputs/compare. --json is written after every run; with --resume the runs that it holds
already are not done again.
"""

import argparse
import json
import logging
import multiprocessing
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    folder: Path

    @property
    def facts(self) -> Result:
        """What tells this run from others."""
        return {
            "task": self.task,
            "variant": self.variant,
            "seed": self.seed,
            "overrides": self.overrides,
        }


def main() -> int:
    """Runs the comparison; summaries and every loss go to --json. Exit code 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=sorted(path.stem for path in COMPARISONS.glob("*")))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path, help="write summaries and losses here")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json holds")
    parser.add_argument("--folder", type=Path, help="of the runs; outputs/compare/NAME")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder or Path("outputs", "compare", arguments.comparison)
    jobs = list(read_jobs(arguments.comparison, arguments.overrides, folder))
    kept = _read(arguments.json) if arguments.resume and arguments.json else []
    results = {
        index: next((r for r in kept if job.facts.items() <= r.items()), None)
        for index, job in enumerate(jobs)
    }
    left = {index: job for index, job in enumerate(jobs) if results[index] is None}
    for index, result in _run_all(left, arguments.jobs):
        results[index] = result
        if arguments.json:
            write(arguments.json, [result for result in results.values() if result])
    sys.stdout.write(table([result for result in results.values() if result]) + "\n")
    failed = [jobs[index] for index, result in results.items() if result is None]
    for job in failed:
        sys.stderr.write(f"failed: {job.folder} ({' '.join(job.overrides)})\n")
    return 1 if failed else 0


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


def _run_all(jobs: dict[int, Job], num_processes: int) -> Iterator[tuple[int, Result | None]]:
    """Results as they come in."""
    if num_processes == 1:
        yield from ((index, run(job)) for index, job in jobs.items())
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        running = {pool.submit(run, job): index for index, job in jobs.items()}
        yield from ((running[future], future.result()) for future in as_completed(running))


def read_jobs(name: str, overrides: list[str], folder: Path) -> Iterator[Job]:
    """Every task, variant and seed of a comparison."""
    comparison = yaml.safe_load((COMPARISONS / f"{name}.yaml").read_text(encoding="utf-8"))
    for seed in comparison.get("seeds", [0]):
        for task, task_lines in comparison.get("tasks", {ONLY_TASK: []}).items():
            for variant, lines in comparison["variants"].items():
                label = re.sub(r"[^A-Za-z0-9]+", "_", f"{task} {variant} s{seed}").strip("_")
                yield Job(
                    task=task,
                    variant=variant,
                    seed=seed,
                    overrides=[
                        *comparison["common"], *task_lines, *lines, f"seed={seed}", *overrides
                    ],
                    folder=folder / label,
                )  # fmt: skip


def run(job: Job) -> Result | None:
    """One run, its log to stderr; what it leaves in the results, or None if it failed."""
    from cola.config.store import compose_run
    from cola.experiment import run_experiment

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("cola").setLevel(logging.INFO)
    sys.stderr.write(f"{job.task} {job.variant}, seed {job.seed}\n")
    shutil.rmtree(job.folder, ignore_errors=True)
    try:
        composed = compose_run([*job.overrides, f"hydra.run.dir='{job.folder}'"])
        job.folder.mkdir(parents=True)
        summary = run_experiment(composed.config, job.folder)
    except Exception:
        logging.exception("%s failed", job.folder)
        return None
    losses = [row["train/loss"] for row in read_metrics(job.folder) if "train/loss" in row]
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
