"""Whole runs with users: leaving and coming back by folder, resuming, and what is refused."""

import logging

import pytest
import torch

from cola.checkpoint import load_state
from cola.errors import ConfigError, DataError
from cola.experiment import run_experiment
from tests.runs import config_of, run, small_synthetic

USERS = ("classification", "open_qa", "closed_qa")
ALONE = (
    "task=synthetic", "model=tiny-gpt2", "users=alone", f"users.names=[{','.join(USERS)}]",
    "users.others=drop", "trainer.batch_size=8", "trainer.max_steps=6", "trainer.eval_every=6",
    "trainer.log_every=1", "evaluation.num_samples=1", "generation.max_new_tokens=3",
    "users.loss=per_user", "task.padding=max_length", "task.max_length=40",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small():
    with small_synthetic(40):
        yield


def test_user_leaves_with_a_folder_from_which_it_joins_another_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = run(tmp_path / "first", *ALONE, "users.schedule=[{user: open_qa, leave: 4}]")
    folder = first.folder / "users" / "open_qa"
    assert "step 4: user open_qa leaves" in caplog.text
    assert set(load_state(folder)) == {"user", "sites"}
    assert set(first.summary["result"]["by_user"]) == {"classification", "closed_qa"}
    again = run(
        tmp_path / "again", *ALONE, "trainer.max_steps=2", "trainer.eval_every=2",
        f"users.schedule=[{{user: open_qa, join: 2, leave: 3, init: '{folder}'}}]",
    )  # fmt: skip
    assert "step 2: user open_qa joins" in caplog.text
    assert set(again.summary["result"]["by_user"]) == set(USERS)


def test_a_visitors_folder_that_does_not_fit_is_refused(tmp_path):
    first = run(tmp_path / "first", *ALONE, "users.schedule=[{user: open_qa, leave: 4}]")
    folder = first.folder / "users" / "open_qa"
    given = f"users.schedule=[{{user: open_qa, join: 2, init: '{folder}'}}]"
    with pytest.raises(ConfigError, match=r"user open_qa, init=.*: site .* needs .*\[4, 64\]"):
        run(tmp_path / "other", *ALONE, "adapter.rank=4", given)
    empty = f"users.schedule=[{{user: open_qa, join: 2, init: '{tmp_path}'}}]"
    with pytest.raises(ConfigError, match=r"no state of a user .* users/NAME of a run"):
        run(tmp_path / "none", *ALONE, empty)


@pytest.mark.parametrize("mode", ["alone", pytest.param("collaboration", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, mode):
    lines = (*ALONE, f"users={mode}", "checkpoint.every=1", "checkpoint.keep=9",
             "users.schedule=[{user: open_qa, join: 2, leave: 5}]",
             "trainer.interval=2")  # fmt: skip
    if mode == "collaboration":
        lines = (*lines, "merge=merged", "users.kinds=lowrank-linear")
    whole = run(tmp_path / "whole", *lines)
    half = run(tmp_path / "half", *lines)
    for step in (4, 5, 6):  # as if killed after step 3, inside an interval
        for file in (half.folder / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (half.folder / "checkpoints" / f"step-{step:08d}").rmdir()
    again = run(tmp_path / "half", *lines, resume=True)
    for user in USERS:
        own = f"adapters/{user}/adapters.safetensors"
        assert (again.folder / own).read_bytes() == (whole.folder / own).read_bytes()
    assert again.losses == whole.losses


def test_rank_of_a_user_above_a_site_names_both(tmp_path):
    config = config_of(*ALONE, "users.adapters=[{user: open_qa, rank: 65}]")
    with pytest.raises(ConfigError, match=r"rank of user 'open_qa' .*=65 is above .*c_attn \(64\)"):
        run_experiment(config, tmp_path)


def test_rows_of_unknown_users_are_named(tmp_path):
    config = config_of(*ALONE, "users.others=refuse")
    with pytest.raises(DataError, match=r"users.others=drop"):
        run_experiment(config, tmp_path)


def test_users_of_images_are_shards(tmp_path):
    found = run(tmp_path / "run", "task=digits", "model=cnn", "users=alone", "users.num=3",
                "task.max_train_rows=60", "trainer.batch_size=20", "trainer.max_steps=2",
                "trainer.eval_every=2", "users.kinds=[lowrank, linear, mlp]")  # fmt: skip
    assert set(found.summary["result"]["by_user"]) == {"user1", "user2", "user3"}
    assert torch.isfinite(torch.tensor(found.losses)).all()
