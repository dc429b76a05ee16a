"""A run that was killed and resumed ends with the bits of one that was not (one thread)."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cola.cli import train
from cola.cli.app import run_command
from cola.cli.outcome import DONE, INTERRUPTED
from cola.config.resume import resolve_resume
from cola.config.schema import ExperimentConfig
from cola.experiment import run_experiment
from cola.tracking import FilesTracker, read_metrics, read_samples
from tests.configs import composed
from tests.runs import DROPOUT, Run, run, small_synthetic

# Every step is a checkpoint, so most of them lie inside an interval.
SETTINGS = (
    "task=synthetic", *DROPOUT, "trainer.interval=3", "trainer.log_every=1", "checkpoint.every=1",
    "trainer.batch_size=16", "trainer.eval_every=5",
)  # fmt: skip
SHORT = (*SETTINGS, "trainer.max_steps=8")
MODES = {
    "host": ("offload=cpu", "offload.workers=2"),
    "inline": ("offload=none",),
    "merged": ("offload=cpu", "offload.workers=2", "merge=merged", "adapter=linear"),
    "lora": ("method=lora",),
    "ft": ("method=ft",),
    "sgd": ("optimizer.name=sgd", "adapter=mlp"),
}


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing in the package catches it."""


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic():
        yield


def assert_equal_runs(found: Run, wanted: Run) -> None:
    assert found.losses == wanted.losses
    assert [row["step"] for row in found.rows] == [row["step"] for row in wanted.rows]
    assert timeless(found.summary["result"]) == timeless(wanted.summary["result"])
    assert read_samples(found.folder) == read_samples(wanted.folder)
    if (wanted.folder / "adapters").exists():
        assert found.adapter_bytes == wanted.adapter_bytes


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    log = FilesTracker.log

    def patched(self, at, metrics):
        log(self, at, metrics)
        if at == step and "train/loss" in metrics:
            how()

    monkeypatch.setattr(FilesTracker, "log", patched)


def _kill() -> None:
    raise Killed


def run_until(
    monkeypatch: pytest.MonkeyPatch, step: int, folder: Path, *settings: str, resume: bool = False
) -> None:
    """Runs up to the moment after a step was logged and before its checkpoint."""
    with monkeypatch.context() as patch:
        die_at(patch, step, _kill)
        with pytest.raises(Killed):
            run(folder, *settings, resume=resume)


@pytest.mark.parametrize(
    ("mode", "step"),
    [
        ("host", 5),
        *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (
            ("lora", 4), ("host", 1), ("host", 6), ("inline", 5), ("merged", 4), ("ft", 5),
            ("sgd", 5),
        )),
    ],
)  # fmt: skip
def test_killed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, mode, step):
    settings = (*SHORT, *MODES[mode])
    wanted = run(tmp_path / "whole", *settings)
    run_until(monkeypatch, step, tmp_path / "killed", *settings)
    assert_equal_runs(run(tmp_path / "killed", *settings, resume=True), wanted)


@pytest.mark.slow
def test_run_killed_twice_resumes_with_the_same_bits(tmp_path, monkeypatch):
    settings = (*SHORT, *MODES["host"])
    wanted = run(tmp_path / "whole", *settings)
    for step in (4, 7):
        run_until(monkeypatch, step, tmp_path / "killed", *settings, resume=step == 7)
    assert_equal_runs(run(tmp_path / "killed", *settings, resume=True), wanted)


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_starts_over(tmp_path, monkeypatch):
    settings = (*SHORT, *MODES["host"], "checkpoint.every=6")
    wanted = run(tmp_path / "whole", *settings)
    run_until(monkeypatch, 3, tmp_path / "killed", *settings)
    assert_equal_runs(run(tmp_path / "killed", *settings, resume=True), wanted)


@pytest.mark.parametrize(
    "signal_number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=["SIGINT", "SIGTERM"],
)
def test_interrupted_run_exits_130_and_resumes(tmp_path, monkeypatch, signal_number):
    # No checkpoint is due at the step of the signal: the interruption itself saves one.
    settings = (*SHORT, *MODES["host"], "checkpoint.every=100", "tracking=files", "device=cpu")
    wanted = run(tmp_path / "whole", *settings[:-2])
    folder = tmp_path / "here"
    with monkeypatch.context() as patch:
        die_at(patch, 5, lambda: os.kill(os.getpid(), signal_number))
        code = run_command(train.COMMAND, [*settings, f"hydra.run.dir={folder}"])
    assert code == INTERRUPTED
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert run_command(train.COMMAND, [f"resume={folder}"]) == DONE
    assert read_losses(folder) == wanted.losses
    assert adapter_bytes(folder) == wanted.adapter_bytes


