"""Users at sites that share an input and step together: as site by site, and as autograd."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cola import added_products, bank
from cola import user_gradients as routes
from cola.adaptation_data import AdaptationData
from cola.config.choices import AdapterKind, UserLoss, UsersMode
from cola.config.schema import OptimizerConfig
from cola.offload import placing, user_fitter
from cola.offload.broken_users import BrokenUsers
from cola.offload.fit import Fit
from cola.offload.user_fitter import UserFitter
from cola.sites import SiteKind, SiteSpec
from cola.user_adapters import build_user_adapters
from cola.user_optimizers import UserOptimizer
from cola.user_rows import UserRows
from cola.user_stack import UserStack
from cola.user_steps import UserStep, step_together
from tests import tiny, users
from tests.tolerances import EXACT
from tests.wires import LaggingTransfer


class Attention(nn.Module):
    """Query and value share an input; no site's output is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 5, bias=False)
        self.value = nn.Linear(6, 4, bias=False)
        self.out = nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.query(x))[..., None] * self.value(x)[..., None, :]
        joined: Tensor = self.out(mixed.flatten(-2))
        return joined


class Net(nn.Module):
    """Two blocks, whose sites travel together, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.head = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> tiny.Output:
        x = torch.tanh(self.second(torch.tanh(self.first(features))))
        return tiny.Output(self.head(x.mean(dim=1)))


EVEN = [[0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 2], [0, 1, 2], [1, 2]]
UNEVEN = [[0, 0, 1, 2], [0, 2, 2, 2, 2], [1, 1], [0, 1, 2]]
MIXES = {
    "lowrank": ("lowrank", "lowrank", "lowrank"),
    "ranks": ("lowrank:1", "lowrank:3", "lowrank:2"),
    "all": ("lowrank:3", "linear", "mlp"),
    "optimizers": ("lowrank:2:adamw", "lowrank:2:sgd", "lowrank:1:sgd"),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("owners", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("num_workers", "interval", "long"),
    [(0, 1, 1 << 13), (2, 1, 1 << 13), pytest.param(2, 2, 0, marks=pytest.mark.slow)],
)
def test_users_of_blocks_equal_masked_autograd(
    monkeypatch: pytest.MonkeyPatch,
    mix: str,
    owners: list[list[int]],
    num_workers: int,
    interval: int,
    long: int,
) -> None:
    monkeypatch.setattr(routes, "LONG", long)
    if num_workers:
        monkeypatch.setattr(placing, "Transfer", LaggingTransfer)
    joined: list[int] = []
    added: list[bool] = []
    gradients, add = user_fitter.user_gradients, bank.add_lowrank

    def noted_gradients(stacks: Sequence[UserStack], *args: object) -> object:
        joined.append(len(stacks))
        return gradients(stacks, *args)  # type: ignore[arg-type]

    def noted_add(*args: object) -> object:
        found = add(*args)  # type: ignore[arg-type]
        added.append(found is not None)
        return found

    monkeypatch.setattr(user_fitter, "user_gradients", noted_gradients)
    monkeypatch.setattr(bank, "add_lowrank", noted_add)
    base, config = tiny.net(Net), tiny.optimizer()
    own = users.roster(users.settings(*MIXES[mix]))
    adapters = users.filled(base, own)
    start = users.members(adapters)
    stream = users.batches(base, owners)
    wanted = users.train_by_hand(
        base, start, own.settings, stream, mode=UsersMode.alone, optimizer=config,
        interval=interval,
    )  # fmt: skip
    found = users.learner(base, adapters, optimizer=config, num_workers=num_workers)
    tiny.train(found, stream, interval=interval)
    assert users.distance(found, wanted, start) <= EXACT
    found.close()
    assert (2 in joined) is (num_workers > 0)  # where a block's data arrives together
    is_one_cohort = mix in ("lowrank", "ranks")
    assert any(added) is is_one_cohort  # one batch in UNEVEN is even


ROWS = {
    "uneven": UserRows(users=(0, 1, 2, 3), counts=(3, 1, 7, 2)),
    "even": UserRows(users=(0, 1, 2, 3), counts=(3, 3, 3, 3)),
    "some": UserRows(users=(1, 3), counts=(4, 5)),
    "some, even": UserRows(users=(0, 2), counts=(4, 4)),
}


def stack_of(kind: AdapterKind, sizes: tuple[int, int], seed: int) -> UserStack:
    spec = SiteSpec(
        name=f"site{seed}", kind=SiteKind.linear, in_features=sizes[0], out_features=sizes[1]
    )
    members = [tiny.filled_adapter(kind, spec, seed=4 * seed + user) for user in range(4)]
    return UserStack(members, first=0, alphas=[1.0, 0.5, 2.0, -1.0]).requires_grad_(False)


@pytest.mark.parametrize("long", [0, 1 << 20], ids=["long", "short"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("last", list(AdapterKind), ids=lambda kind: kind.name)
def test_sites_of_one_input_get_what_each_gets_alone(
    monkeypatch: pytest.MonkeyPatch, last: AdapterKind, rows: UserRows, long: int
) -> None:
    monkeypatch.setattr(routes, "LONG", long)
    kinds = (AdapterKind.lowrank, AdapterKind.lowrank, last)
    stacks = [stack_of(kind, (6, 5 - seed), seed) for seed, kind in enumerate(kinds)]
    generator = torch.Generator().manual_seed(3)
    x, *gradients = (
        torch.randn(rows.total, size, generator=generator, dtype=torch.float64)
        for size in (6, 5, 4, 3)
    )
    together = routes.user_gradients(stacks, x, gradients, rows)
    for stack, g, found in zip(stacks, gradients, together, strict=True):
        data = AdaptationData(hidden_input=x, hidden_gradient=g)
        wanted = routes._member_gradients(stack, data, rows)
        assert list(found) == list(wanted)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_that_step_together_make_what_each_makes_alone(name: str) -> None:
    """Users of other rates and counts, who were not all there everywhere."""
    config = tiny.optimizer(name)
    generator = torch.Generator().manual_seed(0)
    rates = [[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [2.0, 2.0, 1.0]]

    def draw(site: int) -> dict[str, Tensor]:
        shapes = {"lora_a": (2, 3 + site), "lora_b": (4, 2)}
        return {
            key: torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            for key, shape in shapes.items()
        }

    parameters = [draw(site) for site in range(3)]
    copies = [{key: value.clone() for key, value in own.items()} for own in parameters]
    together, apart = (
        [
            UserOptimizer(own, config, name=config.name, rates=rate)
            for own, rate in zip(params, rates, strict=True)
        ]
        for params in (parameters, copies)
    )
    everyone: Sequence[int] = (0, 1, 2)
    for there in ([everyone] * 3, [(0, 2), everyone, ()], [everyone, (1,), everyone]):
        gradients = [draw(site) for site in range(3)]
        step_together(
            [UserStep(*own) for own in zip(together, gradients, there, strict=True)], 0.05
        )
        for optimizer, own, who in zip(apart, gradients, there, strict=True):
            step_together([UserStep(optimizer, own, who)], 0.05)
    for found, wanted in zip(parameters, copies, strict=True):
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=EXACT, atol=EXACT)


def test_users_in_step_are_one_call_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    call = UserOptimizer.call_kernel

    def counted(self: UserOptimizer, tensors: Sequence[list[Tensor]], *args: object) -> None:
        calls.append(len(tensors[0]))
        call(self, tensors, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(UserOptimizer, "call_kernel", counted)
    fitter = fitter_of(("a", "b", "c"))
    fitter.accumulate(batch_of(fitter, {}))
    fitter.step(FIT)
    assert calls == [6]


FIT = Fit(number=1, learning_rate=0.1, gradient_scale=1.0)


def fitter_of(sites: Sequence[str], config: OptimizerConfig | None = None) -> UserFitter:
    own = users.roster(users.settings("lowrank", "lowrank", "lowrank"))
    adapters = {}
    for site in sites:
        spec = SiteSpec(name=site, kind=SiteKind.linear, in_features=6, out_features=5)
        adapters[site] = build_user_adapters(spec, own, seed=0).double()
    return UserFitter(adapters, config or tiny.optimizer(), own)


def batch_of(fitter: UserFitter, broken: dict[str, int]) -> list[tuple[str, AdaptationData]]:
    """Two rows of each user; of some sites a user's gradient is not a number."""
    generator = torch.Generator().manual_seed(2)
    rows, batch = UserRows(users=(0, 1, 2), counts=(2, 2, 2)), []
    x = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    for site in fitter.adapters:
        g = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        if site in broken:
            g[2 * broken[site]] = torch.nan
        data = AdaptationData(hidden_input=x, hidden_gradient=g, rows=rows)
        batch.append((site, data))
    return batch


