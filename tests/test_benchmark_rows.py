"""Which rows a computation table has, and what cola-bench refuses; nothing is measured."""

import dataclasses
import functools
import re
import subprocess
import sys

import pytest

from cola import grid
from cola.bench.row import BenchRow
from cola.bench.rows import select_rows
from cola.cli import bench, train
from cola.cli.app import run_command
from cola.config.bench_checks import check_bench
from cola.config.choices import AdapterDType, DType, MergeMode, RowLengths, UsersMode
from cola.config.identity import config_hash, config_yaml
from cola.config.schema import BenchConfig, ExperimentConfig
from cola.config.validation import validate
from cola.errors import ConfigError
from cola.report.bench_published import PublishedRow, published_costs
from cola.report.bench_table import published_of
from tests.configs import changed, composed

NUM_ROWS = {10: 36, 11: 36, 12: 36, 13: 36, 14: 24, 15: 63, 16: 15, 17: 15, 18: 15}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@functools.cache
def configs_of(*lines: str) -> list[ExperimentConfig]:
    return bench._compose(lines)[0]


def rows_of(*lines: str, patterns: tuple[str, ...] = ("*",)) -> list[BenchRow]:
    first, *others = configs_of(*lines)
    asked = dataclasses.replace(first.bench, rows=list(patterns))
    is_all = patterns == ("*",)
    return select_rows([first if is_all else dataclasses.replace(first, bench=asked), *others])


def key_of(row: BenchRow, table: int) -> PublishedRow:
    return PublishedRow(
        table=table,
        model=row.config.model.name,
        users=row.num_users,
        batch_size=row.batch_size,
        method=row.method,
        adapter=row.adapter,
        merge=row.merge,
    )


def task_name(config: ExperimentConfig) -> str:
    return "/".join(filter(None, (config.task.name, config.task.subset)))


def test_the_papers_rows_are_counted():
    assert sum(NUM_ROWS.values()) == len(published_costs()) == 276


@pytest.mark.parametrize("table", NUM_ROWS)
def test_a_table_has_every_row_of_the_paper_and_says_which_they_are(table):
    rows = rows_of(f"experiment=table{table}")
    config = BenchConfig(table=table)
    papers = [row for row in rows if published_of(row.facts(config))]
    wanted = {key for key in published_costs() if key.table == table}
    assert {key_of(row, table) for row in papers} == wanted
    assert len(wanted) == NUM_ROWS[table]
    # Placements apart no row is there twice, and gradient learning is ours by checkpointing alone.
    assert len({row.name for row in rows}) == len(rows)
    ours = {row.label for row in rows if row not in papers}
    assert "floor" in ours
    assert not {label for label in ours if label.startswith("cola") and label.count("-") < 4}


@pytest.mark.parametrize("table", NUM_ROWS)
def test_commands_of_the_grid_name_the_papers_rows(table):
    experiment = f"experiment=table{table}"
    by_name = {row.name: row for row in rows_of(experiment)}
    for row in grid.rows_of(f"table{table}"):
        first, patterns = row.overrides
        assert first == experiment
        names = patterns.removeprefix("bench.rows=[").removesuffix("]").split(",")
        measured = [by_name[name] for name in names]
        claim = PublishedRow(
            table=table,
            model=row.model,
            users=row.num_users,
            batch_size=row.batch_size,
            method=row.method,
            adapter=row.adapter,
            merge=row.merge,
        )
        assert {key_of(one, table) for one in measured} == {claim}
        assert {one.config.users.name.name for one in measured} == {row.users}
        assert {task_name(one.config) for one in measured} == {row.task}


