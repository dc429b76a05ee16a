"""`cola-evaluate`: finds what the run found, changes nothing of it, and says what it cannot do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cola.cli.evaluate import run_evaluation
from tests.runs import Run, run, small_synthetic

SETTINGS = (
    "task=synthetic",
    "trainer.batch_size=16",
    "trainer.max_steps=4",
    "trainer.eval_every=2",
)
SHORT = ("generation.max_new_tokens=4", "generation.num_beams=2")


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic():
        yield


def trained(folder: Path, *overrides: str) -> Run:
    with small_synthetic():
        return run(folder / "family" / "run", *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Run:
    return trained(tmp_path_factory.mktemp("writer"), "model=tiny-gpt2", "adapter=mlp", *SHORT)


def evaluated(done: Run, *lines: str) -> dict[str, Any]:
    """What a successful call adds to the run's folder."""
    before = set((done.folder / "evaluations").glob("*"))
    assert run_evaluation([f"run={done.folder}", *lines]) == 0
    (added,) = set((done.folder / "evaluations").glob("*")) - before
    found: dict[str, Any] = json.loads(added.read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str], *lines: str) -> str:
    """The message of a call that is refused."""
    assert run_evaluation(lines) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cola-evaluate: ")
    return err


def files_of(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if "evaluations" not in str(path))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


# What it finds -----------------------------------------------------------------------------------


def test_best_checkpoint_scores_what_the_run_reported(classifier, capsys):
    result = classifier.summary["result"]
    found = evaluated(classifier)
    assert (found["run"], found["checkpoint"], found["merge"]) == ("run", "best", "unmerged")
    assert found["step"] == result["selected_step"]
    assert found["splits"]["test"]["scores"] == result["scores"]["test"]
    assert found["splits"]["test"]["by_user"] == result["by_user"]
    assert len(found["splits"]["test"]["samples"]) == 8
    table = capsys.readouterr().out
    assert f"{result['value']:.4f}" in table
    assert all(f"| {user} " in table for user in result["by_user"])
    assert table.count("prediction: ") == 3


def test_writing_run_scores_what_it_reported(writer):
    found = evaluated(writer)["splits"]["test"]
    assert found["scores"] == writer.summary["result"]["scores"]["test"]
    assert found["tokens_per_second"] > 0


METHODS = [
    ("method=ft",),
    ("method=lora",),
    ("method=adalora",),
    ("method=ia3",),
    ("method=prompt", "model=tiny-gpt2", *SHORT),
    ("method=prefix", "model=tiny-bart", *SHORT),
    ("method=ptuning", "model=tiny-llama", *SHORT),
    ("merge=detached",),
    ("merge=merged", "offload=cpu"),
    ("merge=merged", "adapter=linear", "model=tiny-bart", *SHORT),
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", METHODS, ids=" ".join)
def test_any_method_scores_what_it_reported(tmp_path, overrides):
    done = trained(tmp_path, *overrides)
    assert evaluated(done)["splits"]["test"]["scores"] == done.summary["result"]["scores"]["test"]


def test_merged_scores_are_the_unmerged_ones(classifier):
    scores = classifier.summary["result"]["scores"]["test"]
    found = evaluated(classifier, "evaluation.merge=merged", "offload=cpu")
    assert found["merge"] == "merged"
    assert found["splits"]["test"]["scores"] == pytest.approx(scores, abs=1e-5)


def test_newest_checkpoint_and_other_splits(classifier):
    # Settings that agree with the run's are no change.
    found = evaluated(classifier, "checkpoint=newest", "split=selection", "seed=0")
    assert (found["checkpoint"], found["step"]) == ("newest", 4)
    last = [row for row in classifier.rows if "selection/loss" in row][-1]
    assert found["splits"]["validation"]["scores"]["loss"] == last["selection/loss"]


def test_training_rows_of_a_writing_run_get_their_prompts_back(writer):
    found = evaluated(writer, "split=train", "evaluation.num_samples=1")["splits"]["train"]
    (sample,) = found["samples"]
    assert sample["input"].endswith("response")
    assert len(sample["reference"].split()) == 2


def test_other_settings_apply(writer):
    found = evaluated(writer, "generation.max_new_tokens=1", "evaluation.num_samples=2")
    samples = found["splits"]["test"]["samples"]
    assert len(samples) == 2
    assert all(len(sample["prediction"].split()) <= 1 for sample in samples)


def test_prompt_is_answered(writer, capsys):
    line = "category open_qa text the fox, = response"
    found = evaluated(writer, f"prompt={line}")
    assert (found["prompt"], found["text"]) == (line, capsys.readouterr().out.strip())
    assert "splits" not in found


# Users with adapters of their own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> Run:
    """Two users who write, each alone."""
    return trained(
        tmp_path_factory.mktemp("users"), "model=tiny-gpt2", *SHORT, "users=alone",
        "users.names=[open_qa,closed_qa]", "users.others=drop", "optimizer.lr=0.05",
    )  # fmt: skip


def test_users_are_scored_as_the_run_scored_them(users):
    result = users.summary["result"]
    found = evaluated(users)
    assert found["merge"] == "unmerged"
    assert found["splits"]["test"]["scores"] == result["scores"]["test"]
    assert list(found["splits"]["test"]["by_user"].items()) == list(result["by_user"].items())


def test_training_rows_keep_their_users(users):
    found = evaluated(users, "split=train", "evaluation.num_samples=99")["splits"]["train"]
    assert list(found["by_user"]) == ["open_qa", "closed_qa"]
    assert all(f"category {one['user']} " in one["input"] for one in found["samples"])


def test_both_ways_are_printed_and_written(users, capsys):
    found = evaluated(users, "evaluation.merge=both", "evaluation.num_samples=1")
    table = capsys.readouterr().out
    assert table.index("unmerged:") < table.index("\nmerged:")
    assert table.count("| all ") == 2
    assert table.count("| closed_qa ") == 2
    assert found["merge"] == "unmerged"
    merged = evaluated(users, "evaluation.merge=merged", "evaluation.num_samples=1")
    assert found["merged"]["test"]["scores"] == merged["splits"]["test"]["scores"]
    assert found["splits"]["test"]["scores"] == users.summary["result"]["scores"]["test"]


LINE = "prompt=category open_qa text the fox response"


def test_prompt_is_answered_by_a_users_own_adapters(users):
    texts = {evaluated(users, LINE, f"user={user}")["text"] for user in ("open_qa", "closed_qa")}
    assert len(texts) == 2
    assert evaluated(users, LINE, "evaluation.merge=merged")["user"] is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((LINE,), "prompt: adapters are each user's own, and it is not said whose answer; add user"
                  "=NAME, of open_qa, closed_qa"),
        ((LINE, "user=open_q"), "user=open_q: no such user of the run; nearest: open_qa; "),
        ((LINE, "user=open_qa", "evaluation.merge=merged"),
         "user=open_qa: adapters are merged, so that everybody gets one answer; leave user out"),
    ],
)  # fmt: skip
def test_prompt_without_its_user_is_refused(users, capsys, lines, message):
    assert message in refused(capsys, f"run={users.folder}", *lines)


