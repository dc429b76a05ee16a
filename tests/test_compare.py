"""`scripts/compare.py`: a sweep of cola-train whose runs end in one table and one file."""

import json
import shutil
from pathlib import Path

import pytest

from scripts import compare

COMPARISON = """
seeds: [0, 1]
common: [task=digits, tracking=files, trainer.max_steps=2, trainer.eval_every=2]
variants:
  low-rank: [adapter=lowrank]
  full fine-tuning: [method=ft]
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "COMPARISONS", tmp_path)
    Path("tiny.yaml").write_text(COMPARISON)


def finished() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in Path().glob("runs/*/*/summary.json")}


def run(*words: str) -> int:
    return compare.main(["tiny", "--folder", "runs", "--json", "results.json", *words])


@pytest.mark.slow
def test_what_is_finished_is_kept_and_the_rest_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimizer.lr=1e-3") == 0
    before = finished()
    assert len(before) == 4
    results = json.loads(Path("results.json").read_text())["runs"]
    assert [(one["variant"], one["seed"]) for one in results] == [
        ("low-rank", 0), ("full fine-tuning", 0), ("low-rank", 1), ("full fine-tuning", 1)
    ]  # fmt: skip
    assert results[0]["overrides"][-2:] == ["seed=0", "optimizer.lr=1e-3"]
    assert results[0]["summary"]["steps"] == 2
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["low-rank", "full fine-tuning"]
    assert "±" in table[2], "over seeds"

    Path("results.json").unlink()
    assert run("optimizer.lr=1e-3") == 0
    assert finished() == before, "finished in their folders"
    assert json.loads(Path("results.json").read_text())["runs"] == results

    shutil.rmtree("runs")
    Path("results.json").write_text(json.dumps({"runs": results[1:]}))
    assert run("optimizer.lr=1e-3", "--resume") == 0
    assert len(finished()) == 1, "the others are in the file"
    again = json.loads(Path("results.json").read_text())["runs"]
    assert again[1:] == results[1:]
    assert again[0]["losses"] == results[0]["losses"]


def test_what_cannot_run_is_one_message_and_touches_no_results(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("optimiser.lr=1e-3") == 2
    assert "optimizer" in capsys.readouterr().err
    assert compare.main(["tinny"]) == 2
    assert "comparison 'tinny' does not exist; there are tiny" in capsys.readouterr().err
    assert not Path("results.json").exists()
