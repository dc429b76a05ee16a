"""Accuracy tables: what is averaged, what stands beside it, and what must never be mixed."""

from pathlib import Path
from typing import Any

import pytest

from cola.grid import rows_of
from cola.report.accuracy import AccuracyTable
from cola.report.accuracy_build import build_table
from cola.report.accuracy_pairs import paired_statistics
from cola.report.accuracy_print import printed, records
from cola.report.finding import find
from cola.report.matching import match_runs
from cola.report.published import TABLES, columns_of, published_scores
from cola.report.table import Mark, PrintedTable, Text, to_latex, to_markdown
from tests.reports import COLA, write_run


def table(number: int, outputs: Path) -> AccuracyTable:
    return build_table(number, match_runs(find([outputs]).runs))


def cells(found: AccuracyTable, row: str, section: int = 0) -> dict[str, str]:
    """Texts of the first row whose labels start so, by header."""
    shown = printed(found)[section]
    for line in shown.lines:
        words = " ".join(cell.main for cell in line[: shown.num_labels])
        if words.startswith(row):
            texts = (f"{cell.main} {cell.rest}".strip() for cell in line)
            return dict(zip(shown.header, texts, strict=True))
    raise AssertionError(f"no row {row}")


@pytest.mark.parametrize("number", TABLES)
def test_the_paper_and_the_grid_have_the_same_rows(number: int) -> None:
    places = {
        (row.model, row.method, row.adapter, row.merge, row.users if number in (4, 8) else "")
        for row in rows_of(f"table{number}")
    }
    printed_rows = published_scores(number)
    assert places == {
        (key.model, key.method, key.adapter, key.merge, key.users if number in (4, 8) else "")
        for key in printed_rows
    }
    if number not in (4, 8):
        tasks = {row.task for row in rows_of(f"table{number}")}
        assert tasks == set(columns_of(number)) - {"avg"}


def test_a_cell_has_mean_spread_the_papers_value_and_the_difference(tmp_path: Path) -> None:
    for seed, value in enumerate((0.92, 0.93, 0.94)):
        write_run(tmp_path, value=value, seed=seed)
    row = cells(table(9, tmp_path), "linear LoRA")
    assert row["MNIST"] == "93.0 ± 1.0 (92.4, +0.6)"
    assert row["CIFAR-10"] == "- (39.0)"
    assert (row["trainable"], row["seeds"]) == ("6,352 (6,400)", "3")


def test_a_row_that_was_not_run_stays_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = table(9, tmp_path)
    assert len(printed(found)[0].lines) == 21
    assert cells(found, "cnn ColA MLP")["MNIST"] == "- (98.9)"


def test_best_and_second_best_are_those_of_their_model(tmp_path: Path) -> None:
    for index, (method, value) in enumerate((("lora", 0.90), ("ft", 0.92))):
        write_run(tmp_path, method=method, value=value)
        write_run(tmp_path, method=method, model="mlp", value=value + 0.05 * (1 - index))
    write_run(tmp_path, **COLA, value=0.92001)
    ranks = {
        (line.key.model, line.key.method): line.cells["mnist"].rank
        for line in table(9, tmp_path).sections[0].lines
        if line.cells["mnist"].scores
    }
    assert ranks[("linear", "ft")] == ranks[("linear", "cola")] == 1  # alike as printed
    assert ranks[("linear", "lora")] == 2
    assert ranks[("mlp", "lora")] == 1


def test_where_all_are_alike_none_is_best(tmp_path: Path) -> None:
    write_run(tmp_path, value=0.9)
    write_run(tmp_path, **COLA, value=0.9)
    lines = table(9, tmp_path).sections[0].lines
    assert {line.cells["mnist"].rank for line in lines} == {0}


