"""Checks a composed configuration: ranges of single values, and combinations that cannot run.

Types, names and choices were checked before (`overrides.py`, OmegaConf). What needs a model (rank
against layer size, sites) is checked with the models. No Hydra and no torch: a configuration error
must answer at once.
"""

from collections.abc import Collection
from pathlib import Path

from cola.config.bench_checks import refuse_bench
from cola.config.choices import (
    AdapterKind,
    DType,
    MergeMode,
    MethodName,
    ModelSource,
    Objective,
    OptimizerName,
    Pristine,
    Rounding,
)
from cola.config.keys import flatten, nearest_words, word
from cola.config.method_checks import check_method
from cola.config.offload_checks import check_offload
from cola.config.own_data import check_own_data
from cola.config.ranges import RANGES
from cola.config.schema import ExperimentConfig
from cola.config.user_checks import check_users
from cola.errors import ConfigError

# Named here too, although the tasks know them, so that a typo is found before torch is imported.
SUBSETS = {"glue": ("cola", "mnli", "sst2", "mrpc", "qnli", "qqp", "rte", "stsb")}


def validate(config: ExperimentConfig, given: Collection[str] = ()) -> None:
    """Raises on the first setting that cannot run.

    Args:
        config: fully composed, of the right types.
        given: groups and keys set explicitly on the command line; a value that cannot apply to the
            method is an error only if someone asked for it.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    refuse_bench(config, given)
    values = flatten(config)
    for key, allowed in RANGES.items():
        if not allowed.contains(values[key]):
            raise ConfigError(f"{key}={word(values[key])}: wrong value; allowed: {allowed.words}")
    _check_subset(config)
    _check_model_and_task(config)
    check_method(config, given)
    check_users(config, given)
    check_offload(config, given)
    _check_graphs(config)
    _check_merge(config)
    _check_optimizer(config)
    _check_data_dir(config)
    check_own_data(config)


def _check_subset(config: ExperimentConfig) -> None:
    task = config.task
    allowed = SUBSETS.get(task.name, ())
    if not allowed and task.subset is not None:
        raise ConfigError(f"task.subset={task.subset}: {task.name} has no subsets; leave it out")
    if allowed and task.subset not in allowed:
        near = nearest_words(str(task.subset), allowed)
        raise ConfigError(
            f"task.subset={task.subset}: no such subset of {task.name}; {near}"
            f"allowed: {', '.join(allowed)}"
        )


def _check_model_and_task(config: ExperimentConfig) -> None:
    model, task = config.model, config.task
    if model.source is ModelSource.pretrained and not model.path:
        raise ConfigError(
            f"model={model.name}: model.path is not set; give the id of a model on the Hugging "
            "Face hub or a local folder, for example model.path=../models/minilm"
        )
    if model.autocast and model.dtype is not DType.float32:
        raise ConfigError(
            f"model.autocast=true with model.dtype={model.dtype.name}: autocast makes a float32 "
            "model compute its matrix products in bfloat16; use model.dtype=float32 or leave it out"
        )
    # Posed by the model's family where the task leaves it open, but images have a shape.
    is_image_task = task.objective is Objective.image or task.image_shape is not None
    is_image_model = model.source is ModelSource.image
    if is_image_task and not is_image_model:
        raise ConfigError(
            f"task={task.name} with model={model.name}: images need an image model; "
            "choose model=linear, mlp or cnn, or a text task such as task=glue"
        )
    if is_image_model and not is_image_task:
        raise ConfigError(
            f"task={task.name} with model={model.name}: text needs a text model; choose "
            "model=tiny-roberta, roberta-base or hf, or an image task such as task=digits"
        )


def _check_graphs(config: ExperimentConfig) -> None:
    if not config.model.cuda_graphs:
        return
    if config.method.name is not MethodName.cola:
        raise ConfigError(
            f"model.cuda_graphs=true with method={config.method.name.name}: only gradient learning "
            "keeps all that changes out of the base model; use method=cola, or leave it out"
        )
    if config.model.gradient_checkpointing:
        raise ConfigError(
            "model.cuda_graphs=true with model.gradient_checkpointing=true: a block is either "
            "replayed or recomputed; leave one of them out"
        )
    if config.users.name.owns_adapters and config.merge.mode is not MergeMode.merged:
        raise ConfigError(
            f"model.cuda_graphs=true with users={config.users.name.name} and "
            f"merge={config.merge.mode.name}: rows of a batch belong to other users every time, "
            "which a captured graph cannot follow; use merge=merged, or leave it out"
        )


def _check_merge(config: ExperimentConfig) -> None:
    merge = config.merge
    # Users with adapters of their own may have other kinds; see `check_users`.
    is_one_mlp = (
        config.method.name is MethodName.cola
        and config.adapter.kind is AdapterKind.mlp
        and not config.users.name.owns_adapters
    )
    if is_one_mlp and merge.mode is MergeMode.merged:
        raise ConfigError(
            "merge=merged with adapter=mlp: only an adapter that is linear in its input can be "
            "merged (Proposition 2); use adapter=lowrank or linear, or merge=unmerged"
        )
    if is_one_mlp and config.evaluation.merge.merges:
        raise ConfigError(
            f"evaluation.merge={config.evaluation.merge.name} with adapter=mlp: only an adapter "
            "that is linear in its input can be merged (Proposition 2); use adapter=lowrank or "
            "linear, or evaluation.merge=unmerged"
        )
    if merge.rounding is Rounding.stochastic and config.model.dtype is not DType.bfloat16:
        raise ConfigError(
            f"merge.rounding=stochastic with model.dtype={config.model.dtype.name}: only merged "
            "bfloat16 weights are rounded; use model.dtype=bfloat16 or leave it out"
        )
    if merge.mode is MergeMode.merged:
        return
    for key, value, default in (
        ("pristine", merge.pristine, Pristine.host),
        ("rounding", merge.rounding, Rounding.nearest),
    ):
        if value is not default:
            raise ConfigError(
                f"merge.{key}={value.name} would have no effect with merge={merge.mode.name}; "
                "use merge=merged or leave it out"
            )


def _check_optimizer(config: ExperimentConfig) -> None:
    optimizer = config.optimizer
    names = [optimizer.name, *(entry.optimizer for entry in config.users.adapters)]
    if OptimizerName.sgd in names and optimizer.nesterov and optimizer.momentum == 0:
        raise ConfigError(
            "optimizer.momentum=0 with optimizer.nesterov=true: Nesterov needs a momentum; set "
            "optimizer.nesterov=false or optimizer.momentum=0.9"
        )


def _check_data_dir(config: ExperimentConfig) -> None:
    """Here, not only where rows are read: it answers before anything heavy is imported."""
    is_builtin = config.data_dir == "builtin"  # sample rows that `cola.tasks` holds
    if config.data_dir is None or is_builtin or config.dry_run or Path(config.data_dir).is_dir():
        return
    raise ConfigError(
        f"data_dir={config.data_dir}: there is no such folder; give one that holds "
        f"{config.task.folder or config.task.name}, or leave it out to read the hub"
    )
