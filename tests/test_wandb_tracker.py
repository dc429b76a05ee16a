"""Weights & Biases: how a run is sent, without ever prompting or stopping it."""

import json
import logging
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from cola.tracking import build_tracker, read_metrics
from cola.wandb_tracker import NUMBERS
from tests import fake_wandb
from tests.fake_wandb import WandbError
from tests.runs import config_of, run, small_synthetic

LINES = ("task=synthetic", "tracking=wandb", "tracking.tags=[a,task:synthetic]")
SAMPLE = {"input": "a", "prediction": "b", "reference": "c"}


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    fake_wandb.clean(monkeypatch, tmp_path / "home")
    return fake_wandb.install(monkeypatch)


def start(tmp_path: Path):
    folder = tmp_path / "run-1"
    folder.mkdir(exist_ok=True)
    return build_tracker(folder, config_of(*LINES), last_step=0)


def test_run_is_offline_without_a_key(tmp_path, wandb):
    start(tmp_path).close()
    (settings,) = wandb.started
    assert (settings["mode"], settings["resume"]) == ("offline", None)
    assert (settings["dir"], settings["id"]) == (tmp_path / "run-1", "run-1")
    assert settings["project"] == "cola"


def test_run_is_online_with_a_key(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    start(tmp_path).close()
    assert (wandb.started[0]["mode"], wandb.started[0]["resume"]) == ("online", "allow")


def test_run_is_online_with_a_key_of_an_earlier_login(tmp_path, wandb):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (home / ".netrc").chmod(0o600)
    start(tmp_path).close()
    assert wandb.started[0]["mode"] == "online"


def test_mode_of_the_environment_wins_over_the_key(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(tmp_path).close()
    assert wandb.started[0]["mode"] == "disabled"


def test_run_is_named_grouped_and_tagged(tmp_path, wandb):
    start(tmp_path).close()
    (settings,) = wandb.started
    method = "cola-lowrank-unmerged"
    assert settings["name"] == f"synthetic tiny-roberta {method} s0"
    assert (settings["group"], settings["job_type"]) == ("synthetic", method)
    assert settings["tags"] == [
        "model:tiny-roberta", "task:synthetic", f"method:{method}", "adapter:lowrank",
        "merge:unmerged", "users:one", "offload:none", "a",
    ]  # fmt: skip
    assert settings["config"]["labels"]["method"] == method
    assert settings["config"]["optimizer"]["lr"] == 3e-3
    json.dumps(settings["config"])


def test_numbers_are_over_our_steps_so_that_late_ones_count(tmp_path, wandb):
    tracker = start(tmp_path)
    tracker.log(3, {"train/loss": 1.0})
    tracker.log_samples(2, "test", [SAMPLE])
    tracker.log_samples(2, "empty", [])
    tracker.close()
    columns, rows = ["step", "input", "prediction", "reference"], [[2, "a", "b", "c"]]
    assert wandb.run.logged == [
        {"step": 3, "train/loss": 1.0},
        {"step": 2, "samples/test": (columns, rows)},
    ]
    defined = wandb.run.defined
    assert defined.pop("step") == {"hidden": True}
    assert {settings["step_metric"] for settings in defined.values()} == {"step"}
    assert defined["selection/*"]["summary"] == "max,last"


def test_names_match_one_pattern_each():
    patterns = [name for name in NUMBERS if name.endswith("*")]
    for name in ("train/epoch", "selection/user/a/accuracy", "samples/test", *patterns):
        assert sum(fnmatch(name, pattern) for pattern in patterns) == 1, name


def test_names_of_gpus_have_no_colon(tmp_path, wandb):
    tracker = start(tmp_path)
    tracker.log(1, {"memory/cuda:0_peak_mib": 1.0})
    tracker.finish({"peak_mib": {"cuda:0": 1.0}, "steps": 3}, {})
    tracker.close()
    assert wandb.run.logged[0] == {"step": 1, "memory/cuda0_peak_mib": 1.0}
    assert wandb.run.summary == {"peak_mib": {"cuda0": 1.0}, "steps": 3}


def test_end_of_a_run_has_summary_and_figures(tmp_path, wandb):
    tracker = start(tmp_path)
    tracker.finish({"steps": 3}, {"curve": tmp_path / "curve.png"})
    tracker.close()
    assert wandb.run.logged == [{"curve": f"image of {tmp_path / 'curve.png'}"}]
    assert wandb.run.summary == {"steps": 3}
    assert wandb.run.is_finished


@pytest.mark.parametrize("error", [WandbError("no service"), OSError("no service")], ids=repr)
def test_library_that_cannot_start_leaves_the_files(tmp_path, wandb, caplog, error):
    wandb.error = error
    with caplog.at_level(logging.WARNING):
        tracker = start(tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert "Weights & Biases failed (no service); the run goes on with metrics.jsonl" in caplog.text
    assert len(read_metrics(tmp_path / "run-1")) == 1


@pytest.mark.parametrize("error", [WandbError("died"), BrokenPipeError("died")], ids=repr)
def test_library_that_fails_later_never_stops_a_run(tmp_path, wandb, error):
    tracker = start(tmp_path)
    wandb.run.error = error
    tracker.log(1, {"train/loss": 1.0})
    tracker.log_samples(1, "test", [SAMPLE])
    tracker.finish({}, {})
    tracker.close()
    assert len(read_metrics(tmp_path / "run-1")) == 1


def test_run_hands_over_what_it_measures(tmp_path, wandb):
    with small_synthetic():
        done = run(tmp_path / "r1", *LINES, "trainer.max_steps=1", "trainer.log_every=1")
    assert wandb.started[0]["id"] == "r1"
    assert wandb.run.logged[0] == done.rows[0]
    assert wandb.run.summary == done.summary
    prefixes = {name.split("/")[0] for values in wandb.run.logged for name in values}
    assert prefixes <= {name.split("/")[0] for name in NUMBERS} | {"step", "learning_curve"}


# The library itself ------------------------------------------------------------------------------

SCRIPT = """
from pathlib import Path
from tests.runs import config_of
from cola.tracking import build_tracker
folder = Path("run-1")
folder.mkdir()
tracker = build_tracker(folder, config_of("tracking=wandb", "task=synthetic"), last_step=0)
for step in (1, 2):
    tracker.log(step, {"train/loss": 1.0 / step, "train/epoch": 1.0})
    tracker.log(step, {"selection/accuracy": 1.0 / step, "selection/loss": 1.0 * step})
    tracker.log_samples(1, "test", [{"prediction": "a", "reference": "b"}])
tracker.finish({"result": {"value": 0.5}}, {})
tracker.close()
"""

BLOCK = 32768


def records(path: Path):
    """Records of an offline file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        end = at + 7 + int.from_bytes(content[at + 4 : at + 6], "little")
        parts.append(content[at + 7 : end])
        if content[at + 6] in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
        at = end


def items(update):
    return {item.key or "/".join(item.nested_key): item.value_json for item in update}


@pytest.mark.slow
def test_library_writes_offline_files_and_never_prompts(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases failed" not in done.stderr
    (path,) = tmp_path.glob("run-1/wandb/offline-run-*/run-run-1.wandb")
    history, summary = [], {}
    for record in records(path):
        if record.HasField("history"):
            row = items(record.history.item)
            history += [row] if "step" in row else []  # no figures end this run
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    # Samples of step 1 come after numbers of step 2, and are kept all the same.
    assert [row["step"] for row in history] == ["1", "1", "1", "2", "2", "1"], history
    assert json.loads(summary["train/loss"]) == {"min": 0.5, "last": 0.5}
    assert json.loads(summary["selection/accuracy"]) == {"max": 1.0, "last": 0.5}
    assert json.loads(summary["selection/loss"]) == {"min": 1.0, "last": 2.0}
    assert json.loads(summary["train/epoch"]) == 1.0
    assert json.loads(summary["result"]) == {"value": 0.5}
    assert len(read_metrics(tmp_path / "run-1")) == 4
