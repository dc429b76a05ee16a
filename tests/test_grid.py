"""The list of the paper's rows, and that each of them is what it says; the whole list is slow."""

import csv
import importlib.util
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest

from cola.config.choices import Reduction
from cola.config.groups import describe_choice, group_choices
from cola.config.identity import config_hash
from cola.config.schema import ExperimentConfig
from cola.config.store import compose_config
from cola.errors import ConfigError
from cola.grid import (
    STAND_INS,
    GridRow,
    ablation_rows,
    accuracy_rows,
    computation_rows,
    rows_of,
)
from tests.configs import composed

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_grid.py"

# The paper's tables and figures, and how many rows each has; Table 6 shares five with Table 4.
ACCURACY = {"table2": 96, "table3": 72, "table4": 10, "table6": 12, "table7": 12, "table8": 8,
            "table9": 42}  # fmt: skip
ABLATION = {"figure4": 12, "figure5": 12, "figure6": 8, "figure7": 12, "figure8": 12, "figure9": 8,
            "figure10": 12, "figure11": 12}  # fmt: skip
COMPUTATION = {"table10": 36, "table11": 36, "table12": 36, "table13": 36, "table14": 24,
               "table15": 63, "table16": 15, "table17": 15, "table18": 15}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_grid", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained() -> list[GridRow]:
    return [*accuracy_rows(), *ablation_rows()]


def facts_of(config: ExperimentConfig) -> dict[str, object]:
    """What a row claims, as a composed configuration has it."""
    is_cola = config.method.name.name == "cola"
    kinds = config.users.kinds or [config.adapter.kind.name]
    return {
        "experiment": config.experiment_name,
        "model": config.model.name,
        "task": "/".join(filter(None, (config.task.name, config.task.subset))),
        "method": config.method.name.name,
        "adapter": "-".join(kinds) if is_cola else "",
        "merge": config.merge.mode.name if is_cola else "",
        "users": config.users.name.name,
        "num_users": len(config.users.names or ["all"]),
        "batch_size": config.trainer.batch_size,
        "interval": config.trainer.interval,
    }


def claims_of(row: GridRow) -> dict[str, object]:
    names = facts_of(composed().config)
    return {name: getattr(row, name) for name in names}


def test_rows_are_counted():
    assert len(accuracy_rows()) == 247
    assert len(ablation_rows()) == 88
    assert len(computation_rows()) == 276
    shown = Counter(name for row in (*trained(), *computation_rows()) for name in row.shown_in)
    assert shown == ACCURACY | ABLATION | COMPUTATION
    assert all(len(rows_of(name)) == count for name, count in shown.items())


def test_rows_are_those_that_the_paper_prints():
    source = resources.files("cola.report") / "published" / "accuracy.csv"
    lines = csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    printed = {
        (line["table"], line["model"], line["method"], line["adapter"], line["merge"],
         line["users"], "dolly" if line["table"] in "48" else line["column"])
        for line in lines
        if line["column"] != "avg"
    }  # fmt: skip
    assert printed == {
        (name[-1], row.model, row.method, row.adapter, row.merge,
         row.users if name in ("table4", "table8") else "one", row.task)
        for row in accuracy_rows()
        for name in row.shown_in
    }  # fmt: skip


def test_no_command_stands_twice():
    commands = [row.command for row in (*trained(), *computation_rows())]
    assert len(set(commands)) == len(commands) == 611


def test_table_6_ends_in_the_joint_runs_of_table_4():
    shared = [row for row in accuracy_rows() if row.shown_in == ("table4", "table6")]
    assert [row.experiment for row in shared] == [
        f"table4_joint_{form}" for form in ("lowrank_unmerged", "lowrank_merged",
        "linear_unmerged", "linear_merged", "mlp_unmerged")
    ]  # fmt: skip


def test_experiments_of_tables_and_figures_are_those_of_the_rows():
    choices = {
        choice for choice in group_choices()["experiment"] if choice.startswith(("table", "figure"))
    }
    assert choices == {row.experiment for row in (*trained(), *computation_rows())}
    for choice in choices:
        item = choice.partition("_")[0].replace("table", "Table ").replace("figure", "Figure ")
        assert describe_choice("experiment", choice).startswith(f"{item} (")


@pytest.mark.parametrize(
    "row",
    [rows_of(name)[7 * turn % 8] for turn, name in enumerate([*ACCURACY, "figure4", "figure9"])],
    ids=lambda row: row.command.removeprefix("cola-train experiment="),
)
def test_a_row_is_what_it_claims(row):
    assert facts_of(composed(*row.overrides).config) == claims_of(row)