def test_dry_lists_rows_without_torch(capsys):
    code = (
        "import sys; from cola.cli.bench import run_bench; "
        "code = run_bench(['experiment=table17', '--dry']); "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "96 rows: 15 of the paper in 45 placements, 51 of ours"
    merged = next(line for line in lines if "cola-lowrank-linear-merged-cpu/b8 " in line)
    assert "| paper |" in merged
    assert "users.name=collaboration users.kinds=[lowrank-linear] offload.name=cpu" in merged


def test_rows_are_valid_runs_of_their_own():
    rows = {row.name: row for row in rows_of("experiment=table13", "adapter.rank=4")}
    lora = rows["lora/b8"].config
    assert (lora.method.name.name, lora.trainer.batch_size, lora.adapter.rank) == ("lora", 8, 4)
    assert lora.model.path is None  # random weights of the true shape
    assert lora.method.adapter_dtype is AdapterDType.float32
    assert rows["lora-bfloat16/b8"].config.method.adapter_dtype is AdapterDType.base
    ft, mixed = rows["ft/b8"].config.model, rows["ft-autocast/b8"].config.model
    assert (ft.dtype, ft.autocast) == (DType.bfloat16, False)
    assert (mixed.dtype, mixed.autocast) == (DType.float32, True)
    assert rows["lora-all/b1"].config.model.sites == ["all"]
    assert rows["cola-linear-merged-cpu/b32"].config.merge.mode is MergeMode.merged
    assert rows["floor-checkpointing/b8"].config.model.gradient_checkpointing
    assert all(row.config.bench == BenchConfig() for row in rows.values())


def test_settings_of_the_table_reach_only_rows_that_read_them():
    rows = {r.name: r.config for r in rows_of("experiment=table16", "merge.pristine=base")}
    merged, unmerged = rows["cola-lowrank-merged-cpu/b8"], rows["cola-lowrank-unmerged-cpu/b8"]
    assert (merged.merge.pristine.name, unmerged.merge.pristine.name) == ("base", "host")
    assert (merged.users.name, unmerged.users.name) == (UsersMode.collaboration, UsersMode.alone)
    assert rows["lora/b8"].users.name is UsersMode.one


def test_float32_models_have_one_lora_and_images_no_checkpointing():
    labels = {row.label for row in rows_of("experiment=table15")}
    float32 = {row.label for row in rows_of("experiment=table10")}
    assert not float32 & {"lora-bfloat16", "ft-autocast"}
    assert not [label for label in labels if "checkpointing" in label]


def test_patterns_choose_rows_by_name_label_or_model():
    patterns = ("mlp/lora", "cola-*-merged-cpu/b8")
    assert [row.name for row in rows_of("experiment=table15", patterns=patterns)] == [
        "linear/cola-lowrank-merged-cpu/b8",
        "linear/cola-linear-merged-cpu/b8",
        *("mlp/lora/b1", "mlp/lora/b8", "mlp/cola-lowrank-merged-cpu/b8"),
        *("mlp/cola-linear-merged-cpu/b8", "mlp/lora/b32"),
        *("cnn/cola-lowrank-merged-cpu/b8", "cnn/cola-linear-merged-cpu/b8"),
    ]


def test_a_given_model_stands_for_all_of_the_tables():
    rows = rows_of("experiment=table15", "model=cnn", patterns=("ft/b8",))
    assert [(row.name, row.config.model.name) for row in rows] == [("ft/b8", "cnn")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench.rows=[lorra]", "bench.rows: no row is called 'lorra'; nearest: lora; rows: floor,"),
        ("bench.rws=[a]", "bench.rws=[a]: no such key; nearest: bench.rows"),
        ("adapter.rank=0", "adapter.rank=0: wrong value; allowed: a whole number >= 1"),
    ],
)
def test_what_cannot_be_meant_is_one_message(line, message, capsys):
    assert bench.run_bench(["experiment=table10", line, "--dry"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cola-bench: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench.batch_sizes=[0]", "bench.batch_sizes=[0]: wrong value; allowed: at least one"),
        ("bench.rows=[]", "bench.rows=[]: wrong value; allowed: at least one"),
        ("bench.table=9", "bench.table=9: wrong value; allowed: a table of the paper, 10 to 18"),
        ("bench.models=[clnn]", "bench.models: no such choice of model 'clnn'; nearest: cnn"),
        ("trainer.batch_size=4", "trainer.batch_size: rows of cola-bench differ in it"),
        ("method.name=lora", "method.name: rows of cola-bench differ in it"),
        ("resume=auto", "resume=auto: cola-bench goes on by itself"),
    ],
)
def test_what_cannot_be_measured_is_refused(line, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_bench(changed(line), {line.partition("=")[0]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench.rows=[lora]", "bench.rows: a setting of cola-bench alone; leave it out"),
        ("experiment=table13", "experiment=table13: a benchmark, which trains nothing; use cola-"),
    ],
)
def test_runs_refuse_the_benchmark(line, message, capsys):
    assert run_command(train.COMMAND, [line]) == 2
    assert capsys.readouterr().err.startswith(f"cola-train: {message}")


def test_the_benchmark_is_no_part_of_a_runs_identity():
    config = composed().config
    other = dataclasses.replace(config, bench=BenchConfig(lengths=RowLengths.cola, iterations=3))
    assert config_hash(other) == config_hash(config)
    assert "bench" not in config_yaml(other)


def test_help_names_its_keys_and_other_commands_hide_them(capsys):
    assert bench.run_bench(["--help"]) == 0
    own = capsys.readouterr().out
    assert run_command(train.COMMAND, ["--help"]) == 0
    assert "batch_sizes=[1,8,32]" in own
    assert "--dry" in own
    assert max(map(len, own.splitlines())) <= 100
    assert "batch_sizes" not in capsys.readouterr().out
    assert bench.run_bench(["--version"]) == 0


def test_adapter_dtype_is_loras_alone():
    config = changed("method.adapter_dtype=base", base=["task=synthetic"])
    with pytest.raises(ConfigError, match=r"method.adapter_dtype=base has no effect with method=c"):
        validate(config, {"method.adapter_dtype"})
