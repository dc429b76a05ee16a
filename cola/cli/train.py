"""`cola-train`: one run, or a sweep."""

from pathlib import Path

from cola.cli.app import Command, run_command
from cola.config.schema import ExperimentConfig


def execute(config: ExperimentConfig, run_dir: Path) -> bool:
    """Trains; a run that fails raises."""
    from cola.experiment import run_experiment  # torch: only after the configuration was checked

    run_experiment(config, run_dir)
    return True


COMMAND = Command(
    name="cola-train",
    summary=(
        "Trains adapters by gradient learning (or a baseline by back-propagation) on a frozen base "
        "model and writes metrics, checkpoints and a summary to the run's folder. Without "
        "arguments it learns handwritten digits on the CPU in about a minute, offline."
    ),
    examples=(
        "cola-train                                        # digits, low-rank adapters, CPU",
        "cola-train task=glue task.subset=mrpc adapter=mlp # RoBERTa-base on MRPC, MLP adapters",
        "cola-train task=synthetic model=tiny-gpt2 merge=merged offload=cpu",
        "cola-train -m adapter=lowrank,linear,mlp seed=0,1 # a sweep of six runs",
        "cola-train -m seed=0,1,2 resume=once hydra/launcher=parallel  # several at a time",
        "cola-train task=glue dry_run=true                 # sites, parameters, bytes; no training",
        "cola-train task=glue resume=auto                  # go on with the newest unfinished run",
    ),
    execute=execute,
    writes_run=True,
)


def main() -> int:
    """Console script."""
    return run_command(COMMAND)