def test_a_stand_in_is_never_among_the_papers_numbers(tmp_path: Path) -> None:
    settings = {"trainer.epochs": 40, "trainer.batch_size": 32}
    for model, value in (("roberta-base", 0.8), ("tiny-roberta", 0.5)):
        write_run(tmp_path, task="glue/mrpc", model=model, value=value, settings=settings)
    found = table(2, tmp_path)
    assert [section.is_stand_in for section in found.sections] == [False, True]
    assert cells(found, "LoRA")["MRPC"] == "80.0 (89.4, -9.4)"
    assert cells(found, "LoRA", section=1)["MRPC"] == "50.0"  # the paper's value is another model's
    assert "STAND-IN, tiny-roberta for roberta-base" in printed(found)[1].title
    assert "STAND-IN" not in printed(found)[0].title


def test_built_in_rows_are_a_stand_in_for_the_data(tmp_path: Path) -> None:
    write_run(tmp_path, settings={"data_dir": "builtin"})
    section = table(9, tmp_path).sections[0]
    assert section.is_stand_in
    assert "built-in sample rows" in printed(table(9, tmp_path))[0].title


def test_another_length_of_training_is_another_section(tmp_path: Path) -> None:
    write_run(tmp_path, value=0.9)
    write_run(tmp_path, value=0.5, steps=2, settings={"trainer.max_steps": 2})
    titles = [shown.title for shown in printed(table(9, tmp_path))]
    assert any(title.endswith("400 epochs, batch size 256") for title in titles)
    assert any("2 steps, batch size 256 (the paper: 400 epochs" in title for title in titles)


def test_runs_with_other_settings_are_left_out_and_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed=seed, value=0.9, settings={"optimizer.lr": 0.03})
    write_run(tmp_path, seed=2, value=0.1, settings={"optimizer.lr": 0.3})
    found = table(9, tmp_path)
    assert cells(found, "linear LoRA")["MNIST"].startswith("90.0 ± 0.0")
    notes = " ".join(printed(found)[0].notes)
    assert "LoRA on MNIST: runs with other settings (optimizer.lr=0.3) are left out: 1" in notes


def test_seeds_on_another_device_are_averaged(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, settings={"device": "cpu"})
    write_run(tmp_path, seed=1, settings={"device": "cuda:1", "data_dir": "elsewhere"})
    assert cells(table(9, tmp_path), "linear LoRA")["seeds"] == "2"


def test_coarse_products_are_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "TensorFloat" not in " ".join(printed(table(9, tmp_path))[0].notes)
    write_run(tmp_path, task="cifar10", settings={"model.tf32": True})
    notes = printed(table(9, tmp_path))[0].notes
    assert "products of TensorFloat-32 (model.tf32=true): linear" in notes


def test_an_average_needs_every_column_at_the_same_seed(tmp_path: Path) -> None:
    settings = {"trainer.epochs": 40, "trainer.batch_size": 32}
    columns = [column for column in columns_of(3) if column != "avg"]
    for index, task in enumerate(columns):
        changes: dict[str, Any] = {"task": task, "model": "bart-base", "metric": "rougeL"}
        write_run(tmp_path, **changes, value=0.1 * (index + 1), settings=settings)
        if index:
            write_run(tmp_path, **changes, value=0.9, seed=1, settings=settings)
    found = table(3, tmp_path)
    cell = next(line for line in found.sections[0].lines if line.key.method == "lora").cells["avg"]
    assert cell.scores == {0: pytest.approx(35.0)}


def user_run(outputs: Path, experiment: str, value: float, **changes: Any) -> None:
    scored = {"scores": {"test": {"rougeL": value}}}
    write_run(
        outputs,
        **COLA | {"model": "gpt2", "task": "dolly", "metric": "rougeL", "num_users": 8}
        | {"value": value, "unmerged": scored, "by_user": {"open_qa": {"rougeL": value}}}
        | changes,
        settings={
            "trainer.epochs": 40,
            "trainer.batch_size": 32,
            "experiment_name": experiment,
            "users.kinds": changes.get("kinds"),
        },
    )  # fmt: skip