@pytest.mark.slow
@pytest.mark.smoke
def test_every_row_is_what_it_claims_and_none_is_another():
    hashes: dict[GridRow, str] = {}
    for row in trained():
        config = compose_config(row.overrides)
        assert facts_of(config) == claims_of(row)
        hashes[row] = config_hash(config)
    assert len({hashes[row] for row in accuracy_rows()}) == 247
    assert len({hashes[row] for row in ablation_rows()}) == 88
    # Llama-2, low-rank, unmerged, with batches of 8 and an interval of 1: in Table 7 and Figure 9.
    assert len(set(hashes.values())) == 334


@pytest.mark.parametrize(
    ("lines", "lr", "epochs", "batch_size"),
    [
        (("experiment=table2_ft", "task.subset=qqp"), 5e-6, 40, 32),
        (("experiment=table2_prefix", "task.subset=rte"), 3e-4, 40, 32),
        (("experiment=table2_linear_merged", "task.subset=rte"), 5e-6, 40, 32),
        (("experiment=table2_linear_merged", "task.subset=cola"), 3e-4, 40, 32),
        (("experiment=table3_mlp_unmerged", "task=dart"), 3e-4, 40, 32),
        (("experiment=table7_linear_unmerged",), 5e-6, 40, 8),
        (("experiment=table9_ft", "task=cifar10", "model=cnn"), 3e-2, 400, 256),
    ],
)
def test_rows_have_the_papers_hyperparameters(lines, lr, epochs, batch_size):
    config = composed(*lines).config
    assert config.optimizer.lr == lr
    assert (config.trainer.epochs, config.trainer.batch_size) == (epochs, batch_size)


def test_the_ablation_on_images_adds_the_gradients_of_an_interval():
    for name in ("figure10", "figure11"):
        config = composed(f"experiment={name}").config
        assert config.trainer.interval_reduction is Reduction.sum


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(ConfigError, match=r"tabel9: no such table or figure; nearest: table9"):
        rows_of("tabel9")
    with pytest.raises(ConfigError, match="table5: no such table"):
        rows_of("table5")  # hyperparameters


def test_a_command_line_is_quoted_for_a_shell():
    (row,) = [row for row in rows_of("table10") if (row.method, row.batch_size) == ("ia3", 8)]
    assert row.command == "cola-bench experiment=table10 'bench.rows=[ia3/b8]'"


def test_a_sample_has_every_experiment_set_and_interval(script):
    rows = script.sample(trained())
    assert len(rows) == 76
    for fact in ("experiment", "model", "task", "method", "adapter", "merge", "users", "interval"):
        assert {getattr(row, fact) for row in rows} == {getattr(row, fact) for row in trained()}


def test_what_is_given_for_all_rows_replaces_their_own(script):
    jobs: Sequence[Sequence[str]] = [row.overrides for row in rows_of("table2")]
    assert len(script.unique_jobs(jobs, ["seed=0,1"])) == 96
    forms = [
        [f"experiment={name}"] for name in dict.fromkeys(r.experiment for r in rows_of("table2"))
    ]
    assert script.unique_jobs(jobs, ["task.subset=cola,rte"]) == forms
    assert script.unique_jobs(jobs, ["task=synthetic"]) == forms


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table22"], "table22: no such table or figure; nearest: table2"),
        (["table13"], "table13: nothing is trained; run cola-bench experiment=table13"),
        (["seed=1"], "no table or figure named"),
        (["table9", "sede=1"], "sede=1: no such group or key; nearest: seed"),
    ],
)
def test_a_wrong_word_ends_with_one_message(script, capsys, words, message):
    assert script.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_rehearsal_runs_on_tiny_models_and_once(script, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    words = ["figure10", "--rehearse", "model=linear", "trainer.interval=2"]
    assert script.main(words) == 0
    (summary,) = tmp_path.glob("outputs/smoke-grid/figure10/*/summary.json")
    time = summary.stat().st_mtime_ns
    caplog.clear()
    with caplog.at_level("INFO"):
        assert script.main(words) == 0
    assert "1 skipped" in caplog.text
    assert "jobs to run" not in caplog.text  # found before anything was launched
    assert summary.stat().st_mtime_ns == time


def test_a_stand_in_is_a_choice_of_model(script):
    assert set(STAND_INS.values()) <= set(group_choices()["model"])
    models = {row.model: script.stand_in(row) for row in trained()}
    assert models["llama-2-7b"] == ["model=tiny-llama"]
    assert models["cnn"] == []
