"""`cola-verify`: are the adapters' gradients the true ones, on this model and configuration?"""

from pathlib import Path

from cola.cli.app import Command, run_command
from cola.config.schema import ExperimentConfig


def execute(config: ExperimentConfig, _: Path) -> bool:
    """Whether every site agrees with automatic differentiation; prints the table."""
    from cola.verify import verify  # torch: only after the configuration was checked

    return verify(config)


COMMAND = Command(
    name="cola-verify",
    summary=(
        "Checks on the composed model, site by site, that gradient learning gives the gradient "
        "that automatic differentiation gives, with adapters at seeded non-zero values, and prints "
        "a table. Writes no files."
    ),
    examples=(
        "cola-verify                                       # the default model",
        "cola-verify task=synthetic model=tiny-gpt2 adapter=mlp",
        "cola-verify merge=detached                        # shows which sites differ",
    ),
    execute=execute,
    writes_run=False,
    failure=", or a gradient differs",
)


def main() -> int:
    """Console script."""
    return run_command(COMMAND)
