"""Users who fit in processes of their own: exact if these answer, nobody else's trouble if not."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cola.adaptation_data import AdaptationData
from cola.adapters import describe_adapter
from cola.attendance import Visit
from cola.config.choices import AdapterKind, LateUser, MergeMode, UserLoss, UsersMode
from cola.config.schema import OptimizerConfig
from cola.errors import ConfigError, OffloadError
from cola.gradient_learner import GradientLearner
from cola.interfaces import Adaptation
from cola.offload.fit import Fit
from cola.offload.local_folder import LocalFolder
from cola.offload.local_users import LocalUsers
from cola.task_data import Batch
from cola.user_adapters import build_user_adapters
from cola.user_rows import UserRows
from tests import tiny, users
from tests.runs import CONSTANT_RATE, run, small_synthetic
from tests.tolerances import EXACT

SCRIPT = Path(__file__).parents[1] / "scripts" / "fit_locally.py"
OWNERS = [[0, 0, 1, 2], [0, 2, 2, 2, 2], [1, 1], [0, 1, 2], [2, 2, 2], [0], [0, 1, 1, 2, 2]]
ALL_THERE = [[0, 1, 1, 2], [0, 1, 2, 2], [0, 1, 2], [0, 1, 1, 2], [0, 1, 2]]
LOCAL = 1


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("fit_locally", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fit_locally = _load_script()
fit_locally.POLL_SECONDS = 0.002


def build(
    folder: Path,
    *,
    kinds: tuple[str, ...] = ("lowrank:1", "lowrank:3", "linear"),
    base: nn.Module | None = None,
    seconds: float = 30.0,
    late: LateUser = LateUser.wait,
    loss: UserLoss = UserLoss.per_user,
    local: tuple[int, ...] = (LOCAL,),
    **settings: Any,
) -> tuple[GradientLearner, users.Members]:
    """A learner where some users fit in `folder`, and the adapters that all start from."""
    base = tiny.net() if base is None else base
    own = users.roster(
        [replace(u, is_local=i in local) for i, u in enumerate(users.settings(*kinds))]
    )
    adapters = users.filled(base, own)
    start = users.members(adapters)
    optimizer = settings.pop("optimizer", tiny.optimizer())
    elsewhere = LocalUsers(folder, adapters, own, optimizer=optimizer, seconds=seconds, late=late)
    learner = users.learner(
        base, adapters, local=elsewhere, loss=loss, optimizer=optimizer, **settings
    )
    return learner, start


@contextmanager
def own_process(
    learner: GradientLearner, folder: Path, *, optimizer: str = "sgd", **how: Any
) -> Iterator[None]:
    """The script's loop, in a thread that ends with the learner."""
    build = fit_locally.OPTIMIZERS[optimizer]
    thread = threading.Thread(target=fit_locally.serve, args=(folder, build), kwargs=how)
    thread.start()
    try:
        yield
    finally:
        learner.close()
        thread.join()


def round_of(folder: Path, number: int) -> Path:
    return folder / f"user{LOCAL}" / f"round-{number:08d}"


def sent(folder: Path, number: int) -> dict[str, Tensor]:
    """The parameters that a round came with, by the names that an answer has."""
    tensors = load_file(round_of(folder, number) / "data.safetensors")
    return {
        name.replace("/adapter/", "/"): tensor.clone()
        for name, tensor in tensors.items()
        if "/adapter/" in name
    }


