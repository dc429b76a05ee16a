"""The command line: help, exit codes, run folders, sweeps. Training itself is replaced."""

import logging
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import cola
from cola.cli import train, verify
from cola.cli.app import run_command
from cola.config.groups import choice_families, group_choices
from cola.config.identity import load_config, save_config
from cola.errors import DataError, MergeError, OffloadError, SiteError, TrainingError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(monkeypatch):
    """Replaces training: remembers (config, folder), writes config.yaml, fails where told to."""
    calls = []
    errors = {
        101: DataError("broken.jsonl line 3"),
        102: RuntimeError("boom"),
        103: OffloadError("worker died"),
        104: KeyboardInterrupt(),
        105: SiteError("no site"),
        106: MergeError("not linear"),
        107: TrainingError("loss is nan"),
    }

    def run_experiment(config, run_dir):
        if config.seed in errors:
            raise errors[config.seed]
        calls.append((config, run_dir))
        if not (run_dir / "config.yaml").exists():
            save_config(config, run_dir / "config.yaml")
        return {}

    module = types.ModuleType("cola.experiment")
    module.run_experiment = run_experiment
    monkeypatch.setitem(sys.modules, "cola.experiment", module)
    return calls


def cola_train(*arguments: str) -> int:
    return run_command(train.COMMAND, arguments)


def folders() -> list[str]:
    return sorted(str(path) for path in Path("outputs").glob("*/*"))


@pytest.mark.parametrize("command", [train.COMMAND, verify.COMMAND])
def test_help_lists_groups_keys_and_exit_codes(command, capsys):
    assert run_command(command, ["--help"]) == 0
    text = capsys.readouterr().out
    for group, choices in group_choices().items():
        assert f"\n  {group}\n" in text
        for name, ends in choice_families(choices):
            assert f"\n    {name}{'_*' if ends else ''} " in text
            assert all(end in text for end in ends)
    for word in ("max_steps=null", "interval=1", "lr=null", "hydra.run.dir", "130", "--cfg job"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
    assert ("a gradient differs" in text) == (command is verify.COMMAND)


def test_version(capsys):
    assert cola_train("--version") == 0
    assert capsys.readouterr().out == f"cola-train {cola.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trainer.epochs=0"], ["tsk=1"]])
