"""`cola-report` as typed: files, page, listing of the grid, messages and exit codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cola.cli.report import run_report
from cola.grid import accuracy_rows
from cola.report.bench_table import cost_table
from tests.reports import COLA, MACHINE, VERSIONS, write_run


def measured(label: str, method: str, **changes: Any) -> dict[str, Any]:
    """A row of `cola-bench`."""
    return {
        "call": 0, "machine": MACHINE, "settings": [], "label": label, "table": 13,
        "is_plain": True, "model": "llama-2-7b", "dtype": "bfloat16", "method": method,
        "adapter": "", "merge": "", "offload": "", "users": 1, "batch_size": 8, "lengths": "full",
        "seconds": 0.1, "seconds_spread": [0.09, 0.12], "stall_share": 0.0, "base_mib": 2048.0,
        "offload_mib": 0.0, "sent_bytes": 0.0, "returned_bytes": 0.0,
        "real_tokens_per_second": 1000.0, "offload_seconds_per_adapter": 0.0, "ratios": {},
        "synchronised": {"base_seconds": [0.1, 0.1, 0.1]}, "peak_reserved_mib": {},
        **changes,
    }  # fmt: skip


def test_reserved_memory_is_the_base_devices_own() -> None:
    peaks = {"cuda:0": 3000.0, "cuda:1": 5000.0}  # the base device first, then where fits are
    text = cost_table([measured("lora", "lora", peak_reserved_mib=peaks, base_mib=2048.0)])
    assert "2,048.0 [3,000]" in text


def write_bench(folder: Path) -> None:
    folder.mkdir(parents=True)
    call = {"command": ["cola-bench", "experiment=table13"], "versions": VERSIONS,
            "machine": MACHINE, "commit": "abc"}  # fmt: skip
    content = {"calls": [call], "rows": [measured("lora", "lora")]}
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `cola-report` writes of a few results."""
    top = tmp_path_factory.mktemp("report")
    outputs = top / "outputs"
    for seed in (0, 1):
        write_run(outputs, seed=seed, value=0.9, points={1: 0.5, 2: 0.6})
        write_run(outputs, **COLA, seed=seed, value=0.91, points={1: 0.5, 2: 0.6})
    write_run(outputs, model="<b>", task="glue/mrpc", name="<script>alert(1)")
    broken = write_run(outputs)
    (broken / "summary.json").write_text("{")
    going = write_run(outputs)
    (going / "summary.json").unlink()
    write_bench(outputs / "bench")
    formats = [f"--format={name}" for name in ("md,csv,tex", "html", "svg", "json")]
    assert run_report([str(outputs), "--out", str(top / "out"), *formats]) == 0
    return top / "out"


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def test_tables_are_written_in_every_format(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    tables = {f"table{n}.{kind}" for n in (2, 9, 13) for kind in ("md", "csv", "tex")}
    assert names == tables | {"index.html", "figures", "runs.json"}
    assert "<ins>90.0 ± 0.0</ins> (92.4, -2.4)" in (report / "table9.md").read_text()
    assert "on par" in (report / "table9.md").read_text()
    assert "not measured" in (report / "table13.md").read_text()
    assert r"\toprule" in (report / "table9.tex").read_text()
    assert (report / "table13.csv").read_text().count("\n") == 2
    drawn = {path.name.partition("_")[0] for path in (report / "figures").iterdir()}
    assert drawn == {"curves", "memory", "costs"}


def test_the_page_needs_nothing_else(page: str) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|\bsrc=", page)
    assert not re.search(r'href="(?!#)', page)
    assert not re.search(r"url\((?!#)", page)


def test_the_page_fits_phones_and_both_schemes(page: str) -> None:
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#222222" not in page.partition("</style>")[2]
    tables = page.count("<table>")
    assert tables == len(re.findall(r'<div class="scroll"[^>]*>\s*<table>', page))


def test_the_pages_anchors_are_there_once(page: str) -> None:
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(names)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(names)


def test_the_page_says_how_numbers_were_obtained(page: str) -> None:
    assert "abc123" in page
    assert "torch 2.13.0" in page
    assert "cola-train experiment=table9_lora task=mnist model=linear" in page
    assert (
        "trainer.epochs=400 trainer.batch_size=256 evaluation.select_on=validation seed=1" in page
    )
    assert "cola-bench experiment=table13" in page
    assert "Paired differences between methods" in page


def test_the_page_names_what_is_left_out(page: str) -> None:
    assert re.search(r"on or were stopped: 1\.", page)
    assert re.search(r"cannot be read.*run-\d+: Expecting property name", page, re.DOTALL)
    assert "these are not its numbers" in page
    assert re.search(r"Table 9</td>\s*<td>42</td><td>2</td><td>-</td>", page)
    assert re.search(r"Not run, with commands \(rows: 40\)", page)


def test_the_page_escapes_what_files_say(page: str) -> None:
    assert "<b>" not in page.partition("Table 2, GLUE")[2].partition("<figure")[0]
    assert "&lt;b&gt; for roberta-base" in page
    assert "&lt;script&gt;" in page


def test_a_table_that_was_asked_for_is_printed_even_if_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "outputs", task="digits")
    arguments = ["--table", "7", "--format", "md", "--out", str(tmp_path / "out")]
    assert run_report([*arguments, str(tmp_path / "outputs")]) == 0
    shown = capsys.readouterr().out
    assert "Table 7, Dolly with Llama-2 7B (query, value): nothing was run" in shown
    assert "| LoRA                  | - (18.8) |" in shown
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table7.md"]


def test_only_the_figures_that_were_asked_for(tmp_path: Path) -> None:
    for method in ("ft", "lora"):
        write_run(tmp_path / "outputs", method=method, points={1: 0.1, 2: 0.2})
    arguments = ["--figure", "memory", "--format", "png", "--out", str(tmp_path / "out")]
    assert run_report([*arguments, str(tmp_path / "outputs")]) == 0
    (file,) = (tmp_path / "out" / "figures").iterdir()
    assert file.name == "memory_cpu_mnist_linear_400_epochs_batch_size_256.png"


def test_the_grid_lists_every_row_with_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    assert run_report(["--grid", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "| cola-" in line]
    assert len(rows) == 247 + 88 + 276
    assert lines[-1] == (
        "247 accuracy runs, 1 done; 88 ablation runs, 0 done; 276 computation rows, 0 done"
    )
    (done,) = [row for row in rows if "experiment=table9_lora task=mnist model=linear" in row]
    assert [cell.strip() for cell in done.split("|")][7] == "1"
    assert all(any(row.command in line for line in rows) for row in accuracy_rows())


def test_the_grid_of_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report(["--grid", "--table", "4", "--figure", "10", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "10 accuracy runs, 0 done; 12 ablation runs, 0 done"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "5"], "--table 5: not one of them; nearest: 15; allowed: 2, 3, 4, 6, 7"),
        (["--table", "2,one"], "--table one: not one of them; allowed: 2, 3"),
        (["--figure", "memry"], "--figure memry: not one of them; nearest: memory; allowed"),
        (["--format", "pdf"], "--format pdf: not one of them; allowed: md, csv, tex"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["."], "no finished runs in .; cola-train leaves them in outputs"),
    ],
)
def test_wrong_input_gets_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_report(arguments) == 2
    written = capsys.readouterr().err
    assert written.startswith("cola-report: ")
    assert message in written
    assert written.count("\n") == 1


def test_without_outputs_there_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_report([]) == 2
    assert "no finished runs in outputs;" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report(["--help"]) == 0
    assert "--grid" in capsys.readouterr().out
    assert run_report(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cola-report ")