def reply(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    draft = round_of(folder, number) / "draft"
    save_file(tensors, draft)
    draft.rename(round_of(folder, number) / "reply.safetensors")


def expect_others_undisturbed(found: GradientLearner, stream: list[Batch], interval: int) -> None:
    """Users 0 and 2 are where they are without user 1, relative to the distance moved."""
    base = tiny.net()
    own = users.roster(users.settings("lowrank:1", "lowrank:3", "linear"))
    adapters = users.filled(base, own)
    start = users.members(adapters)
    wanted = users.learner(base, adapters, loss=UserLoss.per_user)
    tiny.train(wanted, [batch.without(frozenset({LOCAL})) for batch in stream], interval=interval)
    for user in ("user0", "user2"):
        for site, own_adapter in found.export(user).items():
            there = tiny.flat(wanted.export(user)[site])
            moved = there - tiny.flat(start[site][int(user[-1])])
            assert moved.norm() > 0
            assert (tiny.flat(own_adapter) - there).norm() <= EXACT * moved.norm()
    wanted.close()


# Equivalence ------------------------------------------------------------------------------------


PLAIN = OptimizerConfig(
    lr=0.05, weight_decay=0.0, momentum=0.0, nesterov=False, clip=tiny.optimizer().clip
)
"""AdamW of the others; as SGD the plain one that the script has."""


@pytest.mark.parametrize("mode", [UsersMode.alone, UsersMode.collaboration], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["lowrank:3:sgd", "linear:2:sgd", "mlp:2:sgd"])
@pytest.mark.parametrize(
    ("net", "interval"),
    [
        (tiny.TinyNet, 2),
        pytest.param(tiny.TinyNet, 1, marks=pytest.mark.slow),
        pytest.param(tiny.TinyConv, 2, marks=pytest.mark.slow),
    ],
    ids=["net-2", "net-1", "conv-2"],
)
def test_answers_equal_masked_autograd(
    tmp_path: Path, net: type[nn.Module], kind: str, mode: UsersMode, interval: int
) -> None:
    if mode is UsersMode.collaboration and kind.startswith("mlp"):
        return  # Proposition 2
    base = tiny.net(net)
    stream = users.batches(base, OWNERS)
    loss = UserLoss.per_user if interval == 2 else UserLoss.batch
    learner, start = build(
        tmp_path, kinds=("lowrank", kind, "linear"), base=base, loss=loss, optimizer=PLAIN,
        num_workers=2 if net is tiny.TinyNet else 0,
        mode=MergeMode.unmerged if mode is UsersMode.alone else MergeMode.merged,
    )  # fmt: skip
    with own_process(learner, tmp_path / "user1"):
        tiny.train(learner, stream, interval=interval)
        wanted = users.train_by_hand(
            tiny.net(net), start, users.settings("lowrank", kind, "linear"), stream, mode=mode,
            optimizer=PLAIN, interval=interval, loss=loss,
        )  # fmt: skip
        assert users.distance(learner, wanted, start) <= EXACT
        assert learner.present_users() == {0, 1, 2}


def test_all_users_may_fit_elsewhere(tmp_path: Path) -> None:
    learner, start = build(tmp_path, local=(0, 1, 2), loss=UserLoss.batch, optimizer=PLAIN)
    stream = users.batches(tiny.net(), OWNERS)
    with (
        own_process(learner, tmp_path / "user0"),
        own_process(learner, tmp_path / "user1"),
        own_process(learner, tmp_path / "user2"),
    ):
        tiny.train(learner, stream)
        settings = users.settings("lowrank:1:sgd", "lowrank:3:sgd", "linear:2:sgd")
        wanted = users.train_by_hand(
            tiny.net(), start, settings, stream, mode=UsersMode.alone, optimizer=PLAIN
        )
        assert users.distance(learner, wanted, start) <= EXACT


def test_clip_across_sites_leaves_local_users_out(tmp_path: Path) -> None:
    learner, _ = build(tmp_path, optimizer=tiny.optimizer(clip="global"), num_workers=2)
    stream = users.batches(tiny.net(), ALL_THERE)
    with own_process(learner, tmp_path / "user1"):
        tiny.train(learner, stream)
        assert learner.present_users() == {0, 1, 2}


def test_no_optimizer_state_is_kept_for_local_users(tmp_path: Path) -> None:
    kinds = ("lowrank:2", "lowrank:2", "lowrank:2")
    stream = users.batches(tiny.net(), ALL_THERE[:2])
    learner, _ = build(tmp_path, kinds=kinds)
    with own_process(learner, tmp_path / "user1"):
        tiny.train(learner, stream)
        here = learner.measure().held_bytes["cpu"]
    everyone, _ = build(tmp_path / "other", kinds=kinds, local=())
    tiny.train(everyone, stream)
    whole = everyone.measure().held_bytes["cpu"]
    assert here["optimizer"] == whole["optimizer"] * 2 // 3
    everyone.close()


def test_an_interval_in_progress_survives_a_checkpoint(tmp_path: Path) -> None:
    stream = users.batches(tiny.net(), ALL_THERE[:4])
    rates = [Adaptation(number=1 + i // 2, learning_rate=0.05) for i in range(4)]

    def go(learner: GradientLearner, first: int, last: int) -> None:
        for i in range(first, last):
            closing = rates[i] if i % 2 else None
            learner.record(stream[i], closing)
            if closing:
                learner.update(closing)

    whole, _ = build(tmp_path / "whole")
    with own_process(whole, tmp_path / "whole" / "user1"):
        go(whole, 0, 4)
        wanted = whole.export("user1")
    half, _ = build(tmp_path / "half")
    with own_process(half, tmp_path / "half" / "user1"):
        go(half, 0, 3)
        state = half.state_dict()
    again, _ = build(tmp_path / "half")
    with own_process(again, tmp_path / "half" / "user1"):
        again.load_state_dict(state)
        go(again, 3, 4)
        found = again.export("user1")
    assert all(torch.equal(tiny.flat(found[site]), tiny.flat(wanted[site])) for site in wanted)


# Late, failing and lying processes --------------------------------------------------------------


def step(learner: GradientLearner, batch: Batch, number: int) -> None:
    """One adaptation at the rate that `tiny.train` has then."""
    adaptation = Adaptation(number=number, learning_rate=0.05 / number)
    learner.record(batch, adaptation)
    learner.update(adaptation)


def test_a_late_user_waits_and_comes_back_with_its_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path, seconds=0.03, num_workers=2)
    present = []
    for number, batch in enumerate(stream[:3], start=1):
        step(learner, batch, number)
        present.append(learner.present_users())
    assert present == [{0, 1, 2}, {0, 2}, {0, 2}]
    assert "user user1: no answer within 0.03 s to adaptation 1; it waits" in caplog.text
    assert [path.name for path in (tmp_path / "user1").glob("round-*")] == ["round-00000001"]
    answer = {name: tensor + 1.0 for name, tensor in sent(tmp_path, 1).items()}
    reply(tmp_path, 1, answer)
    learner.record(stream[3], None)
    assert learner.present_users() == {0, 1, 2}
    for site, adapter in learner.export("user1").items():
        for name, parameter in adapter.named_parameters():
            assert torch.equal(parameter, answer[f"{site}/{name}"])
    assert not round_of(tmp_path, 1).exists()
    learner.close()


def test_others_never_wait_twice(tmp_path: Path) -> None:
    learner, _ = build(tmp_path, seconds=0.1)
    tiny.train(learner, users.batches(tiny.net(), ALL_THERE))
    assert 0.1 <= learner._fleet.waited_seconds() < 0.3  # five adaptations
    assert learner.measure().stall_seconds >= 0.1
    learner.close()


@pytest.mark.parametrize(
    ("late", "interval", "num_workers"),
    [(LateUser.wait, 1, 0), (LateUser.wait, 2, 2), (LateUser.drop, 1, 2), (LateUser.drop, 2, 0)],
)
def test_silence_changes_nothing_for_others(
    tmp_path: Path, late: LateUser, interval: int, num_workers: int
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path, seconds=0.02, late=late, num_workers=num_workers)
    tiny.train(learner, stream, interval=interval)
    expect_others_undisturbed(learner, stream, interval)
    assert learner.present_users() == {0, 2}
    learner.close()


def test_a_late_user_is_dropped_where_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner, _ = build(tmp_path, seconds=0.02, late=LateUser.drop)
    tiny.train(learner, users.batches(tiny.net(), ALL_THERE[:2]))
    words = "no answer within 0.02 s to adaptation 1 (users.local_late=drop)"
    assert f"user user1 is stopped: {words}" in caplog.text
    assert (tmp_path / "user1" / "done").read_text() == words + "\n"
    assert list((tmp_path / "user1").glob("round-*")) == []
    again, _ = build(tmp_path)
    assert not (tmp_path / "user1" / "done").exists()
    again.load_state_dict(learner.state_dict())
    assert (tmp_path / "user1" / "done").read_text() == words + "\n"
    assert again.present_users() == {0, 2}
    learner.close()
    again.close()


def _poison(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    answer["query/lora_a"][1, 2] = torch.nan
    return answer


BAD_ANSWERS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "shape": (
        lambda a: a | {"query/lora_a": a["query/lora_a"][:1].clone()},
        r"holds query/lora_a of shape \[1, 6\]; the adapter has \[3, 6\]",
    ),
    "missing": (
        lambda a: {n: t for n, t in a.items() if n != "query/lora_b"},
        "lacks query/lora_b; it has to hold every parameter",
    ),
    "large": (lambda a: a | {"more": torch.ones(2**20)}, "has more than [0-9]* bytes, too many"),
    "extra": (lambda a: a | {"query/lora_c": torch.ones(1)}, "holds query/lora_c, which no"),
    "nan": (_poison, "holds values of query/lora_a that are not finite"),
    "integers": (
        lambda a: a | {"query/lora_a": a["query/lora_a"].int()},
        r"holds query/lora_a as torch.int32; send floating-point values",
    ),
}


class Liar(threading.Thread):
    """Answers adaptation 1 once it is there."""

    def __init__(self, folder: Path, answer: Callable[[Path], None]) -> None:
        super().__init__()
        self._folder, self._answer = folder, answer

    def run(self) -> None:
        while not round_of(self._folder, 1).exists():
            if (self._folder / "user1" / "done").exists():
                return
            time.sleep(0.005)
        self._answer(self._folder)


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_a_bad_answer_stops_its_user_alone(
    tmp_path: Path, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, words = BAD_ANSWERS[answer]
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, start = build(tmp_path)
    liar = Liar(tmp_path, lambda folder: reply(folder, 1, spoil(sent(folder, 1))))
    liar.start()
    tiny.train(learner, stream)
    assert learner.present_users() == {0, 2}
    expect_others_undisturbed(learner, stream, 1)
    for site, adapter in learner.export("user1").items():
        assert torch.equal(tiny.flat(adapter), tiny.flat(start[site][LOCAL]))
    learner.close()
    liar.join()
    (stopped,) = [r.message for r in caplog.records if "is stopped" in r.message]
    assert re.match(f"user user1 is stopped: its reply.safetensors {words}", stopped)


def test_a_file_that_is_no_safetensors_stops_its_user_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path)
    liar = Liar(
        tmp_path, lambda folder: _write(round_of(folder, 1) / "reply.safetensors", "not today")
    )
    liar.start()
    tiny.train(learner, stream)
    expect_others_undisturbed(learner, stream, 1)
    learner.close()
    liar.join()
    assert "user user1 is stopped: its reply.safetensors cannot be read" in caplog.text


def _write(path: Path, text: str) -> None:
    path.with_name("draft").write_text(text)
    path.with_name("draft").rename(path)


def test_a_process_that_fails_stops_its_user_with_its_own_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path)

    def refuse(parameters: list[Tensor]) -> torch.optim.Optimizer:
        raise ValueError("no\nmoney left")

    thread = threading.Thread(target=fit_locally.serve, args=(tmp_path / "user1", refuse))
    thread.start()
    tiny.train(learner, stream)
    expect_others_undisturbed(learner, stream, 1)
    learner.close()
    thread.join()
    words = "its own process failed: ValueError: no money left (adaptation 1"
    assert f"user user1 is stopped: {words}" in caplog.text


def test_a_bad_answer_that_is_late_stops_its_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path, seconds=0.02)
    step(learner, stream[0], 1)
    step(learner, stream[1], 2)
    reply(tmp_path, 1, {"what": torch.ones(1)})
    for number, batch in enumerate(stream[2:], start=3):
        step(learner, batch, number)
    assert "user user1 is stopped: its reply.safetensors lacks" in caplog.text
    expect_others_undisturbed(learner, stream, 1)
    learner.close()