@pytest.mark.parametrize("clip", ["none", "adapter"])
def test_a_gradient_that_is_not_finite_stops_its_user_at_its_site_only(clip: str) -> None:
    config = tiny.optimizer(clip=clip)
    found, wanted = fitter_of(("a", "b"), config), fitter_of(("a", "b"), config)
    before = found.adapters["b"].stacks[0].member_state(1)
    found.accumulate(batch_of(found, {"b": 1}))
    wanted.accumulate(batch_of(wanted, {}))
    assert found.step(FIT) == wanted.step(FIT) == ["a", "b"]
    for site in ("a", "b"):
        mine, other = (f.adapters[site].stacks[0] for f in (found, wanted))
        for user in range(3):
            expected = before if (site, user) == ("b", 1) else other.member_state(user)
            torch.testing.assert_close(mine.member_state(user), expected, rtol=EXACT, atol=EXACT)
    stopped = found._roster.take_stopped()
    assert list(stopped) == [1]
    assert "site 'b' is not finite (adaptation 1)" in stopped[1]
    assert not wanted._roster.has_stopped


def test_only_sites_with_data_step() -> None:
    fitter = fitter_of(("a", "b"))
    before = fitter.adapters["a"].stacks[0].member_state(0)
    fitter.accumulate([one for one in batch_of(fitter, {}) if one[0] == "b"])
    assert fitter.step(FIT) == ["b"]
    assert fitter.step(FIT) == []
    torch.testing.assert_close(fitter.adapters["a"].stacks[0].member_state(0), before)


