"""Stored configurations, their hash, and the run that `resume` means."""

import dataclasses
from pathlib import Path

import pytest

from cola.config.choices import AdapterKind, TrackingName
from cola.config.identity import config_hash, load_config, save_config
from cola.config.resume import resolve_resume
from cola.config.store import compose_config
from cola.errors import ConfigError
from tests.configs import changed, composed


def test_config_survives_the_file(tmp_path):
    config = compose_config(
        ["task=glue", "adapter=mlp", "optimizer.lr=5e-6", "optimizer.clip=global"]
    )
    config = dataclasses.replace(config, data_dir="x y")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", [None, "task: [", "task: {nme: x}\n", "- 1\n", "seed: x\n"])
def test_unreadable_stored_config_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: not a readable configuration"):
        load_config(path)


def test_hash_ignores_what_does_not_change_the_numbers():
    base = config_hash(changed())
    same = ["tracking.name=files", "trainer.log_every=3", "checkpoint.keep=7", "dry_run=true"]
    same += ["resume=auto", "experiment_name=other", "optimizer.lr=0.03"]  # the default, by hand
    assert {config_hash(changed(override)) for override in same} == {base}


def test_hash_sees_what_kind_of_device_and_not_which():
    first, second, cpu = (config_hash(changed(f"device={d}")) for d in ("cuda:0", "cuda:3", "cpu"))
    assert first == second != cpu
    fits = [config_hash(changed(f"offload.device=[cuda:{i}]")) for i in (1, 2)]
    assert fits[0] == fits[1] != config_hash(changed())


@pytest.mark.parametrize(
    "override", ["seed=1", "adapter.rank=4", "optimizer.lr=0.1", "model.architecture.hidden=[8]"]
)
def test_hash_sees_what_changes_the_numbers(override):
    assert config_hash(changed(override)) != config_hash(changed())


def test_hash_is_the_same_before_and_after_defaults():
    config = changed()
    bare = dataclasses.replace(config.optimizer, lr=None, clip=None)
    assert config_hash(dataclasses.replace(config, optimizer=bare)) == config_hash(config)


def stored_run(folder: Path, overrides: list[str], *, finished: bool = False) -> Path:
    folder.mkdir(parents=True)
    save_config(composed(*overrides).config, folder / "config.yaml")
    if finished:
        (folder / "summary.json").write_text("{}")
    return folder


def resumed(overrides: list[str], run_dir: Path):
    run = composed(*overrides)
    return resolve_resume(run.config, run.given, run_dir)


def test_resume_goes_on_with_the_stored_configuration(tmp_path):
    folder = stored_run(tmp_path / "a", ["adapter=linear", "seed=5", "optimizer.lr=0.2"])
    config, run_dir = resumed([f"resume={folder}"], tmp_path / "new")
    assert run_dir == folder
    assert (config.adapter.kind, config.seed, config.optimizer.lr) == (AdapterKind.linear, 5, 0.2)
    assert config.resume == str(folder)


def test_resume_takes_agreeing_overrides_and_those_without_effect_on_numbers(tmp_path):
    folder = stored_run(tmp_path / "a", ["adapter=linear", "adapter.alpha=2", "seed=5"])
    overrides = ["adapter=linear", "seed=5", "tracking=files", "trainer.log_every=1"]
    config, _ = resumed([f"resume={folder}", *overrides], tmp_path / "new")
    assert config.adapter.alpha == 2.0
    assert (config.tracking.name, config.trainer.log_every) == (TrackingName.files, 1)


def test_resume_takes_another_gpu_and_no_other_kind_of_device(tmp_path):
    folder = stored_run(tmp_path / "a", ["device=cuda:0"])
    config, _ = resumed([f"resume={folder}", "device=cuda:1"], tmp_path / "new")
    assert config.device == "cuda:1"
    with pytest.raises(ConfigError, match=r"device \(cuda:0 there, cpu given\)"):
        resumed([f"resume={folder}", "device=cpu"], tmp_path / "new")


def test_resume_lists_every_differing_setting(tmp_path):
    folder = stored_run(tmp_path / "a", ["adapter=linear"])
    with pytest.raises(
        ConfigError,
        match=r"adapter.kind \(linear there, mlp given\), seed \(0 there, 3 given\); leave them",
    ):
        resumed([f"resume={folder}", "adapter=mlp", "seed=3"], tmp_path / "new")


def test_resume_of_no_run_or_a_finished_one(tmp_path):
    with pytest.raises(ConfigError, match="is no folder; give the folder of a run"):
        resumed([f"resume={tmp_path / 'none'}"], tmp_path / "new")
    with pytest.raises(ConfigError, match=r"has no config.yaml; give the folder of a run"):
        resumed([f"resume={tmp_path}"], tmp_path / "new")
    folder = stored_run(tmp_path / "a", [], finished=True)
    with pytest.raises(ConfigError, match="that run is finished"):
        resumed([f"resume={folder}"], tmp_path / "new")


def test_resume_auto_takes_the_newest_unfinished_equal_run(tmp_path):
    stored_run(tmp_path / "1", [])
    wanted = stored_run(tmp_path / "2", ["tracking=files"])
    stored_run(tmp_path / "3", ["seed=1"])
    stored_run(tmp_path / "4", [], finished=True)
    (tmp_path / "5").mkdir()
    config, run_dir = resumed(["resume=auto"], tmp_path / "new")
    assert (run_dir, config.resume) == (wanted, str(wanted))


def test_resume_auto_without_a_match_starts_afresh(tmp_path, caplog):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.yaml").write_text("broken: [")
    with caplog.at_level("INFO"):
        config, run_dir = resumed(["resume=auto"], tmp_path / "new")
    assert (run_dir, config.resume) == (tmp_path / "new", None)
    assert "starting afresh" in caplog.text
    assert "skipped" in caplog.text


def test_resume_auto_finds_a_fixed_folder(tmp_path):
    folder = stored_run(tmp_path / "fixed", [])
    assert resumed(["resume=auto"], folder)[1] == folder
