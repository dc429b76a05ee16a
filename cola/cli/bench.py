"""`cola-bench`: time and memory of every method on this machine, the paper's Tables 10 to 18."""

from collections.abc import Sequence
from pathlib import Path

from cola.bench.row import BenchRow
from cola.bench.rows import select_rows, with_random_weights
from cola.cli.console import command_parser, run_console
from cola.cli.help import help_text
from cola.cli.outcome import DONE, FAILED
from cola.config.bench_checks import check_bench
from cola.config.schema import BenchConfig, ExperimentConfig
from cola.config.validation import validate
from cola.errors import ConfigError
from cola.report.bench_table import published_of
from cola.report.text import format_table, print_text

NAME = "cola-bench"

_SUMMARY = (
    "The computation evaluation: time and memory of full fine-tuning, PEFT's methods and gradient "
    "learning on one machine, row by row, at the model's true shape with random weights (or real "
    "ones: model.path=FOLDER); no data is read. A call measures the rows that its folder lacks: "
    "call again after an interruption."
)
_EXAMPLES = (
    "cola-bench experiment=table13                      # Llama-2-7B, query and value",
    "cola-bench experiment=table13 --dry                # its rows and what they override",
    "cola-bench experiment=table10 bench.rows=[floor,lora*,cola-lowrank-*] bench.batch_sizes=[8]",
    "cola-bench experiment=table12 bench.lengths=dolly  # rows as long as Dolly's",
    "cola-bench task=synthetic model=tiny-gpt2 bench.batch_sizes=[2]  # any model",
)
_OPTIONS = """\
Options:
  -h, --help        this text
  --version         the package's version
  --dry             list the rows and what they override, and measure nothing
"""
_RUN_DIR = """\
  hydra.run.dir  where results.json, table.md and figure.png go (outputs/bench/EXPERIMENT)
"""


def run_bench(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: arguments without the program's name; None: the process's own.
    """
    parser = command_parser(NAME, "[options] [group=choice ...] [key=value ...] (see --help)")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("overrides", nargs="*")
    return run_console(
        parser,
        argv,
        help_text=lambda: help_text(
            NAME,
            _SUMMARY,
            _EXAMPLES,
            ", or a row could not be measured",
            hidden=(),
            options=_OPTIONS,
            run_dir=_RUN_DIR,
        ),
        action=lambda arguments: _bench(arguments.overrides, is_dry=arguments.dry),
        interrupted="interrupted; the same command goes on with the rows that are missing",
    )


def main() -> int:
    """Console script."""
    return run_bench()


def _bench(lines: Sequence[str], *, is_dry: bool) -> int:
    configs, folder = _compose(lines)
    rows, bench = select_rows(configs), configs[0].bench
    _check_rows(rows)
    if is_dry or configs[0].dry_run:
        print_text(list_rows(rows, bench))
        return DONE

    from cola.benchmark import run_benchmark  # torch: only after the configuration was checked

    return DONE if run_benchmark(rows, bench, folder, [NAME, *lines]) else FAILED


def _compose(lines: Sequence[str]) -> tuple[list[ExperimentConfig], Path]:
    """The table's configuration for each of its models, and where results go."""
    from cola.config.store import compose_changes  # Hydra takes half a second to import

    composed = compose_changes(lines)
    check_bench(composed.config, composed.given)
    # A model that was asked for stands in the place of all of the table's.
    models = [] if "model" in composed.given else composed.config.bench.models
    others = [compose_changes([*lines, f"model={name}"]).config for name in models]
    configs = [with_random_weights(one, composed.given) for one in others or [composed.config]]
    if any(line.lstrip("+").startswith("hydra.run.dir=") for line in lines):
        return configs, composed.run_dir
    config = composed.config
    name = config.experiment_name or f"{config.task.name}-{config.model.name}"
    return configs, Path("outputs") / "bench" / name


def _check_rows(rows: Sequence[BenchRow]) -> None:
    """Refuses settings with which no row can run; a single row says so when its turn comes.

    Raises:
        ConfigError: what is wrong with the first one.
    """
    first: ConfigError | None = None
    for row in rows:
        try:
            return validate(row.config)
        except ConfigError as error:
            first = first or error
    if first is not None:
        raise first


def list_rows(rows: Sequence[BenchRow], bench: BenchConfig) -> str:
    """What `--dry` prints: every row, whose it is, and how it differs from the table's settings.

    Args:
        rows: of the table.
        bench: how they would be measured.
    """
    facts = [row.facts(bench) for row in rows]
    papers = ["paper" if published_of(one) else "ours" for one in facts]
    lines = [
        [row.name, paper, " ".join(row.overrides)] for row, paper in zip(rows, papers, strict=True)
    ]
    distinct = {
        (one["model"], one["batch_size"], one["method"], one["adapter"], one["merge"])
        for one in facts
        if published_of(one)
    }
    return (
        f"{format_table(['row', 'whose', 'overrides'], lines)}\n\n"
        f"{len(rows)} rows: {len(distinct)} of the paper in {papers.count('paper')} placements, "
        f"{papers.count('ours')} of ours"
    )
