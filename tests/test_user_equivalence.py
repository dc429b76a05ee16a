"""Several users on one base model: weights after several steps against a hand-masked autograd."""

import functools
from dataclasses import replace

import pytest
import torch

from cola.config.choices import MergeMode, Reduction, UserGradient, UserLoss, UsersMode
from cola.user_rows import UserRows
from tests import tiny, users
from tests.tolerances import EXACT

NETS = {"net": tiny.TinyNet, "conv": tiny.TinyConv}
# Uneven, with users missing from batches and, at intervals of 2 and 3, from whole intervals.
OWNERS = [[0, 0, 1, 2], [0, 2, 2, 2, 2], [1, 1], [0, 1, 2], [2, 2, 2], [0], [0, 1, 1, 2, 2]]
MIXES = {
    "lowrank": ("lowrank", "lowrank", "lowrank"),
    "ranks": ("lowrank:1", "lowrank:3", "lowrank:2"),
    "linear": ("linear", "linear", "linear"),
    "mlp": ("mlp", "mlp", "mlp"),
    "lowrank-linear": ("lowrank", "linear", "linear"),
    "all": ("lowrank:3", "linear", "mlp"),
    "optimizers": ("lowrank:2:adamw", "lowrank:2:sgd", "linear:2:sgd"),
}
LINEAR_MIXES = [mix for mix, kinds in MIXES.items() if "mlp" not in " ".join(kinds)]

# Convolutions have one route, whatever the interval, and three batches are as two: slow tests.
by_net_and_interval = pytest.mark.parametrize(
    ("net", "interval"),
    [
        *(("net", interval) for interval in (1, 2)),
        pytest.param("net", 3, marks=pytest.mark.slow),
        ("conv", 2),
        *(pytest.param("conv", interval, marks=pytest.mark.slow) for interval in (1, 3)),
    ],
)


def check(
    net: str,
    mix: str,
    mode: UsersMode,
    *,
    interval: int = 1,
    num_workers: int = 0,
    clip: str = "none",
    reduction: Reduction = Reduction.mean,
    gradient: UserGradient = UserGradient.federated,
    loss: UserLoss = UserLoss.batch,
    interval_reduction: Reduction = Reduction.mean,
    detached: bool = False,
) -> None:
    base, config = tiny.net(NETS[net]), tiny.optimizer(clip=clip)
    own = users.roster(users.settings(*MIXES[mix]), reduction)
    adapters = users.filled(base, own)
    start = users.members(adapters)
    stream = users.batches(base, OWNERS)
    wanted = users.train_by_hand(
        base, start, own.settings, stream, mode=mode, optimizer=config, interval=interval,
        reduction=reduction, gradient=gradient, loss=loss,
        interval_reduction=interval_reduction, detached=detached,
    )  # fmt: skip
    unmerged = MergeMode.detached if detached else MergeMode.unmerged
    learner = users.learner(
        base, adapters, mode=unmerged if mode is UsersMode.alone else MergeMode.merged,
        optimizer=config, num_workers=num_workers, gradient=gradient, loss=loss,
        reduction=interval_reduction,
    )  # fmt: skip
    tiny.train(learner, stream, interval=interval)
    assert users.distance(learner, wanted, start) <= EXACT
    learner.close()


@pytest.mark.parametrize("mix", MIXES)
@by_net_and_interval
def test_alone_equals_masked_autograd(net: str, mix: str, interval: int) -> None:
    check(net, mix, UsersMode.alone, interval=interval, num_workers=2 if interval == 2 else 0)


@pytest.mark.parametrize("mix", ["lowrank", "ranks", "lowrank-linear", "optimizers"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_products_of_each_user_equal_masked_autograd(
    monkeypatch: pytest.MonkeyPatch, mix: str, num_workers: int
) -> None:
    """What a host does with long rows, instead of copying them into tiles."""
    monkeypatch.setattr("cola.user_gradients.LONG", 0)
    check("net", mix, UsersMode.alone, interval=2, num_workers=num_workers)


@pytest.mark.parametrize("gradient", list(UserGradient), ids=lambda one: one.name)
@pytest.mark.parametrize("mix", LINEAR_MIXES)
@by_net_and_interval
def test_collaboration_equals_masked_autograd(
    net: str, mix: str, interval: int, gradient: UserGradient
) -> None:
    check(
        net, mix, UsersMode.collaboration, interval=interval, gradient=gradient,
        num_workers=2 if interval == 2 else 0,
    )  # fmt: skip


@pytest.mark.parametrize("mode", [UsersMode.alone, UsersMode.collaboration], ids=lambda m: m.name)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("interval_reduction", list(Reduction), ids=lambda one: one.name)
def test_rows_averaged_by_user_equal_masked_autograd(
    mode: UsersMode, interval: int, interval_reduction: Reduction
) -> None:
    check(
        "net", "lowrank-linear", mode, interval=interval, loss=UserLoss.per_user,
        interval_reduction=interval_reduction,
    )  # fmt: skip


@pytest.mark.parametrize("mix", ["ranks", "all"])
@pytest.mark.parametrize("clip", ["adapter", "global"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_clipping_is_of_each_user(clip: str, num_workers: int, mix: str) -> None:
    check("net", mix, UsersMode.alone, clip=clip, num_workers=num_workers, interval=2)


@pytest.mark.parametrize("gradient", list(UserGradient), ids=lambda one: one.name)
def test_summed_users_equal_masked_autograd(gradient: UserGradient) -> None:
    check(
        "net", "lowrank-linear", UsersMode.collaboration, reduction=Reduction.sum,
        gradient=gradient,
    )  # fmt: skip


def test_detached_users_equal_masked_autograd() -> None:
    check("net", "all", UsersMode.alone, detached=True)


@functools.cache
def apart(kind: str, position: int, interval: int) -> list[torch.Tensor]:
    """One user trained without the others, on the user's own rows of the same batches."""
    base = tiny.net()
    own = users.roster(users.settings(*MIXES[kind]))
    adapters = users.filled(base, own)
    single = users.roster([own.settings[position]])
    alone = users.filled(base, single)
    for site, adapter in alone.items():
        stack, place = adapters[site].stack_of(position)
        adapter.stacks[0].load_member(0, stack.member_state(place))
    others = frozenset(range(len(own))) - {position}
    stream = [batch.without(others) for batch in users.batches(base, OWNERS)]
    renamed = [replace(batch, rows=UserRows.of([0] * len(batch.labels))) for batch in stream]
    learner = users.learner(base, alone, loss=UserLoss.per_user)
    tiny.train(learner, renamed, interval=interval)
    flat = [tiny.flat(adapter) for adapter in learner.export(f"user{position}").values()]
    learner.close()
    return flat


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ranks", "all", "optimizers"])
def test_alone_equals_separate_runs(kind: str, interval: int) -> None:
    base = tiny.net()
    own = users.roster(users.settings(*MIXES[kind]))
    adapters = users.filled(base, own)
    start = users.members(adapters)
    learner = users.learner(base, adapters, loss=UserLoss.per_user)
    tiny.train(learner, users.batches(base, OWNERS), interval=interval)
    for position, name in enumerate(own.names):
        mine = [tiny.flat(adapter) for adapter in learner.export(name).values()]
        for found, wanted, site in zip(mine, apart(kind, position, interval), start, strict=True):
            moved = (wanted - tiny.flat(start[site][position])).norm()
            assert (found - wanted).norm() <= EXACT * moved
