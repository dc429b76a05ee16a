"""The table of users: rows are experiments, our numbers stand beside the paper's."""

import json
from pathlib import Path
from typing import Any

import pytest

from cola.config.groups import group_choices
from cola.errors import DataError
from cola.report.user_table import USERS, TableRow, published, read_runs, user_table


def summary(value: float, *, merged: float | None = None) -> dict[str, Any]:
    return {
        "trainable_parameters": 2_359_296,
        "result": {
            "metric": "rougeL",
            "split": "test",
            "by_user": {user: {"rougeL": value} for user in USERS[:7]},
            "unmerged": {"scores": {"test": {"rougeL": value}}},
            "merged": None if merged is None else {"scores": {"test": {"rougeL": merged}}},
        },
    }


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if row in line.replace(" ", ""))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("table", "num_rows"), [("4", 10), ("8", 8)])
def test_every_row_of_the_paper_is_an_experiment(table: str, num_rows: int) -> None:
    rows = published(table)
    assert len(rows) == num_rows
    assert {row.experiment(table) for row in rows} <= set(group_choices()["experiment"])


def test_row_shows_mean_spread_and_the_paper(tmp_path: Path) -> None:
    for name, value in (("a", 0.10), ("b", 0.12)):
        folder = tmp_path / "table4_alone_lowrank" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary(value, merged=0.05)))
    row = cells(user_table("4", read_runs([tmp_path])), "|alone|lowrank|")
    assert row[3] == "2,359,296"
    assert row[4] == "11.0±1.4 (19.1)"
    assert row[-2:] == ["11.0±1.4 (15.7)", "5.0±0.0 (13.9)"]
    assert row[11] == "- (16.2)"  # general_qa was not scored


def test_what_was_not_run_is_missing() -> None:
    row = cells(user_table("8", {}), "|joint|mlp|")
    assert row[3:5] == ["-", "- (24.0)"]
    assert row[-1] == "-"  # the paper prints a dash too


def test_one_value_of_merged_training_stands_under_merged() -> None:
    row = cells(user_table("4", {}), "|collaboration|lowrank|")
    assert row[-2:] == ["-", "- (15.2)"]


def test_other_tables_are_refused() -> None:
    with pytest.raises(DataError, match="table 5: not one of users; give 4 or 8"):
        published("5")


def test_experiment_of_a_joint_row_says_how_it_trains() -> None:
    assert TableRow("joint", "mlp", "unmerged").experiment("8") == "table8_joint_mlp_unmerged"
    alone = TableRow("alone", "lowrank-mlp", "unmerged")
    assert alone.experiment("4") == "table4_alone_lowrank_mlp"
