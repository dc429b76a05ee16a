"""Checks of `bench`: what `cola-bench` measures, and that no other command is given it.

No Hydra and no torch: a mistake must answer at once.
"""

from collections.abc import Collection

from cola.config.groups import group_choices
from cola.config.keys import flatten, nearest_words, word
from cola.config.ranges import RANGES
from cola.config.schema import BenchConfig, ExperimentConfig
from cola.errors import ConfigError

_SET_BY_ROWS = {
    "method": "bench.rows=[lora*]",
    "method.name": "bench.rows=[lora*]",
    "method.adapter_dtype": "bench.rows=[lora-bfloat16]",
    "method.activation_offload": "bench.rows=[lora-activation-offload]",
    "model.gradient_checkpointing": "bench.rows=[*checkpointing]",
    "model.cuda_graphs": "bench.rows=[*graphs]",
    "adapter": "bench.rows=[cola-lowrank*]",
    "adapter.kind": "bench.rows=[cola-lowrank*]",
    "merge": "bench.rows=[*-merged*]",
    "merge.mode": "bench.rows=[*-merged*]",
    "offload": "bench.offload=[none,cpu]",
    "offload.name": "bench.offload=[none,cpu]",
    "users.kinds": "bench.rows=[cola-lowrank-linear*]",
    "trainer.batch_size": "bench.batch_sizes=[8]",
}
"""Settings that differ from row to row, and how to ask for one of their values."""


def refuse_bench(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses settings of `cola-bench` in a run.

    Raises:
        ConfigError: one was given, or comes with an experiment.
    """
    for key in sorted(given):
        if key.startswith("bench."):
            raise ConfigError(f"{key}: a setting of cola-bench alone; leave it out")
    if config.bench != BenchConfig():
        raise ConfigError(
            f"experiment={config.experiment_name}: a benchmark, which trains nothing; use "
            f"cola-bench experiment={config.experiment_name}"
        )


def check_bench(config: ExperimentConfig, given: Collection[str]) -> None:
    """Refuses what cannot be measured, and settings that rows decide.

    Args:
        config: of the right types.
        given: groups and keys set explicitly.

    Raises:
        ConfigError: what was given, what is allowed, what to change.
    """
    values = flatten(config)
    for key, allowed in RANGES.items():
        if key.startswith("bench.") and not allowed.contains(values[key]):
            raise ConfigError(f"{key}={word(values[key])}: wrong value; allowed: {allowed.words}")
    for key in sorted(given):
        if key in _SET_BY_ROWS:
            raise ConfigError(
                f"{key}: rows of cola-bench differ in it; leave it out, or choose rows, for "
                f"example by {_SET_BY_ROWS[key]}"
            )
    if config.resume is not None:
        raise ConfigError(
            f"resume={config.resume}: cola-bench goes on by itself with the rows that its folder "
            "lacks; leave it out"
        )
    for name in config.bench.models:
        if name not in (known := group_choices()["model"]):
            raise ConfigError(
                f"bench.models: no such choice of model '{name}'; {nearest_words(name, known)}"
                f"allowed: {', '.join(known)}"
            )
