"""One run from configuration to summary: builds every part, wires them, trains, reports."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cola.attendance import UserState
from cola.batches import BatchStream, place_rows
from cola.checkpoint import NEW_PARAMETERS, Checkpoints, keep_new_parameters
from cola.config.choices import MergeMode, MethodName
from cola.config.identity import CONFIG_FILE, save_config
from cola.config.schema import ExperimentConfig
from cola.config.user_settings import lowrank_sizes
from cola.errors import SiteError
from cola.export import head_weights
from cola.generation import check_positions
from cola.horizon import Horizon
from cola.initial_adapters import initial_adapters, start_from
from cola.interfaces import Learner
from cola.learners import build_learner
from cola.metrics import build_score
from cola.models import (
    BaseModel,
    build_base_model,
    check_rank,
    resolve_family,
    shared_parameter_sites,
)
from cola.offload.placing import resolve_offload
from cola.optimizers import LearningRateSchedule
from cola.report.curves import plot_learning_curve
from cola.run_report import RunParts, log_start, report_run
from cola.runtime import resolve_device, seed_everything, set_matmul_precision, stop_request
from cola.shortage import shortages
from cola.summary import write_summary
from cola.task_data import Problem, TaskData
from cola.tasks import leaves_objective_open, load_task, metric_name, resolve_problem
from cola.tracking import build_tracker, read_metrics
from cola.trainer import Trainer
from cola.user_rows import UserId
from cola.user_visits import keep_in
from cola.users import assign_users

logger = logging.getLogger(__name__)


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
    base, task = build_base_and_task(config)
    device = resolve_device(config.device)
    for shortage in shortages(config, base, device, users=task.user_settings):
        logger.warning("this run may not fit: it needs %s", shortage)
    is_fresh = config.resume is None
    initial = initial_adapters(config, base) if is_fresh else {}
    if is_fresh:
        save_config(config, run_dir / CONFIG_FILE)
    keep_new_parameters(base.module, base.new_parameters, run_dir / NEW_PARAMETERS)
    heads = head_weights(base.module, base.sites.values())
    local_dir = Path(config.users.local_dir or run_dir / "local")
    learner = build_run_learner(config, base, task, keep_user=keep_in(run_dir), local_dir=local_dir)
    parts = RunParts(
        config=config, run_dir=run_dir, base=base, heads=heads, task=task, learner=learner
    )
    try:
        start_from(learner, initial)
        return _train(parts)
    finally:
        learner.close()


def build_base_and_task(config: ExperimentConfig) -> tuple[BaseModel, TaskData]:
    """The base model, still on the CPU, and its data: all that can be wrong is found here.

    Raises:
        ColaError: the device, the model or the data cannot be had as asked.
    """
    device = resolve_device(config.device)
    set_matmul_precision(tf32=config.model.tf32, device=device)
    if config.method.name is MethodName.cola:
        resolve_offload(config.offload, device, num_rows=1)  # refuses GPUs that are not there
    seed_everything(config.seed)
    problem = build_problem(config)
    base = build_base_model(config.model, problem, seed=config.seed)
    check_sites(config, base)
    if problem.objective.writes:
        check_positions(base.module, config.generation, problem)
    task = assign_users(build_task(config, problem, base), config)
    return base, place_rows(task, device)


def build_run_learner(
    config: ExperimentConfig,
    base: BaseModel,
    task: TaskData,
    *,
    keep_user: Callable[[UserId, UserState], None] = lambda user, state: None,
    local_dir: Path | None = None,
) -> Learner:
    """The method's learner on the device of the run; takes the base model over.

    `keep_user` takes what a user leaves the run with; `local_dir` is where data is exchanged with
    users' own processes, without which they are not trained.
    """
    base.module.to(resolve_device(config.device))
    steps_per_epoch = math.ceil(len(task.train.rows) / config.trainer.batch_size)
    adaptations = Horizon.of(config.trainer, steps_per_epoch).adaptations
    return build_learner(
        config,
        base,
        task.problem.objective,
        adaptations=adaptations,
        users=task.user_settings,
        keep_user=keep_user,
        local_dir=local_dir,
    )


def build_problem(config: ExperimentConfig) -> Problem:
    """What the base model has to be built for; reads no data, and no network in a dry run.

    Raises:
        ConfigError: the task cannot be posed so, or the model's files cannot tell what it is.
    """
    family = config.model.family
    if leaves_objective_open(config.task):
        family = resolve_family(config.model, on_meta=config.dry_run)
    return resolve_problem(config.task, family)


def check_sites(config: ExperimentConfig, base: BaseModel) -> None:
    """Refuses what the model's sites cannot do.

    Raises:
        SiteError: a rank above a layer's size; a merge into a weight that others use, too.
    """
    gradient = config.method.name is MethodName.cola
    if gradient:
        for setting, rank in lowrank_sizes(config).items():
            check_rank(base.sites, rank, setting=setting)
    if config.method.name is MethodName.lora:
        check_rank(base.sites, config.adapter.rank)
    merges = config.merge.mode is MergeMode.merged or config.evaluation.merge.merges
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
        score=build_score(metric_name(config.task, problem.objective)),
        data_dir=config.data_dir,
        split_seed=config.split_seed,
        decoder_start_id=base.decoder_start_id,
        user_column=config.users.column,
        isolates_users=config.users.name.owns_adapters,
    )


def _train(parts: RunParts) -> dict[str, Any]:
    config, run_dir, task, learner = parts.config, parts.run_dir, parts.task, parts.learner
    device = next(parts.base.module.parameters()).device
    stream = BatchStream(
        task, batch_size=config.trainer.batch_size, seed=config.seed, device=device
    )
    horizon = Horizon.of(config.trainer, stream.steps_per_epoch)
    assert config.optimizer.lr is not None, "defaults are resolved before a run"
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep)
    saved = checkpoints.load_newest() if config.resume else None
    last_step = saved["progression"]["step"] if saved else 0
    tracker = build_tracker(run_dir, config, last_step=last_step)
    trainer = Trainer(
        learner=learner,
        task=task,
        stream=stream,
        horizon=horizon,
        schedule=LearningRateSchedule(
            config.schedule, peak=config.optimizer.lr, horizon=horizon.adaptations
        ),
        config=config.trainer,
        evaluation=config.evaluation,
        generation=config.generation,
        checkpoint_every=config.checkpoint.every,
        checkpoints=checkpoints,
        tracker=tracker,
        device=device,
    )
    log_start(parts, horizon)
    # Seeded again: how many numbers the building took depends on the method, training must not.
    seed_everything(config.seed)
    if saved is not None:
        trainer.load_state_dict(saved)
        logger.info("resumed at step %d", trainer.progression.step)
    try:
        with stop_request() as stop:
            trainer.run(stop)
        summary = report_run(parts, trainer, horizon, tracker)
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