def test_data_that_is_not_finite_is_not_handed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    assert stream[0].rows is not None
    stream[0].inputs["features"][dict(stream[0].rows.slices())[LOCAL]] = torch.nan
    learner, _ = build(tmp_path)
    tiny.train(learner, stream)
    assert "user user1 is stopped: the hidden gradient of site" in caplog.text
    assert learner.measure().stall_seconds < 10
    expect_others_undisturbed(learner, stream, 1)
    learner.close()


def test_a_folder_that_vanished_stops_its_user_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path)
    (tmp_path / "user1" / "adapters.json").unlink()
    (tmp_path / "user1").rmdir()
    (tmp_path / "user1").write_text("in the way")
    tiny.train(learner, stream)
    assert "user user1 is stopped: its data cannot be handed over" in caplog.text
    expect_others_undisturbed(learner, stream, 1)
    learner.close()


def test_a_run_waits_once_more_for_its_last_user(tmp_path: Path) -> None:
    learner, _ = build(tmp_path, kinds=("lowrank", "lowrank"), seconds=0.02)
    stream = users.batches(tiny.net(), [[1, 1], [1, 1]])
    assert learner._attendance is not None
    learner._attendance.roster.stop(0, "for the test")
    step(learner, stream[0], 1)
    learner._attendance._local._seconds = 30.0  # type: ignore[union-attr]
    timer = threading.Timer(0.05, lambda: reply(tmp_path, 1, sent(tmp_path, 1)))
    timer.start()
    assert learner.record(stream[1], None) > 0
    assert learner.present_users() == {LOCAL}
    timer.join()
    learner.close()