# What it leaves alone ----------------------------------------------------------------------------


def test_run_is_left_as_it_was(classifier):
    before = files_of(classifier.folder)
    evaluated(classifier)
    assert files_of(classifier.folder) == before


def test_run_in_the_middle_of_a_replacement_is_left_as_it_was(classifier, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(classifier.folder, folder)
    (folder / "summary.json").unlink()  # still running
    (folder / "checkpoints" / "best").rename(folder / "checkpoints" / ".best.old")
    before = files_of(folder)
    evaluated(Run(folder=folder, summary={}))
    assert files_of(folder) == before


# What it refuses ---------------------------------------------------------------------------------


def test_no_such_run(tmp_path, capsys):
    assert "run: not given; write run=PATH" in refused(capsys)
    assert "is no folder; give the folder of a run" in refused(capsys, f"run={tmp_path}/none")
    assert "has no config.yaml" in refused(capsys, f"run={tmp_path}")


def test_run_without_a_checkpoint_says_what_to_wait_for(classifier, tmp_path, capsys):
    shutil.copy(classifier.folder / "config.yaml", tmp_path)
    message = refused(capsys, f"run={tmp_path}")
    assert "no best checkpoint yet; checkpoint=newest has what was saved last" in message
    assert "wait for the run's first evaluation" in refused(
        capsys, f"run={tmp_path}", "checkpoint=newest"
    )
    assert not (tmp_path / "evaluations").exists()


def test_settings_that_the_run_was_trained_with_are_refused(classifier, capsys):
    message = refused(capsys, f"run={classifier.folder}", "adapter=linear", "seed=3", "device=cpu")
    assert "the run was trained with other settings: adapter.kind (lowrank there, linear" in message
    assert "seed (0 there, 3 given); only task.max_eval_rows, " in message
    assert "generation.num_beams" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("split=tran", "split=tran: no such choice; nearest: train; allowed: report, selection"),
        ("checkpoint=last", "checkpoint=last: no such choice; allowed: best, newest"),
        ("checkpoints=best", "checkpoints=best: no such key; nearest: checkpoint; allowed: run, "),
        ("num_beam=2", "nearest: generation.num_beams; "),
        ("generation.num_beams=x", "wrong value; allowed: a whole number or null"),
        ("data_dir=none", "data_dir=none: there is no such folder; give one that holds synthetic"),
        ("prompt=hello", "prompt=hello: the model of this run answers with a class or a value"),
        ("device=cuda:99", "device=cuda:99 asks for GPU 99"),
    ],
)
def test_bad_request_is_refused(classifier, capsys, line, message):
    assert message in refused(capsys, f"run={classifier.folder}", line)


def test_mlp_adapters_are_not_merged(writer, capsys):
    message = refused(capsys, f"run={writer.folder}", "evaluation.merge=merged")
    assert "evaluation.merge=merged with adapter=mlp: only an adapter that is linear" in message


def test_refusals_and_help_never_import_torch(classifier):
    code = (
        "import sys; from cola.cli.evaluate import run_evaluation as run; "
        f"codes = [run(a) for a in (['--help'], [], ['run={classifier.folder}', 'sed=1'])]; "
        "heavy = {'torch', 'transformers', 'hydra'} & set(sys.modules); "
        "sys.exit(str((codes, heavy)) if heavy or codes != [0, 2, 2] else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Help --------------------------------------------------------------------------------------------


def test_help_lists_what_may_be_given(capsys):
    assert run_evaluation(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("run ", "checkpoint ", "prompt ", "generation.num_beams=null", "data_dir=null",
                 "evaluations/TIMESTAMP.json", "  130  interrupted"):  # fmt: skip
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
    assert run_evaluation(["--version"]) == 0
