"""What a run says: its facts at the start, and scores, adapters and summary at its end."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola.autograd_learner import AutogradLearner
from cola.config.choices import EvaluationMerge, MergeMode, MethodName, UsersMode
from cola.config.schema import ExperimentConfig
from cola.evaluation import Evaluation
from cola.export import export_run
from cola.horizon import Horizon
from cola.interfaces import Learner
from cola.models import BaseModel
from cola.summary import build_summary
from cola.task_data import TaskData
from cola.tracking import Trackers
from cola.trainer import Trainer
from cola.user_rows import EVERYONE, UserId, user_folder

logger = logging.getLogger(__name__)

MAX_LISTED = 10
"""Users whose rows are counted at the start of a run."""

MERGE_WORDS: dict[bool | None, str | None] = {True: "merged", False: "unmerged", None: None}
"""How a model was scored; None where a method has nothing to merge."""


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
    _log_users(config.users.name, task)


def _log_users(mode: UsersMode, task: TaskData) -> None:
    """Users, K and their training rows."""
    if mode is UsersMode.one or task.train.owners is None:
        return
    counts = torch.bincount(task.train.owners, minlength=len(task.users)).tolist()
    pairs = list(zip(task.users, counts, strict=True))
    shown = ", ".join(f"{user} {num}" for user, num in pairs[:MAX_LISTED])
    more = f" and {len(pairs) - MAX_LISTED} more" if len(pairs) > MAX_LISTED else ""
    logger.info("users=%s, K = %d; rows to train on: %s%s", mode.name, len(pairs), shown, more)


def evaluates_merged(config: ExperimentConfig) -> bool | None:
    """Whether a run's scores are those of merged adapters; None: the method has none to merge.

    With `evaluation.merge=both` they are as training has them, and the others come beside.
    """
    if config.method.name is not MethodName.cola:
        return None
    if config.evaluation.merge in (EvaluationMerge.auto, EvaluationMerge.both):
        return config.merge.mode is MergeMode.merged
    return config.evaluation.merge is EvaluationMerge.merged


def report_run(
    parts: RunParts, trainer: Trainer, horizon: Horizon, tracker: Trackers
) -> dict[str, Any]:
    """Scores what was selected, writes the adapters, and gives the summary of the run."""
    task, progression = parts.task, trainer.progression
    splits = (task.report, *task.extra_report)
    found = {split.name: trainer.score(split) for split in splits}
    reported = found[task.report.name]
    metric, value = next(iter(reported.scores.items()))
    merged = evaluates_merged(parts.config)
    by_merge = {MERGE_WORDS[merged]: _described(found, task)}
    if parts.config.evaluation.merge is EvaluationMerge.both and merged is not None:
        other = {split.name: trainer.score(split, merged=not merged) for split in splits}
        by_merge[MERGE_WORDS[not merged]] = _described(other, task)
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
        "merge": MERGE_WORDS[merged],
        "unmerged": by_merge.get("unmerged"),
        "merged": by_merge.get("merged"),
    }
    for name, evaluation in found.items():
        tracker.log_samples(progression.best_step, name, evaluation.samples)
    for word, described in by_merge.items():
        best = described["scores"][task.report.name][metric]
        how = "" if word is None else f"{word}, "
        logger.info("%s %.4f on %s (%sbest of step %d)", metric, best, task.report.name, how,
                    progression.best_step)  # fmt: skip
    _export(parts)
    return build_summary(
        parts.config,
        run_id=parts.run_dir.name,
        task=task.name,
        num_users=1 if parts.config.users.name is UsersMode.one else len(task.users),
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


def _described(found: Mapping[str, Evaluation], task: TaskData) -> dict[str, Any]:
    """Scores of all reported splits, and those of every user on the main one."""
    return {
        "scores": {name: evaluation.scores for name, evaluation in found.items()},
        "by_user": found[task.report.name].by_user,
    }


def _export(parts: RunParts) -> None:
    """Adapters as files, in a folder of every user's own where they have their own."""
    learner, folder = parts.learner, parts.run_dir / "adapters"
    if isinstance(learner, AutogradLearner) and learner.save is not None:
        learner.save(folder / "peft")
        logger.info("a PEFT folder is in %s", folder)
    alphas = {user.name: user.alpha for user in parts.task.user_settings}
    alphas = alphas or {EVERYONE: parts.config.adapter.alpha}
    have = [_export_adapters(parts, folder, user, alpha) for user, alpha in alphas.items()]
    if all(have):
        logger.info("adapters are in %s", folder)


def _export_adapters(parts: RunParts, folder: Path, user: UserId, alpha: float) -> bool:
    """Adapters of one owner, in PEFT's form too where it can hold them; whether there are any."""
    adapters = parts.learner.export(user)
    if adapters:
        export_run(
            folder / user_folder(user),  # EVERYONE's is the folder itself
            adapters,
            parts.heads,
            scale=alpha,
            base=parts.config.model.path or parts.config.model.name,
            objective=parts.task.problem.objective,
        )
    return bool(adapters)
