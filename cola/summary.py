"""`summary.json`: what a finished run was, found and cost. `cola-report` reads nothing else.

Keys are a contract (pinned by a test); units are in the keys.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cola
from cola.config.choices import MethodName
from cola.config.identity import SUMMARY_FILE, config_hash
from cola.config.schema import ExperimentConfig

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "hydra-core")


def build_summary(
    config: ExperimentConfig,
    *,
    run_id: str,
    task: str,
    num_users: int,
    result: Mapping[str, Any],
    num_sites: int,
    trainable_parameters: int,
    steps: int,
    adaptations: int,
    peaks_mib: Mapping[str, float],
    evaluation_peaks_mib: Mapping[str, float],
    costs: Mapping[str, float],
    evaluation_seconds: float,
    wall_seconds: float,
) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        config: as it ran, defaults resolved.
        run_id: name of the run's folder.
        task: with its subset.
        num_users: K.
        result: metric, value, split, selected_on and what else was scored.
        num_sites: M.
        trainable_parameters: of the method.
        steps: batches.
        adaptations: rounds of fitting.
        peaks_mib: training peak by device.
        evaluation_peaks_mib: peak while evaluating and generating, by device.
        costs: medians per step, keys as logged.
        evaluation_seconds: evaluation and generation, over all sittings.
        wall_seconds: training and evaluation, over all sittings.
    """
    is_lora = config.method.name is MethodName.lora
    gradient = config.method.name is MethodName.cola
    return {
        "run": {
            "id": run_id,
            "seed": config.seed,
            "config_hash": config_hash(config),
            **describe_machine(),
        },
        "model": config.model.name if config.model.path is None else config.model.path,
        "task": task,
        "method": config.method.name.name,
        "adapter": config.adapter.kind.name if gradient else "lowrank" if is_lora else None,
        "merge": config.merge.mode.name if gradient else None,
        "users": config.users.name.name,
        "num_users": num_users,
        "offload": config.offload.name.name if gradient else None,
        "result": dict(result),
        "trainable_parameters": trainable_parameters,
        "sites": num_sites,
        "steps": steps,
        "adaptations": adaptations,
        "peak_mib": dict(peaks_mib),
        "evaluation_peak_mib": dict(evaluation_peaks_mib),
        "base_seconds": costs["time/base_seconds"],
        "offload_seconds": costs["time/offload_seconds"],
        "stall_seconds": costs["time/stall_seconds"],
        "iteration_seconds": costs["time/iteration_seconds"],
        "wire_bytes_per_step": costs["wire/bytes_per_step"],
        "evaluation_seconds": evaluation_seconds,
        "wall_seconds": wall_seconds,
    }


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, whole or not at all: it marks the run as finished."""
    draft = run_dir / f"{SUMMARY_FILE}.partial"
    draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draft.replace(run_dir / SUMMARY_FILE)


def describe_machine() -> dict[str, Any]:
    """What figures were obtained with: commit, versions and hardware."""
    return {
        "commit": _commit(),
        "versions": {"cola": cola.__version__, "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
        "machine": _machine(),
    }


def _commit() -> str | None:
    """Commit of the source tree that runs, with `+` if it differs from it; None elsewhere."""
    source = Path(cola.__file__).parent
    command = ["git", "-C", str(source), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