def test_a_run_without_anybody_left_says_who_does_not_answer(tmp_path: Path) -> None:
    learner, _ = build(tmp_path, kinds=("lowrank",), seconds=0.02, local=(0,))
    stream = users.batches(tiny.net(), [[0, 0], [0, 0]])
    step(learner, stream[0], 1)
    with pytest.raises(OffloadError, match=r"no user is left at step 2 \(user0: its own process"):
        learner.record(stream[1], None)
    learner.close()


def test_a_late_user_that_leaves_by_plan_is_awaited_no_more(tmp_path: Path) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, _ = build(tmp_path, seconds=0.02, visits=[Visit(user=LOCAL, leave=3)])
    for number, batch in enumerate(stream[:3], start=1):
        step(learner, batch, number)
    assert not round_of(tmp_path, 1).exists()
    assert learner.present_users() == {0, 2}
    learner.close()


def test_a_late_user_takes_part_again_after_a_restart(tmp_path: Path) -> None:
    stream = users.batches(tiny.net(), ALL_THERE)
    learner, start = build(tmp_path, seconds=0.02)
    step(learner, stream[0], 1)
    state = learner.state_dict()
    assert learner.present_users() == {0, 2}
    learner.load_state_dict(state)
    assert learner.present_users() == {0, 1, 2}
    assert not round_of(tmp_path, 1).exists()
    for site, adapter in learner.export("user1").items():
        assert torch.equal(tiny.flat(adapter), tiny.flat(start[site][LOCAL]))
    learner.close()


