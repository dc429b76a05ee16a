"""`hydra/launcher=parallel`: one queue, processes that may die, logs, Ctrl-C, killed sweeps."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola.cli import train
from cola.cli.app import run_command
from cola.config.identity import config_hash, load_config, save_config
from cola.config.schema import ExperimentConfig
from cola.config.store import compose_config
from cola.tracking import read_metrics
from hydra_plugins.cola_parallel import new_log_folder

PARALLEL = ("-m", "hydra/launcher=parallel", "hydra.launcher.devices=cpu", "hydra.launcher.jobs=2")
NEVER = 60.0


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def execute(config: ExperimentConfig, run_dir: Path) -> bool:
    """In the place of training, by seed: ends, fails, dies, or takes long."""
    save_config(config, run_dir / "config.yaml")
    (run_dir / "process").write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']!r}")
    os.write(2, b"from below Python\n")
    if config.seed == 101:
        raise RuntimeError("boom")
    if config.seed == 102:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        time.sleep(NEVER if config.seed == 103 else 0.2)
    except KeyboardInterrupt:
        (run_dir / "saved").write_text("")
        raise
    (run_dir / "summary.json").write_text("{}")
    return True


def sweep(*overrides: str) -> int:
    return run_command(dataclasses.replace(train.COMMAND, execute=execute), [*PARALLEL, *overrides])


def runs() -> list[Path]:
    return sorted(Path("outputs/digits").glob("2*"))


@pytest.mark.slow
def test_jobs_share_processes_and_one_that_dies_takes_no_other_along(caplog):
    with caplog.at_level("INFO"):
        assert sweep("seed=0,102,101,1,2", "resume=once") == 1
    assert len(list(Path().glob("outputs/digits/*/summary.json"))) == 3
    assert {run.joinpath("process").read_text().split()[1] for run in runs()} == {"''"}
    # Five jobs: two processes, and one in the place of that which died.
    assert len({run.joinpath("process").read_text() for run in runs()}) == 3
    logs = next(Path("outputs/sweeps").iterdir())
    assert caplog.messages[-3:] == [
        "sweep: seed=102 resume=once: failed: its process died (SIGKILL(-9), out of memory?) "
        f"({logs}/2.log)",
        f"sweep: seed=101 resume=once: failed: RuntimeError: boom ({logs}/3.log)",
        "sweep: jobs: 3 done, 2 failed",
    ]
    assert "sweep: job 5 of 5 on cpu: seed=2 resume=once" in caplog.messages
    written = logs.joinpath("3.log").read_text()
    assert "from below Python\n" in written
    assert "Traceback" in written
    # Where a job ran is not part of what it is.
    stored = {config_hash(load_config(run / "config.yaml")) for run in runs()}
    assert config_hash(compose_config(["seed=0"])) in stored
    caplog.clear()
    with caplog.at_level("INFO"):
        assert sweep("seed=0,1,2", "resume=once") == 0
    assert caplog.messages[-1] == "sweep: jobs: 3 skipped"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_sweep_lets_every_job_save_its_state(caplog, number, request):
    if number == signal.SIGTERM:  # in the background of a script, where processes ignore SIGINT
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))

    def interrupt() -> None:
        while len(list(Path().glob("outputs/digits/*/process"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with caplog.at_level("INFO"):
        assert sweep("seed=103", "adapter=lowrank,linear,mlp") == 130
    assert [run.joinpath("saved").exists() for run in runs()] == [True, True]
    assert "sweep: interrupted: 2 interrupted, 1 not begun" in caplog.messages


def test_mistyped_key_of_the_launcher_is_named(capsys):
    assert sweep("hydra.launcher.job_per_device=2") == 2
    message = "hydra.launcher.job_per_device: no such key; nearest: jobs_per_device; allowed: jobs,"
    assert message in capsys.readouterr().err


# Whole processes ---------------------------------------------------------------------------------

SETTINGS = (
    "task=digits", "tracking=files", "trainer.max_steps=2000,8000", "trainer.eval_every=2000",
    "trainer.log_every=10", "checkpoint.every=50", "seed=0,1", "resume=once",
)  # fmt: skip
CODE = "import sys; from cola.cli.train import main; sys.exit(main())"


def start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CODE, *PARALLEL, *SETTINGS]
    # Its own group: a signal for it must not reach the tests.
    with Path("log").open("ab") as log:
        return subprocess.Popen(command, stderr=log, start_new_session=True)


def wait_until(ready: Iterator[bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not next(ready):
        assert process.poll() is None, Path("log").read_text()
        assert time.monotonic() < deadline, Path("log").read_text()
        time.sleep(0.05)


def finished() -> dict[Path, bytes]:
    files = Path().glob("outputs/digits/*/summary.json")
    return {path: path.read_bytes() for path in files}


def in_the_middle() -> Iterator[bool]:
    """Whether the short runs have ended, and the long ones have begun and left a checkpoint."""
    while True:
        open_runs = [run for run in runs() if not run.joinpath("summary.json").exists()]
        saved = [list(run.glob("checkpoints/step-*")) for run in open_runs]
        yield len(finished()) >= 2 and len(saved) == 2 and all(saved)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_sweep_that_was_stopped_repeats_no_run_and_loses_none(number):
    process = start()
    wait_until(in_the_middle(), process)
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(timeout=60) == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    before, folders = finished(), runs()
    assert 2 <= len(before) < 4
    assert start().wait(timeout=240) == 0, Path("log").read_text()
    assert runs() == folders  # four: none was begun anew
    assert len(finished()) == len(folders) == 4
    assert before.items() <= finished().items()
    logs = "".join(path.read_text() for path in Path("outputs/sweeps").glob("*/*.log"))
    assert logs.count("resumed at step") == 4 - len(before)
    steps = [[row["step"] for row in read_metrics(run) if "train/loss" in row] for run in folders]
    short, long = (list(range(10, end + 1, 10)) for end in (2000, 8000))
    assert sorted(steps, key=len) == [short, short, long, long]


def test_sweeps_that_begin_in_one_second_have_logs_of_their_own(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    folders = [new_log_folder(Path("outputs/sweeps")) for _ in range(3)]
    names = ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]
    assert [folder.name for folder in folders] == names
    assert all(folder.is_dir() for folder in folders)
