"""The paper's rows: what every table and figure needs run, and the command that runs it.

The one list behind the Makefile's `table2` ... `figures` and behind `cola-report`. A run that two
tables print stands here once. Learning curves come from the runs of Tables 2, 3, 6, 7 and 9. No
Hydra and no torch: a listing answers at once.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cola.config.keys import nearest_words
from cola.errors import ConfigError
from cola.report.bench_published import PublishedRow, published_costs

_SUBSETS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
GLUE = tuple(f"glue/{subset}" for subset in _SUBSETS)
SEQUENCE_TO_SEQUENCE = ("fpb", "wikisql", "samsum", "e2e_nlg", "web_nlg", "dart")
IMAGES = ("mnist", "cifar10")
IMAGE_MODELS = ("linear", "mlp", "cnn")
INTERVALS = (1, 2, 4, 8)
NUM_USERS = 8  # Dolly's categories

STAND_INS = {
    "roberta-base": "tiny-roberta",
    "bart-base": "tiny-bart",
    "gpt2": "tiny-gpt2",
    "llama-2-7b": "tiny-llama",
}
"""The tiny model that rehearses a row; image models are tiny themselves."""


@dataclass(frozen=True, kw_only=True)
class GridRow:
    """One run of the paper, or one measured row of a computation table.

    Attributes:
        shown_in: tables and figures that print it: `table2`, `figure4`.
        program: console script.
        overrides: what follows it on the command line.
        model: base model.
        task: with its subset, as `summary.json` has it.
        method: `cola` or a baseline.
        adapter: of gradient learning; users' kinds joined as in `lowrank-linear`; else empty.
        merge: of gradient learning; else empty.
        users: one, joint, alone or collaboration.
        num_users: K.
        batch_size: rows per step.
        interval: batches per adaptation, I.
    """

    shown_in: tuple[str, ...]
    program: str = "cola-train"
    overrides: tuple[str, ...]
    model: str
    task: str
    method: str
    adapter: str = ""
    merge: str = ""
    users: str = "one"
    num_users: int = 1
    batch_size: int
    interval: int = 1

    @property
    def experiment(self) -> str:
        """Name of the experiment, and of the folder that its runs share."""
        return self.overrides[0].removeprefix("experiment=")

    @property
    def command(self) -> str:
        """The command line, as a shell reads it."""
        return shlex.join((self.program, *self.overrides))


@dataclass(frozen=True)
class _Form:
    """How parameters are trained: a line of an accuracy table."""

    method: str
    adapter: str = ""
    merge: str = ""

    @property
    def name(self) -> str:
        return f"{self.adapter}_{self.merge}" if self.adapter else self.method


_FT, _LORA = _Form("ft"), _Form("lora")
_PEFT = (_LORA, *map(_Form, ("adalora", "ia3", "prompt", "prefix", "ptuning")))
_COLA = (
    _Form("cola", "lowrank", "unmerged"),
    _Form("cola", "lowrank", "merged"),
    _Form("cola", "linear", "unmerged"),
    _Form("cola", "linear", "merged"),
    _Form("cola", "mlp", "unmerged"),
)
_ALONE = {4: ("lowrank", "lowrank-linear", "lowrank-mlp"), 8: ("lowrank", "lowrank-mlp")}
_COLLABORATION = {4: ("lowrank", "lowrank-linear"), 8: ("lowrank",)}

# Which sets share a figure is our split: those of Tables 2 and 3 in order, three to a figure.
_ABLATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "figure4": (("roberta-base",), GLUE[:3]),
    "figure5": (("roberta-base",), GLUE[3:6]),
    "figure6": (("roberta-base",), GLUE[6:]),
    "figure7": (("bart-base",), SEQUENCE_TO_SEQUENCE[:3]),
    "figure8": (("bart-base",), SEQUENCE_TO_SEQUENCE[3:]),
    "figure9": (("gpt2", "llama-2-7b"), ("dolly",)),
    "figure10": (IMAGE_MODELS, ("mnist",)),
    "figure11": (IMAGE_MODELS, ("cifar10",)),
}
_COMPUTATION_TASKS = {10: "glue/cola", 11: "fpb", 15: "mnist"}


def accuracy_rows() -> tuple[GridRow, ...]:
    """The runs of Tables 2, 3, 4, 6, 7, 8 and 9."""
    text = (_FT, *_PEFT, *_COLA)
    return (
        *_one_user(2, ("roberta-base",), GLUE, text, batch_size=32),
        *_one_user(3, ("bart-base",), SEQUENCE_TO_SEQUENCE, text, batch_size=32),
        # Table 6 ends in the joint runs of Table 4.
        *_one_user(6, ("gpt2",), ("dolly",), (_FT, *_PEFT), batch_size=32),
        *_many_users(4, "gpt2", batch_size=32, joint_in=("table4", "table6")),
        *_one_user(7, ("llama-2-7b",), ("dolly",), text, batch_size=8),
        *_many_users(8, "llama-2-7b", batch_size=8, joint_in=("table8",)),
        *_one_user(9, IMAGE_MODELS, IMAGES, (_FT, _LORA, *_COLA), batch_size=256),
    )


def ablation_rows() -> tuple[GridRow, ...]:
    """The runs of Figures 4 to 11: low-rank, unmerged, at every adaptation interval."""
    return tuple(
        GridRow(
            shown_in=(figure,),
            overrides=(
                f"experiment={figure}",
                *_selection(models, tasks, model, task),
                f"trainer.interval={interval}",
            ),
            model=model,
            task=task,
            method="cola",
            adapter="lowrank",
            merge="unmerged",
            batch_size=64 if task in IMAGES else 8,
            interval=interval,
        )
        for figure, (models, tasks) in _ABLATIONS.items()
        for model in models
        for task in tasks
        for interval in INTERVALS
    )


def computation_rows() -> tuple[GridRow, ...]:
    """The measured rows that Tables 10 to 18 print."""
    return tuple(map(_computation_row, published_costs()))


def rows_of(name: str) -> tuple[GridRow, ...]:
    """The rows that a table or figure prints.

    Args:
        name: `table2` to `table18` (5 has no rows), `figure4` to `figure11`.

    Raises:
        ConfigError: nothing of that name has rows.
    """
    rows = (*accuracy_rows(), *ablation_rows(), *computation_rows())
    if found := tuple(row for row in rows if name in row.shown_in):
        return found
    names = sorted({shown for row in rows for shown in row.shown_in}, key=lambda n: (len(n), n))
    near = nearest_words(name, names)
    raise ConfigError(f"{name}: no such table or figure; {near}allowed: {', '.join(names)}")


def _one_user(
    table: int,
    models: Sequence[str],
    tasks: Sequence[str],
    forms: Sequence[_Form],
    *,
    batch_size: int,
) -> Iterator[GridRow]:
    for model in models:
        for form in forms:
            for task in tasks:
                yield GridRow(
                    shown_in=(f"table{table}",),
                    overrides=(
                        f"experiment=table{table}_{form.name}",
                        *_selection(models, tasks, model, task),
                    ),
                    model=model,
                    task=task,
                    method=form.method,
                    adapter=form.adapter,
                    merge=form.merge,
                    batch_size=batch_size,
                )


def _many_users(
    table: int, model: str, *, batch_size: int, joint_in: tuple[str, ...]
) -> Iterator[GridRow]:
    """Eight users of Dolly; the joint runs may stand in a second table."""
    joint = [("joint", form.adapter, form.merge) for form in _COLA]
    alone = [("alone", kinds, "unmerged") for kinds in _ALONE[table]]
    collaboration = [("collaboration", kinds, "merged") for kinds in _COLLABORATION[table]]
    for users, adapter, merge in (*joint, *alone, *collaboration):
        way = f"_{merge}" if users == "joint" else ""  # the others are trained in one way only
        yield GridRow(
            shown_in=joint_in if users == "joint" else (f"table{table}",),
            overrides=(f"experiment=table{table}_{users}_{adapter.replace('-', '_')}{way}",),
            model=model,
            task="dolly",
            method="cola",
            adapter=adapter,
            merge=merge,
            users=users,
            num_users=NUM_USERS,
            batch_size=batch_size,
        )


def _selection(models: Sequence[str], tasks: Sequence[str], model: str, task: str) -> Iterator[str]:
    """Overrides that choose one of a table's sets and models."""
    name, _, subset = task.partition("/")
    if len(tasks) > 1:
        yield f"task.subset={subset}" if subset else f"task={name}"
    if len(models) > 1:
        yield f"model={model}"


def _computation_row(row: PublishedRow) -> GridRow:
    table = f"table{row.table}"
    label = f"cola-{row.adapter}-{row.merge}" if row.adapter else row.method
    # The paper prints one row for adapters fitted beside the base model and on two other devices.
    labels = [f"{label}-{target}" for target in ("none", "cpu", "gpu")] if row.adapter else [label]
    prefix = f"{row.model}/" if row.model in IMAGE_MODELS else ""
    patterns = ",".join(f"{prefix}{one}/b{row.batch_size}" for one in labels)
    merges = "collaboration" if row.merge == "merged" else "alone"
    return GridRow(
        shown_in=(table,),
        program="cola-bench",
        overrides=(f"experiment={table}", f"bench.rows=[{patterns}]"),
        model=row.model,
        task=_COMPUTATION_TASKS.get(row.table, "dolly"),
        method=row.method,
        adapter=row.adapter,
        merge=row.merge,
        users=merges if row.users > 1 else "one",
        num_users=row.users,
        batch_size=row.batch_size,
    )