# Files ------------------------------------------------------------------------------------------


def test_a_round_holds_what_was_promised(tmp_path: Path) -> None:
    base = tiny.net()
    learner, start = build(tmp_path, base=base, seconds=0.02)
    step(learner, users.batches(base, ALL_THERE)[0], 1)
    here = round_of(tmp_path, 1)
    assert json.loads((here / "round.json").read_text()) == {
        "format_version": 1,
        "adaptation": 1,
        "learning_rate": 0.05,
        "answer_within_seconds": 0.02,
    }
    data = load_file(here / "data.safetensors")
    described = json.loads((tmp_path / "user1" / "adapters.json").read_text())
    assert described["user"] == "user1"
    assert described["alpha"] == 0.7
    assert described["adapters"]["query"] == {
        "kind": "lowrank",
        "site_kind": "linear",
        "in_features": 6,
        "out_features": 5,
        "is_head": False,
        "shapes": {"lora_a": [3, 6], "lora_b": [5, 3]},  # of its own rank
        "learning_rate_factor": 1.0,
    }
    assert data["query/hidden_input"].shape == (2 * 4, 6)
    assert data["again/hidden_gradient"].shape == (2 * 2 * 4, 4)  # runs twice
    for site, named in described["adapters"].items():
        own = start[site][LOCAL].state_dict()
        assert {name: list(own[name].shape) for name in own} == named["shapes"]
        assert all(torch.equal(data[f"{site}/adapter/{name}"], own[name]) for name in own)
    assert all(tensor.dtype is torch.float64 for tensor in data.values())
    learner.close()
    assert (tmp_path / "user1" / "done").read_text() == "the run has ended\n"