def test_run_killed_while_reporting_resumes_with_the_same_result(tmp_path, monkeypatch):
    settings = (*SHORT, *MODES["host"])
    wanted = run(tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        patch.setattr("cola.run_report.build_summary", lambda *_, **__: _kill())
        with pytest.raises(Killed):
            run(tmp_path / "killed", *settings)
    assert_equal_runs(run(tmp_path / "killed", *settings, resume=True), wanted)


def test_second_signal_stops_at_once(tmp_path, monkeypatch):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    die_at(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *SHORT, *MODES["host"])
    assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()


def test_signal_in_the_last_step_finishes_the_run(tmp_path, monkeypatch):
    die_at(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
    done = run(tmp_path / "run", *SHORT, *MODES["host"])
    assert (done.folder / "adapters").exists()


# Whole processes ---------------------------------------------------------------------------------

LONG = (*SETTINGS, "trainer.max_steps=40", *MODES["host"], "tracking=files", "device=cpu")


def start(*overrides: str) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from tests.runs import small_synthetic; from cola.cli.train import main\n"
        "with small_synthetic(): sys.exit(main())"
    )
    return subprocess.Popen([sys.executable, "-c", code, *overrides], stderr=subprocess.DEVNULL)


def wait_for(folder: Path, step: int, is_alive: Callable[[], bool]) -> None:
    """Returns as soon as the step is logged."""
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(folder)):
        assert is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.002)


def stop_at(process: subprocess.Popen[bytes], folder: Path, step: int, number: int) -> int:
    """Sends a signal as soon as the step is logged; returns the exit code."""
    wait_for(folder, step, lambda: process.poll() is None)
    process.send_signal(number)
    return process.wait(timeout=60)


def read_losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder) if "train/loss" in row]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapters" / "adapters.safetensors").read_bytes()


def resumed_config(folder: Path, *overrides: str) -> tuple[ExperimentConfig, Path]:
    composed_run = composed(*overrides)
    return resolve_resume(composed_run.config, composed_run.given, folder)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="autograd's GPU threads do not survive a fork; see slow tests",
)
def test_run_killed_by_sigkill_resumes_with_the_same_bits(tmp_path):
    folder, settings = tmp_path / "killed", (*LONG, "trainer.max_steps=20")
    # A fork has everything imported already, which takes a process of its own ten seconds.
    child = multiprocessing.get_context("fork").Process(target=run, args=(folder, *settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12: tqdm's thread does not follow the fork
        child.start()
    try:
        wait_for(folder, 5, child.is_alive)
    finally:
        child.kill()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    wanted = run(tmp_path / "whole", *settings)
    config, found_folder = resumed_config(folder, *settings, "resume=auto")
    assert found_folder == folder
    assert_equal_runs(Run(folder=folder, summary=run_experiment(config, folder)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "PATH"])
@pytest.mark.parametrize("step", [2, 11, 22])
def test_processes_killed_by_sigkill_resume_with_the_same_bits(tmp_path, how, step):
    folder = tmp_path / "killed"
    settings = (*LONG, f"hydra.run.dir={folder}")
    stop_at(start(*settings), folder, step, signal.SIGKILL)
    assert not (folder / "summary.json").exists()
    again = [f"resume={folder}"] if how == "PATH" else [*settings, "resume=auto"]
    assert start(*again).wait(timeout=120) == DONE
    wanted = run(tmp_path / "whole", *LONG[:-2])
    assert read_losses(folder) == wanted.losses
    assert adapter_bytes(folder) == wanted.adapter_bytes


@pytest.mark.slow
def test_process_interrupted_by_sigint_exits_130_and_resumes(tmp_path):
    folder = tmp_path / "interrupted"
    process = start(*LONG, "checkpoint.every=100", f"hydra.run.dir={folder}")
    assert stop_at(process, folder, 12, signal.SIGINT) == INTERRUPTED
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1
    assert start(f"resume={folder}").wait(timeout=120) == DONE
    wanted = run(tmp_path / "whole", *LONG[:-2])
    assert read_losses(folder) == wanted.losses
    assert adapter_bytes(folder) == wanted.adapter_bytes
