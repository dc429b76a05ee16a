"""One run from configuration to summary: builds every part, wires them, trains, reports."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cola.batches import BatchStream
from cola.checkpoint import Checkpoints, new_parameters, restore_parameters
from cola.config.choices import AdapterKind, EvaluationMerge, MergeMode, MethodName
from cola.config.identity import CONFIG_FILE, config_values, save_config
from cola.config.schema import ExperimentConfig
from cola.errors import SiteError
from cola.export import can_export_peft, export_adapters, export_peft, head_weights
from cola.interfaces import Learner, Problem, TaskData
from cola.learners import build_learner
from cola.metrics import build_score
from cola.models import BaseModel, build_base_model, check_rank, shared_parameter_sites
from cola.optimizers import LearningRateSchedule
from cola.report.curves import plot_learning_curve
from cola.runtime import resolve_device, seed_everything, stop_request
from cola.summary import build_summary, write_summary
from cola.tasks import load_task, metric_name, resolve_problem
from cola.tracking import build_tracker, read_metrics
from cola.trainer import Horizon, Trainer

logger = logging.getLogger(__name__)

NEW_PARAMETERS = "base.safetensors"


@dataclass(frozen=True, kw_only=True)
class _Parts:
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


def run_experiment(config: ExperimentConfig, run_dir: Path) -> dict[str, Any]:
    """Trains and reports; with `config.resume` goes on from the newest checkpoint in `run_dir`.

    Args:
        config: valid, defaults resolved.
        run_dir: exists; everything is written here.

    Returns:
        The summary, also in `summary.json`.

    Raises:
        ColaError: see the parts; KeyboardInterrupt after saving the state.
    """
    device = resolve_device(config.device)
    seed_everything(config.seed)
    problem = resolve_problem(config.task, config.model.family)
    base = build_base_model(config.model, problem, seed=config.seed)
    check_sites(config, base)
    task = build_task(config, problem, base)
    if config.resume is None:
        save_config(config, run_dir / CONFIG_FILE)
    _keep_new_parameters(base, run_dir / NEW_PARAMETERS)
    heads = head_weights(base.module, base.sites.values())
    base.module.to(device)
    learner = build_learner(config, base.module, base.sites, problem.objective)
    parts = _Parts(
        config=config, run_dir=run_dir, base=base, heads=heads, task=task, learner=learner
    )
    try:
        return _train(parts)
    finally:
        learner.close()


def check_sites(config: ExperimentConfig, base: BaseModel) -> None:
    """Refuses what the model's sites cannot do.

    Raises:
        SiteError: a rank above a layer's size; a merge into a weight that others use, too.
    """
    gradient = config.method.name is MethodName.cola
    if config.method.name is MethodName.lora or config.adapter.kind is AdapterKind.lowrank:
        check_rank(base.sites, config.adapter.rank)
    trains_merged = config.merge.mode is MergeMode.merged
    merges = trains_merged or config.evaluation.merge is EvaluationMerge.merged
    shared = shared_parameter_sites(base.module, base.sites)
    if gradient and merges and shared:
        raise SiteError(
            f"sites {sorted(shared)} share their weight with another module, which a merge would "
            "change, too: leave them out of model.sites, or use merge=unmerged and "
            "evaluation.merge=unmerged"
        )


def build_task(config: ExperimentConfig, problem: Problem, base: BaseModel) -> TaskData:
    """Reads and encodes the task for a base model.

    Raises:
        DataError: the data is missing or cannot be read.
    """
    return load_task(
        config.task,
        problem,
        tokenizer=base.tokenizer,
        score=build_score(metric_name(config.task), problem.objective),
        data_dir=config.data_dir,
        split_seed=config.split_seed,
    )


def _train(parts: _Parts) -> dict[str, Any]:
    config, run_dir, task, learner = parts.config, parts.run_dir, parts.task, parts.learner
    device = next(parts.base.module.parameters()).device
    stream = BatchStream(
        task, batch_size=config.trainer.batch_size, seed=config.seed, device=device
    )
    horizon = Horizon.of(config.trainer, stream.steps_per_epoch)
    assert config.optimizer.lr is not None, "defaults are resolved before a run"
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    saved = checkpoints.load_newest() if config.resume else None
    tracker = build_tracker(
        run_dir,
        config.tracking,
        run={"id": run_dir.name, "group": run_dir.parent.name, "config": config_values(config)},
        last_step=saved["progression"]["step"] if saved else 0,
    )
    trainer = Trainer(
        learner=learner,
        task=task,
        stream=stream,
        horizon=horizon,
        schedule=LearningRateSchedule(
            config.schedule, peak=config.optimizer.lr, horizon=horizon.adaptations
        ),
        config=config.trainer,
        select_on=config.evaluation.select_on,
        eval_batch_size=config.evaluation.batch_size,
        checkpoint_every=config.checkpoint.every,
        checkpoints=checkpoints,
        tracker=tracker,
        device=device,
    )
    _log_start(parts, horizon)
    # Seeded again: how many numbers the building took depends on the method, training must not.
    seed_everything(config.seed)
    if saved is not None:
        trainer.load_state_dict(saved)
        logger.info("resumed at step %d", trainer.progression.step)
    try:
        with stop_request() as stop:
            trainer.run(stop)
        summary = _report(parts, trainer, horizon)
        curve = plot_learning_curve(
            read_metrics(run_dir),
            summary["result"]["metric"],
            f"{task.name}, {config.method.name.name}, {config.adapter.kind.name}",
            run_dir / "figures" / "learning_curve.png",
        )
        tracker.finish(summary, {"learning_curve": curve})
        write_summary(run_dir, summary)
    finally:
        tracker.close()
    return summary


def _report(parts: _Parts, trainer: Trainer, horizon: Horizon) -> dict[str, Any]:
    task = parts.task
    scores = trainer.score(task.report)
    metric, value = next(iter(scores.items()))
    result = {
        "metric": metric,
        "value": value,
        "split": task.report.name,
        "selected_on": trainer.selection.name,
        "selected_step": trainer.progression.best_step,
        "selection_value": trainer.progression.best_value,
        "scores": {task.report.name: scores}
        | {split.name: trainer.score(split) for split in task.extra_report},
    }
    logger.info("%s %.4f on %s (best of step %d)", metric, value, task.report.name,
                trainer.progression.best_step)  # fmt: skip
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
        peaks_mib=trainer.progression.peaks_mib,
        costs=trainer.median_costs(),
        wall_seconds=trainer.progression.seconds,
    )


def _export(parts: _Parts) -> None:
    """Adapters as files; PEFT's form too where it can hold them."""
    config, objective = parts.config, parts.task.problem.objective
    adapters = parts.learner.export()
    if not adapters:
        return
    folder = parts.run_dir / "adapters"
    name = config.model.path or config.model.name
    export_adapters(folder, adapters, scale=config.adapter.alpha, base=name)
    if can_export_peft(adapters, objective):
        export_peft(
            folder / "peft",
            adapters,
            parts.heads,
            scale=config.adapter.alpha,
            base=name,
            objective=objective,
        )
    logger.info("adapters are in %s", folder)


def _keep_new_parameters(base: BaseModel, path: Path) -> None:
    """Parameters that no pretrained file can restore are part of the checkpoint, saved once."""
    if path.exists():
        restore_parameters(base.module, load_file(path))
        return
    if tensors := new_parameters(base.module, base.new_parameters):
        draft = path.with_suffix(".partial")
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, draft)
        draft.replace(path)


def _log_start(parts: _Parts, horizon: Horizon) -> None:
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
