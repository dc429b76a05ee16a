"""Where numbers go: files that survive a kill, and W&B that never prompts nor stops a run."""

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cola.config.choices import TrackingName
from cola.config.schema import TrackingConfig
from cola.tracking import FilesTracker, build_tracker, read_metrics, read_samples
from tests.runs import config_of, run, small_synthetic

WANDB = TrackingConfig(name=TrackingName.wandb, tags=["a"])
RUN = {"id": "run-1", "group": "digits", "config": {"seed": 0}}


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No key and no mode anywhere."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return monkeypatch


class WandbError(Exception):
    """Base class of the library's own errors."""


class FakeRun:
    def __init__(self) -> None:
        self.logged, self.summary, self.is_finished = [], {}, False
        self.error: Exception | None = None

    def log(self, metrics, step=None):
        if self.error is not None:
            raise self.error
        self.logged.append((step, metrics))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch, clean):
    """Stands in for the library; remembers how it was started."""
    module = types.ModuleType("wandb")
    module.started, module.run, module.error = [], FakeRun(), None

    def init(**settings):
        if module.error is not None:
            raise module.error
        module.started.append(settings)
        return module.run

    module.init = init
    module.Error = WandbError
    module.Settings = dict
    module.Image = lambda path: f"image of {path}"
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


# Files -------------------------------------------------------------------------------------------


def log(folder: Path, *steps: int, last_step: int = 0) -> None:
    tracker = FilesTracker(folder, last_step=last_step)
    for step in steps:
        tracker.log(step, {"train/loss": step / 2})
    tracker.close()


def test_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = FilesTracker(tmp_path, last_step=0)
    tracker.log(1, {"train/loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]
    tracker.close()


def test_lines_are_cut_back_to_the_checkpoint_on_resume(tmp_path):
    log(tmp_path, 1, 2, 3, 4)
    log(tmp_path, 3, last_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_fresh_run_starts_without_lines(tmp_path):
    log(tmp_path, 1, 2)
    log(tmp_path, last_step=0)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 3, "tra', '{"step"', "\x00\x00"])
def test_torn_last_line_is_left_out(tmp_path, torn):
    log(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    log(tmp_path, 3, last_step=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


SAMPLE = {"input": "a", "prediction": "b", "reference": "c"}


def log_samples(folder: Path, *steps: int, last_step: int = 0, split: str = "test") -> None:
    tracker = FilesTracker(folder, last_step=last_step)
    for step in steps:
        tracker.log_samples(step, split, [SAMPLE, SAMPLE])
    tracker.close()


def test_samples_name_their_step_and_split(tmp_path):
    log_samples(tmp_path, 3)
    assert read_samples(tmp_path) == [{"step": 3, "split": "test", **SAMPLE}] * 2


def test_samples_are_cut_back_to_the_checkpoint_on_resume(tmp_path):
    log_samples(tmp_path, 1, 2, 3)
    log_samples(tmp_path, 3, last_step=2)
    assert [row["step"] for row in read_samples(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_samples_of_a_step_and_split_are_written_once(tmp_path):
    log_samples(tmp_path, 1, 2)
    log_samples(tmp_path, 2, last_step=2)  # killed while it reported, and resumed
    log_samples(tmp_path, 2, last_step=2, split="validation")
    found = [(row["step"], row["split"]) for row in read_samples(tmp_path)]
    assert found == [(1, "test")] * 2 + [(2, "test")] * 2 + [(2, "validation")] * 2


def test_missing_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_files_alone_never_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    tracker = build_tracker(tmp_path, config_of().tracking, run=RUN, last_step=0)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({}, {})
    tracker.close()
    assert len(read_metrics(tmp_path)) == 1


# Weights & Biases --------------------------------------------------------------------------------


def start(tmp_path: Path):
    return build_tracker(tmp_path, WANDB, run=RUN, last_step=0)


def test_wandb_is_offline_without_a_key(tmp_path, wandb):
    start(tmp_path).close()
    (settings,) = wandb.started
    assert (settings["mode"], settings["resume"]) == ("offline", None)
    assert (settings["dir"], settings["id"], settings["group"]) == (tmp_path, "run-1", "digits")
    assert (settings["project"], settings["tags"]) == ("cola", ["a"])


def test_wandb_is_online_with_a_key(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    start(tmp_path).close()
    assert (wandb.started[0]["mode"], wandb.started[0]["resume"]) == ("online", "allow")


def test_wandb_is_online_with_a_key_of_an_earlier_login(tmp_path, wandb):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (home / ".netrc").chmod(0o600)
    start(tmp_path).close()
    assert wandb.started[0]["mode"] == "online"


def test_wandb_mode_wins_over_the_key(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(tmp_path).close()
    assert wandb.started[0]["mode"] == "disabled"


def test_wandb_gets_samples_as_a_table(tmp_path, wandb):
    tracker = start(tmp_path)
    tracker.log_samples(3, "test", [SAMPLE])
    tracker.log_samples(3, "empty", [])
    tracker.close()
    columns, rows = ["step", "input", "prediction", "reference"], [[3, "a", "b", "c"]]
    assert wandb.run.logged == [(None, {"samples/test": (columns, rows)})]


def test_wandb_gets_lines_summary_and_figures(tmp_path, wandb):
    tracker = start(tmp_path)
    tracker.log(3, {"train/loss": 1.0})
    tracker.finish({"steps": 3}, {"curve": tmp_path / "curve.png"})
    tracker.close()
    assert wandb.run.logged[0] == (3, {"train/loss": 1.0})
    assert wandb.run.logged[1][1] == {"curve": f"image of {tmp_path / 'curve.png'}"}
    assert wandb.run.summary == {"steps": 3}
    assert wandb.run.is_finished


@pytest.mark.parametrize("error", [WandbError("no service"), OSError("no service")], ids=repr)
def test_wandb_that_cannot_start_leaves_the_files(tmp_path, wandb, caplog, error):
    wandb.error = error
    with caplog.at_level(logging.WARNING):
        tracker = start(tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert "Weights & Biases failed (no service); the run goes on with metrics.jsonl" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("error", [WandbError("died"), BrokenPipeError("died")], ids=repr)
def test_wandb_that_fails_later_never_stops_a_run(tmp_path, wandb, error):
    tracker = start(tmp_path)
    wandb.run.error = error
    tracker.log(1, {"train/loss": 1.0})
    tracker.log_samples(1, "test", [SAMPLE])
    tracker.finish({}, {})
    tracker.close()
    assert len(read_metrics(tmp_path)) == 1


def test_run_hands_its_configuration_to_wandb(tmp_path, wandb):
    with small_synthetic():
        done = run(tmp_path / "family" / "r1", "task=synthetic", "tracking=wandb",
                   "trainer.max_steps=1")  # fmt: skip
    (settings,) = wandb.started
    assert (settings["id"], settings["group"]) == ("r1", "family")
    assert settings["config"]["trainer"]["max_steps"] == 1
    json.dumps(settings["config"])
    assert wandb.run.summary == done.summary


@pytest.mark.slow
def test_real_wandb_writes_offline_files_and_never_prompts(tmp_path):
    code = (
        "from pathlib import Path; from tests.test_tracking import RUN, WANDB\n"
        "from cola.tracking import build_tracker\n"
        "tracker = build_tracker(Path('.'), WANDB, run=RUN, last_step=0)\n"
        "tracker.log(1, {'train/loss': 1.0}); tracker.finish({'steps': 1}, {}); tracker.close()"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases is off" not in done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/run-run-1.wandb"))
    assert len(read_metrics(tmp_path)) == 1