def test_who_is_broken_is_told_once_whenever_it_was_noted() -> None:
    """A GPU is asked after several adaptations."""
    own = users.roster(users.settings("lowrank", "lowrank", "lowrank"))
    broken = BrokenUsers(own)
    broken.note(["a", "b"], 1, torch.tensor([[False, False], [True, False]]))
    broken.note(["a", "b"], 1, torch.tensor([[False, True], [False, False]]))
    broken.note(["a"], 0, None)
    broken.report(5)
    stopped = own.take_stopped()
    assert sorted(stopped) == [1, 2]
    assert "site 'b' is not finite (adaptation 5)" in stopped[1]
    assert "site 'a' is not finite (adaptation 5)" in stopped[2]
    broken.report(6)
    assert not own.has_stopped


@pytest.mark.parametrize("loss", list(UserLoss), ids=lambda one: one.name)
def test_clips_of_users_who_step_together_are_of_each_site(loss: UserLoss) -> None:
    config = tiny.optimizer(clip="adapter", clip_norm=0.1)
    scales = None if loss is UserLoss.batch else (0.5, 2.0, 1.0)
    fit = replace(FIT, gradient_scale=3.0, user_scales=scales)
    together = fitter_of(("a", "b"), config)
    together.accumulate(batch_of(together, {}))
    together.step(fit)
    for site in ("a", "b"):
        alone = fitter_of((site,), config)
        alone.accumulate([one for one in batch_of(together, {}) if one[0] == site])
        alone.step(fit)
        for name, stack in alone.adapters[site].stacks[0].parameter_stacks().items():
            mine = together.adapters[site].stacks[0].parameter_stacks()[name]
            torch.testing.assert_close(mine, stack, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("owners", [(0, 0, 1, 1, 2, 2), (0, 0, 2, 2)], ids=["all", "some"])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_users_are_added_in_the_sites_own_memory(owners: tuple[int, ...], alpha: float) -> None:
    own = users.roster(users.settings("lowrank:1", "lowrank:3", "lowrank:2", alpha=alpha))
    base = tiny.net(Net)
    adapter = users.filled(base, own)["first.query"].requires_grad_(False)
    own.rows = UserRows.of(owners)
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, back = draw(len(owners), 4, 6), draw(6, 5), draw(len(owners), 4, 5)
    results = []
    for adds in (True, False):
        x = x.detach().requires_grad_(True)
        hidden = x @ weight
        if adds:
            adapted = added_products.add_lowrank(hidden, x, adapter, 1.0)
            assert adapted is not None
            assert adapted.data_ptr() == hidden.data_ptr()
        else:
            adapted = hidden + adapter(x)
        results.append((adapted.detach(), *torch.autograd.grad(adapted, x, back)))
    torch.testing.assert_close(results[0], results[1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("kinds", "owners"),
    [
        (("lowrank", "lowrank"), (0, 0, 1)),
        (("lowrank", "linear"), (0, 1)),
        (("mlp", "mlp"), (0, 1)),
    ],
    ids=["uneven", "two cohorts", "mlp"],
)
def test_other_users_are_added_the_other_way(
    kinds: tuple[str, ...], owners: tuple[int, ...]
) -> None:
    own = users.roster(users.settings(*kinds))
    adapter = users.filled(tiny.net(Net), own)["first.query"]
    own.rows = UserRows.of(owners)
    x = torch.randn(len(owners), 4, 6, dtype=torch.float64)
    hidden = x @ torch.randn(6, 5, dtype=torch.float64)
    before = hidden.clone()
    assert added_products.add_lowrank(hidden, x, adapter, 1.0) is None
    assert torch.equal(hidden, before)


def test_what_somebody_else_may_see_is_not_changed() -> None:
    """Outputs that are views, which have a base, and rows or adapters of another type."""
    adapter = tiny.filled_adapters(tiny.net(Net), AdapterKind.lowrank)["first.query"]
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    hidden = x @ torch.randn(6, 5, dtype=torch.float64)
    before = hidden.clone()
    assert added_products.add_lowrank(hidden.view(3, 4, 5), x, adapter, 1.0) is None
    assert added_products.add_lowrank(hidden, x.float(), adapter, 1.0) is None
    assert torch.equal(hidden, before)
    assert added_products.add_lowrank(hidden.float(), x.float(), adapter, 1.0) is None
    assert added_products.add_lowrank(hidden, x, adapter, 1.0) is hidden
    assert not torch.equal(hidden, before)
