"""`resume=once`: what is finished is left alone, what is not goes on, in one process at a time."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cola.cli import train
from cola.cli.app import execute_run, run_command
from cola.config import claim
from cola.config.claim import claim_run
from cola.config.identity import save_config
from cola.errors import ConfigError
from tests.configs import composed


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch):
    """Replaces training: remembers (folder, resumes) and leaves a finished run."""
    calls = []

    def execute(config, run_dir):
        calls.append((run_dir, config.resume is not None))
        save_config(config, run_dir / "config.yaml")
        (run_dir / "summary.json").write_text("{}")
        return True

    object.__setattr__(train.COMMAND, "execute", execute)
    yield calls
    object.__setattr__(train.COMMAND, "execute", train.execute)


def start(*overrides: str):
    run = composed(*overrides)
    return execute_run(train.COMMAND, run.config, run.given, run.run_dir)


def stored(name: str, *overrides: str, finished: bool) -> Path:
    folder = Path("outputs/digits", name)
    folder.mkdir(parents=True)
    save_config(composed(*overrides).config, folder / "config.yaml")
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def test_finished_run_is_skipped_with_one_line(trained, caplog):
    folder = stored("a", "seed=3", finished=True)
    stored("b", "seed=3", finished=False)  # newer, and not needed any more
    with caplog.at_level("INFO"):
        outcome = start("seed=3", "tracking=files", "resume=once")
    assert (trained, outcome.word, outcome.folder, outcome.exit_code) == ([], "skipped", folder, 0)
    assert caplog.messages == [f"resume=once: skipped: finished already ({folder})"]


def test_unfinished_run_goes_on_and_is_skipped_the_next_time(trained):
    folder = stored("a", finished=False)
    stored("b", "seed=1", finished=True)
    assert start("resume=once").word == "done"
    assert start("resume=once").word == "skipped"
    assert trained == [(folder, True)]


def test_run_that_is_not_there_starts(trained):
    stored("a", "seed=1", finished=True)
    outcome = start("resume=once")
    assert trained == [(outcome.folder, False)]


def test_unreadable_run_is_no_reason_not_to_start(trained, caplog):
    stored("a", finished=True).joinpath("config.yaml").write_text("task: [")
    assert start("resume=once").word == "done"
    assert "resume: skipped outputs/digits/a" in caplog.text


def test_finished_run_in_a_fixed_folder_is_skipped(trained):
    assert start("hydra.run.dir=mine/here", "resume=once").word == "done"
    assert start("hydra.run.dir=mine/here", "resume=once").word == "skipped"


def test_command_exits_0_when_there_is_nothing_to_do(trained):
    stored("a", finished=True)
    assert run_command(train.COMMAND, ["resume=once"]) == 0
    assert run_command(train.COMMAND, ["-m", "resume=once", "seed=0,1"]) == 0
    assert len(trained) == 1


def test_mistyped_mode_is_named(trained, capsys):
    assert run_command(train.COMMAND, ["resume=onse"]) == 2
    message = "resume=onse: is no folder; give the folder of a run (outputs/NAME/RUN_ID), auto or"
    assert message in capsys.readouterr().err


# One process at a time ---------------------------------------------------------------------------

HOLD = (
    "import sys; from pathlib import Path; from cola.config.store import compose_run\n"
    "from cola.config.claim import claim_run\n"
    "run = compose_run(['seed=5'])\n"
    "with claim_run(run.config, run.run_dir) as held: print(held, flush=True); sys.stdin.read()"
)


@pytest.fixture
def other():
    """A process that is at the run of seed 5."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_run_of_another_process_is_left_to_it(trained, monkeypatch, other):
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.0)
    folder = stored("a", "seed=5", finished=False)
    assert start("seed=5", "resume=once").reason.startswith("another process is at this run")
    for how in ("auto", str(folder)):
        with pytest.raises(ConfigError, match=f"resume={how}: another process is at this run"):
            start("seed=5", f"resume={how}")
    assert start("seed=6", "resume=once").word == "done"
    assert start("seed=5").word == "done"  # a run of its own, in a folder of its own
    other.kill()
    other.wait()
    assert start("seed=5", "resume=once").word == "skipped"  # what ran just now


def test_once_waits_for_a_process_that_is_about_to_end(trained, other):
    folder = stored("a", "seed=5", finished=False)
    killer = threading.Timer(0.3, other.kill)
    killer.start()
    assert start("seed=5", "resume=once").folder == folder
    killer.join()
    assert trained == [(folder, True)]


def test_claim_leaves_no_file_and_holds_again(tmp_path):
    run = composed("seed=5")
    for _ in range(2):
        with claim_run(run.config, tmp_path / "family" / "run") as is_ours:
            assert is_ours
            with claim_run(run.config, tmp_path / "family" / "other") as is_ours_too:
                assert not is_ours_too
    assert list((tmp_path / "family").iterdir()) == []