def test_users_are_columns_and_all_of_them_twice(tmp_path: Path) -> None:
    merged = {"scores": {"test": {"rougeL": 0.05}}}
    for seed, value in enumerate((0.10, 0.12)):
        user_run(tmp_path, "table4_alone_lowrank", value, users="alone", seed=seed, merged=merged)
    row = cells(table(4, tmp_path), "alone ColA low-rank")
    assert row["open qa"] == "11.0 ± 1.4 (15.2, -4.2)"
    assert row["all, unmerged"] == "11.0 ± 1.4 (15.7, -4.7)"
    assert row["all, merged"] == "5.0 ± 0.0 (13.9, -8.9)"
    assert row["general qa"] == "- (16.2)"


def test_doubtful_values_of_the_paper_are_marked(tmp_path: Path) -> None:
    assert cells(table(4, tmp_path), "joint ColA MLP")["open qa"] == "- (15.5?)"


def test_joint_runs_of_table_4_are_table_6s(tmp_path: Path) -> None:
    user_run(tmp_path, "table4_joint_lowrank_unmerged", 0.17, users="joint")
    assert cells(table(6, tmp_path), "ColA low-rank")["Dolly"].startswith("17.0 (")
    assert cells(table(4, tmp_path), "joint ColA low-rank")["open qa"].startswith("17.0 (")


def test_a_rehearsal_belongs_to_its_experiment_whatever_it_trains(tmp_path: Path) -> None:
    user_run(
        tmp_path, "table8_alone_lowrank", 0.3, users="alone", model="tiny-llama", task="synthetic"
    )
    assert table(4, tmp_path).is_empty
    stand_in = table(8, tmp_path).sections[0].key
    assert stand_in is not None
    assert stand_in.stand_in == "tiny-llama for llama-2-7b, synthetic for dolly"


def test_a_run_of_no_row_is_in_no_table(tmp_path: Path) -> None:
    write_run(tmp_path, task="digits")
    write_run(tmp_path, **COLA, settings={"trainer.interval": 2})
    assert all(table(number, tmp_path).is_empty for number in TABLES)


def test_every_format_marks_best_and_second_best() -> None:
    shown = PrintedTable(
        title="50 % of A_B",
        header=("method", "score"),
        num_labels=1,
        lines=((Text(main="x"), Text(main="2 ± 1", mark=Mark.best)),
               (Text(main="y"), Text(main="1", rest="(3)", mark=Mark.second))),
        notes=("a < b",),
    )  # fmt: skip
    markdown, latex = to_markdown([shown]), to_latex([shown])
    assert "**2 ± 1**" in markdown
    assert "<ins>1</ins> (3)" in markdown
    assert r"x & \textbf{2 $\pm$ 1} \\" in latex
    assert r"y & \underline{1} (3) \\" in latex
    assert r"\caption{50 \% of A\_B; a $<$ b}" in latex
    assert r"\begin{tabular}{lr}" in latex


def test_records_have_a_line_for_every_cell(tmp_path: Path) -> None:
    for seed, value in enumerate((0.92, 0.94)):
        write_run(tmp_path, value=value, seed=seed)
    lines = records(table(9, tmp_path))
    assert len(lines) == 42
    (line,) = [line for line in lines if line["mean"] is not None]
    assert line["difference"] == pytest.approx(0.6)
    assert (line["seeds"], line["published"], line["split"]) == (2, "92.4", "test")


def test_methods_are_compared_pair_by_pair(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, seed=seed, value=0.90 + 0.02 * seed)
        write_run(tmp_path, **COLA, seed=seed, value=0.901 + 0.02 * seed)
    write_run(tmp_path, method="ft", value=0.99)  # a single seed says nothing
    pairs = paired_statistics(table(9, tmp_path).sections[0])
    assert pairs is not None
    assert [[cell.main for cell in line] for line in pairs.lines] == [
        ["linear: ColA low-rank - LoRA", "MNIST", "3", "+0.10", "[+0.10, +0.10]", "0.000", "on par"]
    ]


def test_one_seed_is_compared_with_nothing(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, **COLA)
    assert paired_statistics(table(9, tmp_path).sections[0]) is None