def test_new_heads_are_described_with_their_own_rate(tmp_path: Path) -> None:
    base = tiny.net()
    own = users.roster([replace(users.settings("lowrank")[0], is_local=True)])
    adapters = {
        site: build_user_adapters(spec, own, seed=0)
        for site, spec in tiny.specs(base, heads=["head"]).items()
    }
    optimizer = OptimizerConfig(lr=0.1, head_lr=0.4)
    LocalUsers(
        tmp_path, adapters, own, optimizer=optimizer, seconds=1.0, late=LateUser.wait
    ).start()
    described = json.loads((tmp_path / "user0" / "adapters.json").read_text())["adapters"]
    assert described["head"]["learning_rate_factor"] == 4.0
    assert described["head"]["kind"] == "linear"
    assert described["query"]["learning_rate_factor"] == 1.0


def test_data_is_kept_as_it_was_taken(tmp_path: Path) -> None:
    """The base model goes on, and may write over what it sent."""
    own = users.roster([replace(users.settings("lowrank")[0], is_local=True)])
    adapters = users.filled(tiny.net(), own)
    elsewhere = LocalUsers(
        tmp_path, adapters, own, optimizer=PLAIN, seconds=0.0, late=LateUser.wait
    )
    x, g = torch.ones(2, 6).double(), torch.ones(2, 5).double()
    data = AdaptationData(hidden_input=x, hidden_gradient=g)
    elsewhere.take("query", data, UserRows.of([0, 0]), 0)
    x.zero_()
    g.zero_()
    elsewhere.hand_over(Fit(number=1, learning_rate=0.1, gradient_scale=2.0))
    handed = load_file(tmp_path / "user0" / "round-00000001" / "data.safetensors")
    assert handed["query/hidden_input"].eq(1.0).all()
    assert handed["query/hidden_gradient"].eq(2.0).all()


def test_a_folder_is_cleared_for_a_new_run(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "user1")
    folder.open({})
    folder.hand_over(7, {"x": torch.ones(1)}, {})
    folder.path.joinpath("done").touch()
    folder.open({"user": "user1"})
    assert [path.name for path in folder.path.iterdir()] == ["adapters.json"]


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "user1").write_text("in the way")
    with pytest.raises(ConfigError, match=r"no folder for user 'user1' .* set users\.local_dir"):
        build(tmp_path)


# The script -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda one: one.name)
@pytest.mark.parametrize("site", ["linear", "conv1d", "conv2d", "strided"])
def test_the_script_knows_every_adapter(kind: AdapterKind, site: str) -> None:
    one = tiny.site(site)
    adapter = tiny.filled_adapter(kind, one.spec)
    found = fit_locally.output(
        describe_adapter(adapter), dict(adapter.named_parameters()), one.hidden_input
    )
    torch.testing.assert_close(found, adapter(one.hidden_input))


