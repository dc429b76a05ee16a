"""What a run says: its facts at the start, and scores, adapters and summary at its end."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cola.autograd_learner import AutogradLearner
from cola.config.schema import ExperimentConfig
from cola.export import export_run
from cola.horizon import Horizon
from cola.interfaces import Learner, TaskData
from cola.models import BaseModel
from cola.summary import build_summary
from cola.tracking import Trackers
from cola.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a run is made of.

    Attributes:
        config: as it runs.
        run_dir: its folder.
        base: the base model, which the learner has taken over.
        heads: pristine weights of classification heads, for the export.
        task: data and metric.
        learner: method.
    """

    config: ExperimentConfig
    run_dir: Path
    base: BaseModel
    heads: Mapping[str, Tensor]
    task: TaskData
    learner: Learner


def log_start(parts: RunParts, horizon: Horizon) -> None:
    """Says what is about to be trained on what, and for how long."""
    config, base, task = parts.config, parts.base, parts.task
    logger.info("run folder %s, seed %d", parts.run_dir, config.seed)
    logger.info(
        "model %s: %s parameters, %d sites, %s trainable by %s",
        config.model.name,
        f"{base.num_parameters:,}",
        len(base.sites),
        f"{parts.learner.num_trainable:,}",
        config.method.name.name,
    )
    logger.info(
        "task %s: %d rows to train on, selection on %d (%s), report on %d (%s)",
        task.name,
        len(task.train.rows),
        len(task.selection.rows),
        task.selection.name,
        len(task.report.rows),
        task.report.name,
    )
    logger.info(
        "%d steps of %d rows, %d adaptations, learning rate %g",
        horizon.steps,
        config.trainer.batch_size,
        horizon.adaptations,
        config.optimizer.lr,
    )


def report_run(
    parts: RunParts, trainer: Trainer, horizon: Horizon, tracker: Trackers
) -> dict[str, Any]:
    """Scores what was selected, writes the adapters, and gives the summary of the run."""
    task, progression = parts.task, trainer.progression
    found = {split.name: trainer.score(split) for split in (task.report, *task.extra_report)}
    reported = found[task.report.name]
    metric, value = next(iter(reported.scores.items()))
    result = {
        "metric": metric,
        "value": value,
        "split": task.report.name,
        "selected_on": trainer.selection.name,
        "selected_step": progression.best_step,
        "selection_value": progression.best_value,
        "scores": {name: evaluation.scores for name, evaluation in found.items()},
        "by_user": reported.by_user,
        "tokens_per_second": reported.tokens_per_second,
    }
    for name, evaluation in found.items():
        tracker.log_samples(progression.best_step, name, evaluation.samples)
    logger.info("%s %.4f on %s (best of step %d)", metric, value, task.report.name,
                progression.best_step)  # fmt: skip
    _export(parts)
    return build_summary(
        parts.config,
        run_id=parts.run_dir.name,
        task=task.name,
        result=result,
        num_sites=len(parts.base.sites),
        trainable_parameters=parts.learner.num_trainable,
        steps=horizon.steps,
        adaptations=horizon.adaptations,
        peaks_mib=progression.peaks_mib,
        evaluation_peaks_mib=progression.evaluation_peaks_mib,
        costs=trainer.median_costs(),
        evaluation_seconds=progression.evaluation_seconds,
        wall_seconds=progression.seconds,
    )


def _export(parts: RunParts) -> None:
    """Adapters as files; PEFT's form too where it can hold them."""
    config, learner, adapters = parts.config, parts.learner, parts.learner.export()
    folder = parts.run_dir / "adapters"
    if isinstance(learner, AutogradLearner) and learner.save is not None:
        learner.save(folder / "peft")
        logger.info("a PEFT folder is in %s", folder)
    if not adapters:
        return
    export_run(
        folder,
        adapters,
        parts.heads,
        scale=config.adapter.alpha,
        base=config.model.path or config.model.name,
        objective=parts.task.problem.objective,
    )
    logger.info("adapters are in %s", folder)