def test_help_and_config_errors_never_import_torch(arguments):
    # Stands in for the promised times (1.5 s and 2 s), which a busy machine would blur.
    code = (
        "import sys; from cola.cli import train; from cola.cli.app import run_command; "
        f"run_command(train.COMMAND, {arguments!r}); "
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'wandb'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_process_exits_with_the_code_and_one_message():
    code = "import sys; from cola.cli.train import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "merge=merged", "adapter=mlp"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("cola-train: merge=merged with adapter=mlp: ")
    assert done.stderr.count("\n") == 1
    assert folders() == []


def test_unknown_option_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cola_train("--nope")
    assert caught.value.code == 2
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


def test_main_reads_the_process_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cola-train", "tsk=1"])
    assert train.main() == 2
    monkeypatch.setattr(sys, "argv", ["cola-verify", "tsk=1"])
    assert verify.main() == 2
    assert capsys.readouterr().err.count("nearest: task") == 2


def test_cfg_prints_a_configuration_that_loads(capsys):
    assert cola_train("--cfg", "job", "adapter=linear", "seed=4") == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(Path("printed.yaml")).seed == 4
    assert folders() == []


def test_run_gets_its_config_and_folder(runs):
    assert cola_train("task=synthetic", "seed=2") == 0
    (config, run_dir) = runs[0]
    assert (config.seed, config.optimizer.lr, config.resume) == (2, 3e-3, None)
    assert folders() == [str(run_dir)]


@pytest.mark.parametrize(
    ("seed", "code", "message"),
    [
        (101, 2, "cola-train: broken.jsonl line 3"),
        (105, 2, "cola-train: no site"),
        (106, 2, "cola-train: not linear"),
    ],
)
def test_bad_input_exits_2_without_traceback_or_folder(runs, capsys, seed, code, message):
    assert cola_train(f"seed={seed}") == code
    assert capsys.readouterr().err == f"{message}\n"
    assert folders() == []


@pytest.mark.parametrize(
    ("seed", "code", "message"),
    [(102, 1, "boom"), (103, 1, "worker died"), (107, 1, "loss is nan"), (104, 130, "interrupt")],
)
def test_failed_run_is_logged_with_its_traceback(runs, caplog, seed, code, message):
    assert cola_train(f"seed={seed}") == code
    assert message in caplog.text
    assert ("Traceback" in caplog.text) == (code == 1)


def test_used_folder_is_refused(runs, capsys):
    assert cola_train("hydra.run.dir=here") == 0
    assert cola_train("hydra.run.dir=here") == 2
    assert "holds a run already; go on with it by resume=here" in capsys.readouterr().err


def test_resume_runs_in_the_old_folder(runs):
    assert cola_train("seed=3", "trainer.epochs=7") == 0
    old = folders()
    assert cola_train(f"resume={old[0]}") == 0
    assert cola_train("seed=3", "trainer.epochs=7", "resume=auto") == 0
    assert [str(run_dir) for _, run_dir in runs] == [old[0]] * 3
    assert [config.trainer.epochs for config, _ in runs] == [7, 7, 7]
    assert folders() == old


def test_resume_auto_starts_afresh_when_nothing_matches(runs, caplog):
    with caplog.at_level(logging.INFO):
        assert cola_train("resume=auto") == 0
    assert "starting afresh" in caplog.text
    assert runs[0][0].resume is None


def test_dry_run_makes_no_folder(monkeypatch):
    seen = []
    module = types.ModuleType("cola.dry_run")
    module.print_dry_run = seen.append
    monkeypatch.setitem(sys.modules, "cola.dry_run", module)
    assert cola_train("dry_run=true") == 0
    assert run_command(verify.COMMAND, ["dry_run=true"]) == 0
    assert cola_train("-m", "dry_run=true", "seed=1") == 0
    assert [config.seed for config in seen] == [0, 0, 1]
    assert folders() == []


@pytest.mark.parametrize(("verdict", "code"), [(True, 0), (False, 1)])
def test_verify_exits_by_its_verdict(monkeypatch, verdict, code):
    module = types.ModuleType("cola.verify")
    module.verify = lambda config: verdict
    monkeypatch.setitem(sys.modules, "cola.verify", module)
    assert run_command(verify.COMMAND, ["adapter=mlp"]) == code
    assert folders() == []


def test_verify_resumes_nothing(capsys):
    assert run_command(verify.COMMAND, ["resume=auto"]) == 2
    assert "cola-verify resumes no run" in capsys.readouterr().err


def test_sweep_runs_every_combination_in_its_own_folder(runs):
    assert cola_train("-m", "adapter=linear,mlp", "seed=range(1,2)") == 0
    assert [(c.adapter.kind.name, c.seed) for c, _ in runs] == [("linear", 1), ("mlp", 1)]
    assert len(folders()) == 2
    assert not list(Path("outputs").glob("**/multirun.yaml"))


def test_sweep_reports_bad_jobs_and_goes_on(runs, capsys, caplog):
    with caplog.at_level(logging.INFO):
        assert cola_train("-m", "adapter=mlp,lowrnk,linear", "merge=merged") == 2
    assert [config.adapter.kind.name for config, _ in runs] == ["linear"]
    assert len(folders()) == 1
    errors = capsys.readouterr().err
    assert "Proposition 2" in errors
    assert "nearest: lowrank" in errors
    first, second, last = caplog.messages[-3:]
    assert first.startswith("sweep: adapter=mlp merge=merged: failed: merge=merged with adapter")
    assert second.startswith("sweep: adapter=lowrnk merge=merged: failed: adapter=lowrnk: no such")
    assert last == "sweep: jobs: 1 done, 2 failed"


def test_sweep_exits_1_when_a_run_failed(runs, caplog):
    assert cola_train("--multirun", "seed=102,101,0") == 1
    assert len(runs) == 1
    assert "sweep: seed=102: failed: RuntimeError: boom" in caplog.text
    assert "sweep: seed=101: failed: broken.jsonl line 3" in caplog.text


def test_sweep_stops_when_interrupted(runs):
    assert cola_train("-m", "seed=104,0") == 130
    assert runs == []


def test_sweep_without_a_good_job_makes_no_folder():
    assert cola_train("-m", "adapter=mlp", "merge=merged") == 2
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=0,1", "nearest: seed"),
        ("seed=interval(0,1)", "an interval has no jobs of its own"),
        ("hydra/launcher=nowhere", "Could not find 'hydra/launcher/nowhere'; allowed: basic"),
        ("hydra.launcher.jobs=2", "this launcher takes no keys; add hydra/launcher=parallel"),
        ("hydra.sweep.dr=a", "hydra.sweep.dr: no such key; nearest: dir; allowed: "),
        ("hydra.sweeper._target_=other.Sweeper", "only basic is supported"),
    ],
)
def test_sweep_that_cannot_be_read(capsys, override, message):
    assert cola_train("-m", override) == 2
    assert message in capsys.readouterr().err


def test_sweep_job_whose_folder_cannot_be_made_fails(runs, caplog):
    Path("taken").write_text("a file")
    assert cola_train("-m", "seed=0", "hydra.sweep.dir=taken") == 1


@pytest.mark.slow
def test_wheel_finds_its_conf(tmp_path):
    wheels = tmp_path / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels)]
    subprocess.run([*command, str(REPOSITORY)], check=True)
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(installed)
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); "
        "from cola.config.groups import conf_dir; from cola.config.store import compose_config; "
        "compose_config(['task=glue']); print(conf_dir()); "
        "import hydra_plugins.cola_parallel as launcher; print(launcher.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    plugin = installed / "hydra_plugins" / "cola_parallel.py"
    assert done.stdout.splitlines() == [str(installed / "cola" / "conf"), str(plugin)]


@pytest.mark.slow  # a process that imports torch
def test_reader_that_leaves_early_is_no_failure():
    script = "import sys; from cola.cli.train import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "dry_run=true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait() == 0, error
    assert b"Traceback" not in error
