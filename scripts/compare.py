"""Runs several configurations one after another in one process and prints them as one table.

    python scripts/compare.py demo
    python scripts/compare.py mrpc data_dir=DATA model.path=MINILM --json results.json

The comparison is a file in scripts/comparisons; further overrides apply to all of its variants.
"""

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from cola.config.store import compose_run
from cola.experiment import run_experiment
from cola.report.text import format_table
from cola.tracking import read_metrics

COMPARISONS = Path(__file__).parent / "comparisons"


def main() -> int:
    """Runs the comparison; the summaries go to --json, with every loss for a curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=sorted(path.stem for path in COMPARISONS.glob("*")))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path, help="write summaries and losses here")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("cola").setLevel(logging.INFO)
    text = (COMPARISONS / f"{arguments.comparison}.yaml").read_text(encoding="utf-8")
    comparison = yaml.safe_load(text)
    results: dict[str, Any] = {}
    for name, overrides in comparison["variants"].items():
        sys.stderr.write(f"{name}\n")
        folder = Path("outputs", "compare", arguments.comparison, name.replace(" ", "_"))
        shutil.rmtree(folder, ignore_errors=True)
        lines = [*comparison["common"], *overrides, *arguments.overrides]
        run = compose_run([*lines, f"hydra.run.dir='{folder}'"])
        folder.mkdir(parents=True)
        summary = run_experiment(run.config, folder)
        rows = read_metrics(folder)
        losses = [round(row["train/loss"], 7) for row in rows if "train/loss" in row]
        results[name] = {"overrides": lines, "summary": summary, "losses": losses}
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(_table({name: result["summary"] for name, result in results.items()}) + "\n")
    return 0


def _table(summaries: dict[str, dict[str, Any]]) -> str:
    header = ["method", "metric", "score, %", "trainable", "peak, MiB", "ms per step", "base ms",
              "offload ms", "run, s"]  # fmt: skip
    rows = []
    for name, summary in summaries.items():
        seconds = [summary[f"{part}_seconds"] for part in ("iteration", "base", "offload")]
        rows.append(
            [
                name,
                summary["result"]["metric"],
                f"{100 * summary['result']['value']:.1f}",
                f"{summary['trainable_parameters']:,}",
                f"{sum(summary['peak_mib'].values()):.1f}",
                *(f"{1000 * value:.2f}" for value in seconds),
                f"{summary['wall_seconds']:.1f}",
            ]
        )
    return format_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
