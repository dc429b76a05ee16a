"""Saved states: what goes in comes out, and a kill at any moment leaves whole checkpoints."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cola import checkpoint
from cola.checkpoint import (
    Checkpoints,
    keep_new_parameters,
    load_state,
    peek_state,
    save_state,
)
from cola.errors import DataError

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


class Killed(BaseException):
    """Ends a run where a signal would."""


def roundtrip(folder: Path, value: object) -> object:
    save_state(folder / "state", {"value": value})
    return load_state(folder / "state")["value"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_comes_back_with_its_bits(tmp_path, dtype):
    tensor = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    loaded = roundtrip(tmp_path, tensor)
    assert loaded.dtype is dtype
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
def test_scalar_and_empty_tensors_come_back(tmp_path, shape):
    assert roundtrip(tmp_path, torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(
    "value", [0, -(2**70), 0.1, 1e-300, math.inf, -math.inf, True, None, "text ä", [], {}],
    ids=repr,
)  # fmt: skip
def test_plain_value_comes_back(tmp_path, value):
    loaded = roundtrip(tmp_path, value)
    assert loaded == value
    assert type(loaded) is type(value)


def test_nan_comes_back(tmp_path):
    assert math.isnan(roundtrip(tmp_path, math.nan))


def test_nested_state_comes_back(tmp_path):
    state = {
        "deep": {"a.b/c": [torch.ones(2), {"x": None}, [1, torch.zeros(1)]]},
        "progression": {"best_value": -math.inf, "windows": [{"time/base_seconds": 0.5}]},
    }
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert torch.equal(loaded["deep"]["a.b/c"][0], torch.ones(2))
    assert torch.equal(loaded["deep"]["a.b/c"][2][1], torch.zeros(1))
    assert loaded["deep"]["a.b/c"][1] == {"x": None}
    assert loaded["progression"] == state["progression"]


def test_keys_become_text_and_tuples_lists(tmp_path):
    assert roundtrip(tmp_path, {0: (1, 2)}) == {"0": [1, 2]}


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    whole = torch.arange(6.0)
    loaded = roundtrip(tmp_path, {"tied": [whole, whole], "view": whole[2:4]})
    assert torch.equal(loaded["tied"][1], whole)
    assert torch.equal(loaded["view"], whole[2:4])
    loaded["tied"][0].zero_()
    assert torch.equal(loaded["tied"][1], whole)


def test_strided_and_attached_tensors_come_back(tmp_path):
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    loaded = roundtrip(tmp_path, {"parameter": parameter, "turned": parameter.T})
    assert torch.equal(loaded["turned"], parameter.detach().T)
    assert not loaded["parameter"].requires_grad


def test_state_without_tensors_comes_back(tmp_path):
    assert roundtrip(tmp_path, {"a": 1}) == {"a": 1}


def test_saving_again_replaces_the_state(tmp_path):
    save_state(tmp_path / "state", {"old": torch.ones(3)})
    save_state(tmp_path / "state", {"new": 1})
    assert load_state(tmp_path / "state") == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_state_is_a_copy(tmp_path):
    tensor = torch.ones(2)
    save_state(tmp_path / "state", {"tensor": tensor})
    tensor.zero_()
    assert torch.equal(load_state(tmp_path / "state")["tensor"], torch.ones(2))


@pytest.mark.parametrize("call", ["save_file", "_flush"])
def test_kill_while_writing_leaves_the_older_state(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"step": 1})

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"cola.checkpoint.{call}", die)
        with pytest.raises(Killed):
            checkpoints.save(2, {"step": 2})
    assert checkpoints.load_newest() == {"step": 1}
    checkpoints.save(2, {"step": 2})
    assert checkpoints.load_newest() == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_kill_between_the_two_files_leaves_the_older_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"step": 1})
    draft = tmp_path / ".step-00000002.partial"
    draft.mkdir()
    (draft / "tensors.safetensors").write_bytes(b"half")
    assert checkpoints.load_newest() == {"step": 1}
    checkpoints.save(2, {"step": 2})
    assert not draft.exists()


def test_kill_while_replacing_keeps_one_of_the_two(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_best({"step": 1})
    rename = Path.rename

    def die_at_the_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_at_the_second)
        with pytest.raises(Killed):
            checkpoints.save_best({"step": 2})
    assert checkpoints.load_best()["step"] in (1, 2)


def test_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10, 100):
        checkpoints.save(step, {"step": step})
    checkpoints.save_best({"step": 9})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "step-00000010", "step-00000100",
    ]  # fmt: skip
    assert checkpoints.load_newest() == {"step": 100}
    assert checkpoints.load_best() == {"step": 9}


def test_run_without_checkpoint_has_no_newest(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).load_newest() is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b'{"value": '),
        ("state.json", b"\xff\xfe"),
        ("tensors.safetensors", b"short"),
        ("tensors.safetensors", None),
        ("state.json", None),
    ],
)
def test_broken_checkpoint_is_named(tmp_path, file, content):
    folder = tmp_path / "state"
    save_state(folder, {"value": torch.ones(1)})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=r"state is not a checkpoint that can be read: ."):
        load_state(folder)


def test_new_parameters_are_kept_once_and_restored_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    kept = {name: value.clone() for name, value in target.state_dict().items()}
    path, names = tmp_path / "base.safetensors", frozenset({"weight"})
    keep_new_parameters(source, names, path)
    keep_new_parameters(target, names, path)  # as a resumed run does
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, kept["bias"])


def test_no_new_parameters_make_no_file(tmp_path):
    keep_new_parameters(nn.Linear(3, 2), frozenset(), tmp_path / "base.safetensors")
    assert list(tmp_path.iterdir()) == []


# Looking at a run that goes on --------------------------------------------------------------------


def step_of(state: dict[str, Any] | None) -> int:
    assert state is not None
    return int(state["step"])


def test_peek_finds_best_and_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert peek_state(tmp_path) is None
    assert peek_state(tmp_path, newest=True) is None
    for step in (1, 2, 3):
        checkpoints.save(step, {"step": step})
    checkpoints.save_best({"step": 2})
    assert step_of(peek_state(tmp_path)) == 2
    assert step_of(peek_state(tmp_path, newest=True)) == 3


def test_peek_never_moves_what_a_replacement_left(tmp_path):
    Checkpoints(tmp_path, keep=1).save_best({"step": 1})
    (tmp_path / "best").rename(tmp_path / ".best.old")  # between the two renames
    assert step_of(peek_state(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".best.old"]


def test_peek_reads_again_what_was_replaced_meanwhile(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_best({"step": 1})
    true, reads = checkpoint._read, []

    def replacing(folder: Path) -> dict[str, Any]:
        state = true(folder)
        if not reads:  # the tensors were of the old folder, the values would be of the new one
            checkpoints.save_best({"step": 2})
        reads.append(folder)
        return state

    monkeypatch.setattr(checkpoint, "_read", replacing)
    assert step_of(peek_state(tmp_path)) == 2
    assert len(reads) == 2


def test_peek_goes_on_to_a_newer_step_when_one_is_removed(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"step": 1})
    true, reads = checkpoint._read, []

    def removing(folder: Path) -> dict[str, Any]:
        if not reads:
            checkpoints.save(2, {"step": 2})  # removes step 1
        reads.append(folder)
        return true(folder)

    monkeypatch.setattr(checkpoint, "_read", removing)
    assert step_of(peek_state(tmp_path, newest=True)) == 2


def test_peek_names_what_stays_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PEEK_SECONDS", 0.0)
    Checkpoints(tmp_path, keep=1).save_best({"step": 1})
    (tmp_path / "best" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"best is not a checkpoint that can be read: ."):
        peek_state(tmp_path)
