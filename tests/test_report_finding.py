"""What the report reads: folders of runs, files of many runs, measurements, and what is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cola.errors import DataError
from cola.report.finding import find, runs_json
from cola.report.runs import differences, of_one_variant
from tests.reports import COLA, MACHINE, VERSIONS, summary, write_run


def test_a_run_is_its_summary_settings_and_curve(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path,
        **COLA | {"merge": "merged"},
        settings={"trainer.interval": 4, "users.kinds": ["lowrank", "mlp"]},
        points={10: 0.5, 20: 0.75},
    )
    (run,) = find([tmp_path]).runs
    assert run.source == str(folder)
    assert (run.interval, run.batch_size, run.length) == (4, 256, "400 epochs")
    assert run.label == "ColA low-rank & MLP, merged"
    assert run.curve() == [(10, 0.5), (20, 0.75)]


def test_a_model_of_ones_own_is_called_like_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path, model="models/minilm", settings={"model.name": "hf"})
    assert find([tmp_path]).runs[0].model == "minilm"


def test_unfinished_runs_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "summary.json").unlink()
    found = find([tmp_path])
    assert found.unfinished == [folder]
    assert found.is_empty


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("summary.json", '{"run": ', "Expecting value"),
        ("summary.json", "[]", "holds no summary"),
        ("summary.json", '{"model": "mlp"}', "no run, task, method, adapter, merge"),
        ("summary.json", json.dumps(summary(value=None)), "result.value=None is no number"),
        ("config.yaml", "a: [", "while parsing"),
    ],
)
def test_what_is_broken_is_named_and_left_out(
    tmp_path: Path, file: str, text: str, reason: str
) -> None:
    folder = write_run(tmp_path)
    write_run(tmp_path)
    (folder / file).write_text(text)
    found = find([tmp_path])
    assert len(found.runs) == 1
    (message,) = found.broken
    assert message.startswith(f"{folder}: ")
    assert reason in message


def test_a_runs_own_folders_are_not_searched(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_run(folder / "checkpoints", wall_seconds=99.0)
    assert len(find([tmp_path]).runs) == 1


def test_a_comparisons_file_holds_runs(tmp_path: Path) -> None:
    content = summary(value=0.8)
    del content["run"]
    lines = ["task=mnist", "model=linear", "trainer.epochs=20", "seed=2"]
    results = {
        "command": "scripts/compare.py mnist",
        "commit": "abc",
        "versions": VERSIONS,
        "machine": MACHINE,
        "runs": [{"seed": 2, "overrides": lines, "summary": content, "losses": [0.1]}],
    }
    (tmp_path / "mnist.json").write_text(json.dumps(results))
    (tmp_path / "other.json").write_text('{"rows": []}')
    (run,) = find([tmp_path]).runs
    assert (run.seed, run.length, run.batch_size, run.score) == (2, "20 epochs", None, 0.8)
    assert run.command == "cola-train task=mnist model=linear trainer.epochs=20 seed=2"


def test_measurements_know_their_call(tmp_path: Path) -> None:
    content = {"calls": [{"command": ["cola-bench"]}], "rows": [{"call": 0, "table": 13}]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    (row,) = find([tmp_path]).bench_rows
    assert row["source"]["command"] == ["cola-bench"]


def test_a_row_is_there_once_as_it_was_measured_last(tmp_path: Path) -> None:
    def write(name: str, started: str, *rows: dict[str, object]) -> None:
        calls = [{"command": ["cola-bench"], "started": started}]
        facts = {"call": 0, "table": 13, "machine": {"gpus": []}, "lengths": "full"}
        content = {"calls": calls, "rows": [facts | row for row in rows]}
        (tmp_path / name).write_text(json.dumps(content))

    write(
        "a.json",
        "2026-11-29T10:00:00+0000",
        {"label": "lora", "batch_size": 8, "seconds": 2.0},
        {"label": "lora", "batch_size": 32, "seconds": 8.0},
        {"label": "floor", "batch_size": 8, "seconds": 1.0},
    )
    write(
        "b.json",
        "2026-11-28T10:00:00+0000",
        {"label": "lora", "batch_size": 8, "seconds": 3.0},
        {"label": "ft", "batch_size": 8, "seconds": 4.0},
    )
    write("c.json", "2026-11-30T10:00:00+0000", {"label": "ft", "batch_size": 8, "failed": "?"})
    found = [
        (row["batch_size"], row["label"], row["seconds"]) for row in find([tmp_path]).bench_rows
    ]
    assert found == [(8, "lora", 2.0), (8, "floor", 1.0), (8, "ft", 4.0), (32, "lora", 8.0)]


def test_runs_survive_as_one_file(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs", points={10: 0.5, 20: 0.6}, settings={"optimizer.lr": 0.1})
    runs = find([tmp_path / "outputs"]).runs
    file = tmp_path / "runs.json"
    file.write_text(runs_json(runs))
    (again,) = find([file]).runs
    assert again.variant == runs[0].variant
    assert again.curve() == runs[0].curve()
    # Beside its folder it is the same run.
    assert len(find([tmp_path / "outputs", file]).runs) == 1


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder; give folders of runs"):
        find([tmp_path / "nowhere"])


def test_a_file_without_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"rows": 3}')
    with pytest.raises(DataError, match=r"a\.json: holds no results; give a folder of runs"):
        find([tmp_path / "a.json"])


def test_the_variant_with_most_seeds_is_kept_and_its_last_run_of_a_seed(tmp_path: Path) -> None:
    for name, seed, rate in (("a", 0, 0.1), ("b", 0, 0.3), ("c", 1, 0.3), ("d", 1, 0.3)):
        write_run(tmp_path, seed=seed, name=name, settings={"optimizer.lr": rate})
    runs = find([tmp_path]).runs
    chosen = of_one_variant(runs)
    assert [run.id for run in chosen] == ["b", "d"]
    assert differences(runs[:1], chosen) == ["optimizer.lr=0.1"]


def test_tables_are_read_without_torch(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = (
        "import sys; from cola.cli.report import run_report; "
        f"code = run_report(['--format=md', '--out={tmp_path}/out', {str(tmp_path)!r}]); "
        "heavy = {'torch', 'transformers', 'matplotlib', 'hydra'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
