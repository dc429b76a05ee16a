"""Synthetic results on disk, as runs and `cola-bench` leave them, for the tests of the report."""

import json
from pathlib import Path
from typing import Any

import yaml

MACHINE = {"processor": "x86_64", "threads": 2, "gpus": []}
VERSIONS = {"cola": "0.1.0", "torch": "2.13.0"}


def summary(**changes: Any) -> dict[str, Any]:
    """Of a LoRA run on MNIST; `value`, `seed`, `by_user`, `merged`... go where they belong."""
    value, seed = changes.pop("value", 0.9), changes.pop("seed", 0)
    result = {
        "metric": changes.pop("metric", "accuracy"),
        "value": value,
        "split": "test",
        "selected_on": "5 % of train",
        "by_user": changes.pop("by_user", {}),
        "unmerged": changes.pop("unmerged", None),
        "merged": changes.pop("merged", None),
    }
    facts = {
        "id": changes.pop("id", f"run-{seed}"),
        "seed": seed,
        "config_hash": changes.pop("config_hash", "0"),
        "commit": "abc123",
        "versions": VERSIONS,
        "machine": MACHINE,
    }
    return {
        "run": facts,
        "model": "linear",
        "task": "mnist",
        "method": "lora",
        "adapter": None,
        "merge": None,
        "users": "one",
        "num_users": 1,
        "offload": None,
        "result": result,
        "trainable_parameters": 6352,
        "steps": 89200,
        "peak_mib": {"cpu": 1.0},
        "wall_seconds": 12.0,
    } | changes


def write_run(
    outputs: Path,
    *,
    settings: dict[str, Any] | None = None,
    points: dict[int, float] | None = None,
    name: str | None = None,
    **changes: Any,
) -> Path:
    """A finished run's folder; `settings` are dotted keys over those of the paper's images."""
    content = summary(**changes)
    seed = content["run"]["seed"]
    folder = outputs / "family" / (name or f"run-{len(list(outputs.glob('*/*')))}")
    folder.mkdir(parents=True)
    content["run"]["id"] = changes.get("id", folder.name)
    (folder / "summary.json").write_text(json.dumps(content))
    given = {
        "model.name": content["model"],
        "trainer.epochs": 400,
        "trainer.max_steps": None,
        "trainer.batch_size": 256,
        "trainer.interval": 1,
        "evaluation.select_on": "validation",
        "experiment_name": None,
        "data_dir": None,
        "device": "auto",
        "seed": seed,
    } | (settings or {})
    tree: dict[str, Any] = {}
    for key, value in given.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    metric = content["result"]["metric"]
    lines = [{"step": 1, "train/loss": 2.0}]
    lines += [{"step": step, f"selection/{metric}": v} for step, v in (points or {}).items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


COLA = {"method": "cola", "adapter": "lowrank", "merge": "unmerged", "offload": "none"}
"""Changes that make a run one of gradient learning."""