def test_the_script_starts_from_what_was_sent_at_the_rate_of_the_site() -> None:
    one = tiny.site("linear", adapter_bias=False)
    described = describe_adapter(tiny.filled_adapter(AdapterKind.linear, one.spec))
    fit = fit_locally.LocalFit(
        {
            "format_version": 1,
            "alpha": 0.5,
            "adapters": {"site": {**described, "learning_rate_factor": 4.0}},
        },
        fit_locally.OPTIMIZERS["sgd"],
    )
    x, g = one.hidden_input, torch.ones(len(one.hidden_input), 4).double()
    for weight in (torch.zeros(4, 5).double(), torch.ones(4, 5).double()):
        data = {"site/hidden_input": x, "site/hidden_gradient": g, "site/adapter/weight": weight}
        found = fit.answer(data, 0.1, 1)["site/weight"]
        torch.testing.assert_close(found, weight - 0.1 * 4.0 * 0.5 * g.T @ x)


def test_lbfgs_of_the_script_forgets_the_last_data() -> None:
    described = {"kind": "linear", "site_kind": "linear", "shapes": {"weight": [4, 5]}}
    description = {
        "format_version": 1,
        "alpha": 0.5,
        "adapters": {"site": {**described, "learning_rate_factor": 1.0}},
    }
    old, new = (fit_locally.LocalFit(description, fit_locally.OPTIMIZERS["lbfgs"]) for _ in "ab")
    generator = torch.Generator().manual_seed(0)
    first, second = (
        {
            "site/hidden_input": torch.randn(7, 5, generator=generator).double(),
            "site/hidden_gradient": torch.randn(7, 4, generator=generator).double(),
            "site/adapter/weight": torch.zeros(4, 5).double(),
        }
        for _ in range(2)
    )
    old.answer(first, 0.1, 1)
    found, wanted = (fit.answer(second, 0.1, 1)["site/weight"] for fit in (old, new))
    assert torch.equal(found, wanted)


def test_the_script_leaves_alone_what_has_no_data() -> None:
    described = {"kind": "linear", "site_kind": "linear", "shapes": {"weight": [4, 5]}}
    fit = fit_locally.LocalFit(
        {"format_version": 1, "alpha": 0.5, "adapters": {"site": described}},
        fit_locally.OPTIMIZERS["adagrad"],
    )
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit.answer({"site/adapter/weight": weight}, 0.1, 1)["site/weight"], weight)


@pytest.mark.parametrize("optimizer", fit_locally.OPTIMIZERS)
def test_every_optimizer_of_the_script_learns(tmp_path: Path, optimizer: str) -> None:
    learner, _ = build(tmp_path, kinds=("lowrank", "mlp:2"))
    batch = users.batches(tiny.net(), [[1, 1, 1, 1]])[0]
    with own_process(learner, tmp_path / "user1", optimizer=optimizer, lr=0.05):
        losses = []
        for number in range(1, 5):
            adaptation = Adaptation(number=number, learning_rate=0.05)
            losses.append(learner.record(batch, adaptation).item())
            learner.update(adaptation)
        assert learner.present_users() == {0, 1}
    assert losses[-1] < 0.95 * losses[0]


# A whole run ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_and_a_process_of_its_own_meet_in_a_folder(tmp_path: Path) -> None:
    """The command of the documentation, with the real script beside it."""
    folder = tmp_path / "exchange"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, folder / "creative_writing", "--lr", "0.01"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with small_synthetic(64):
            finished = run(
                tmp_path / "run", "task=synthetic", "model=tiny-gpt2", "users=alone",
                "users.local=[creative_writing]", f"users.local_dir={folder}",
                "trainer.epochs=2", "trainer.interval=2", *CONSTANT_RATE,
            )  # fmt: skip
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert output.splitlines()[-1] == "the run has ended"
    assert process.returncode == 0
    assert finished.losses[-1] < finished.losses[0]
    assert list((folder / "creative_writing").glob("round-*")) == []
