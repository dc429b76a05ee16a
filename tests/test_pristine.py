"""merge.pristine=base: factors travel, the base device adds them, and the weights are the same."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import Adapter, require_mergeable
from cola.config.choices import AdapterKind, MergeMode, Pristine, Reduction, Rounding
from cola.merging import Merger
from cola.sites import describe_site, to_base_layout
from cola.user_adapters import SiteAdapter, UserAdapters
from tests import tiny, users
from tests.tolerances import EXACT, FLOAT32

TOLERANCES = {torch.float32: FLOAT32, torch.float64: EXACT}
NAMES = ["linear", "conv1d", "conv2d", "strided"]
USERS = {
    "ranks": ("lowrank:1", "lowrank:3", "lowrank:2:sgd"),  # two cohorts
    "kinds": ("lowrank:2", "lowrank:1", "linear"),
    "linear": ("linear", "linear"),
}

by_name = pytest.mark.parametrize("name", NAMES)
by_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
by_reduction = pytest.mark.parametrize("reduction", list(Reduction), ids=lambda r: r.name)


def module_of(site: tiny.Site) -> nn.ModuleDict:
    return nn.ModuleDict({site.spec.name: site.module})


def user_adapters(site: tiny.Site, kinds: str, reduction: Reduction, *, std: float) -> UserAdapters:
    own = users.settings(*USERS[kinds])
    own = [users.replace(user, alpha=0.5 + 0.3 * index) for index, user in enumerate(own)]
    roster = users.roster(own, reduction)
    if len(own) > 2:
        roster.set_absent(frozenset({1}))
    return users.filled(module_of(site), roster, std=std)[site.spec.name]


def assert_merges_alike(site: tiny.Site, versions: list[SiteAdapter], scale: float) -> None:
    """Both mergers, several adaptations one after another, against the definition in float64."""
    before = copy.deepcopy(site.module.state_dict())
    sites = {pristine: copy.deepcopy(site) for pristine in Pristine}
    mergers = {
        pristine: Merger(module_of(own), {own.spec.name: own.spec}, scale=scale, pristine=pristine)
        for pristine, own in sites.items()
    }
    tolerance = TOLERANCES[site.module.weight.dtype]
    for adapter in versions:
        for pristine, own in sites.items():
            mergers[pristine].install(own.spec.name, mergers[pristine].publish(adapter))
            for name, wanted in definition(site, adapter, scale).items():
                found = own.module.get_parameter(name).double()
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        host, base = (own.module.state_dict() for own in sites.values())
        assert all(torch.equal(host[name], base[name]) for name in host)
    for pristine, own in sites.items():
        mergers[pristine].remove()
        after = own.module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def definition(site: tiny.Site, adapter: SiteAdapter, scale: float) -> dict[str, Tensor]:
    """W0 + scale * delta W, with the delta of every user formed as a matrix."""
    if isinstance(adapter, UserAdapters):
        shares, num = adapter.roster.shares().tolist(), len(adapter.roster)
        members: list[Adapter] = [adapter.member(position) for position in range(num)]
    else:
        shares, members = [1.0], [adapter]
    weight, bias = site.module.weight.double(), site.module.bias.double()
    for share, member in zip(shares, members, strict=True):
        single = require_mergeable(copy.deepcopy(member).double())
        weight = weight + scale * share * to_base_layout(single.delta_weight(), site.spec)
        delta_bias = single.delta_bias()
        bias = bias if delta_bias is None else bias + scale * share * delta_bias
    return {"weight": weight.detach(), "bias": bias.detach()}


@by_dtype
@by_name
@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.linear], ids=lambda k: k.name)
def test_weights_are_those_of_pristine_host(
    kind: AdapterKind, name: str, dtype: torch.dtype
) -> None:
    site = tiny.site(name, dtype=dtype)
    versions = [tiny.filled_adapter(kind, site.spec, seed=seed).to(dtype) for seed in range(3)]
    assert_merges_alike(site, list(versions), tiny.SCALE)


@by_dtype
@by_name
@by_reduction
@pytest.mark.parametrize("kinds", list(USERS))
def test_weights_of_all_users_are_those_of_pristine_host(
    kinds: str, reduction: Reduction, name: str, dtype: torch.dtype
) -> None:
    site = tiny.site(name, dtype=dtype)
    versions = [user_adapters(site, kinds, reduction, std=std) for std in (0.3, 0.1, 1.0)]
    assert_merges_alike(site, list(versions), 1.0)


@pytest.mark.parametrize("rounding", list(Rounding), ids=lambda rounding: rounding.name)
@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.linear], ids=lambda k: k.name)
@by_name
def test_bfloat16_is_rounded_alike_wherever_the_sum_is_made(
    name: str, kind: AdapterKind, rounding: Rounding
) -> None:
    found = []
    for pristine in Pristine:
        site = tiny.site(name, dtype=torch.bfloat16)
        base, specs = module_of(site), {name: site.spec}
        merger = Merger(base, specs, scale=tiny.SCALE, pristine=pristine, rounding=rounding)
        merger.install(name, merger.publish(tiny.filled_adapter(kind, site.spec).float()))
        found.append(site.module.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def wide_site(name: str) -> tiny.Site:
    """In bfloat16, larger than low-rank factors."""
    from transformers.pytorch_utils import Conv1D

    module: nn.Module = {
        "linear": lambda: nn.Linear(60, 40),
        "conv1d": lambda: Conv1D(40, 60),
        "conv2d": lambda: nn.Conv2d(20, 40, 3),
    }[name]()
    module.bfloat16().requires_grad_(False)
    return tiny.Site(module, describe_site(name, module), torch.zeros(1))


def num_bytes(published: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in published.values())


@pytest.mark.parametrize(("name", "inputs"), [("linear", 60), ("conv1d", 60), ("conv2d", 180)])
def test_factors_travel_instead_of_the_weight(name: str, inputs: int) -> None:
    site = wide_site(name)
    adapter = tiny.filled_adapter(AdapterKind.lowrank, site.spec).float()  # of rank 2
    merger = Merger(module_of(site), {name: site.spec}, scale=1.0, pristine=Pristine.base)
    published = merger.publish(adapter)
    assert num_bytes(published) == 4 * 2 * (40 + inputs)
    assert num_bytes(published) < site.module.weight.nbytes
    assert {tensor.dtype for tensor in published.values()} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in published.values())


def test_factors_of_all_users_travel_in_one() -> None:
    site = wide_site("linear")
    roster = users.roster(users.settings("lowrank:1", "lowrank:3", "lowrank:2:sgd"))
    adapter = users.filled(module_of(site), roster)["linear"].float()
    merger = Merger(module_of(site), {"linear": site.spec}, scale=1.0, pristine=Pristine.base)
    shapes = {name: tuple(tensor.shape) for name, tensor in merger.publish(adapter).items()}
    # The first two are one cohort, filled up to rank 3.
    assert shapes == {"left": (40, 3 + 3 + 2), "right": (3 + 3 + 2, 60)}


@pytest.mark.parametrize("kinds", [("lowrank:9",) * 3, ("lowrank:2", "linear"), ("linear",)])
def test_the_delta_travels_where_factors_are_no_smaller(kinds: tuple[str, ...]) -> None:
    site = wide_site("linear")
    adapter = users.filled(module_of(site), users.roster(users.settings(*kinds)))["linear"].float()
    merger = Merger(module_of(site), {"linear": site.spec}, scale=1.0, pristine=Pristine.base)
    published = merger.publish(adapter)
    assert published["left"].shape == (40, 60)
    assert "right" not in published


@pytest.mark.parametrize("name", ["linear", "conv1d"])
@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.linear], ids=lambda k: k.name)
def test_what_was_published_does_not_change_with_the_next_fit(kind: AdapterKind, name: str) -> None:
    site = tiny.site(name)
    adapter = tiny.filled_adapter(kind, site.spec)
    merger = Merger(module_of(site), {name: site.spec}, scale=1.0, pristine=Pristine.base)
    wanted = definition(site, copy.deepcopy(adapter), 1.0)
    published = merger.publish(adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(7.0)
    merger.install(name, published)
    for key, value in wanted.items():
        torch.testing.assert_close(site.module.get_parameter(key), value, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_collaboration_learns_the_same_wherever_the_sum_is_made(num_workers: int) -> None:
    base = tiny.net()
    roster = users.roster(users.settings(*USERS["ranks"]), Reduction.sum)
    start = users.filled(base, roster)
    stream = users.batches(base, [[0, 1, 2], [0, 0, 2], [1, 2, 2, 2]])
    wanted: dict[str, list[float]] = {}
    exported = []
    for pristine in Pristine:
        model = copy.deepcopy(base)
        learner = users.learner(
            model,
            copy.deepcopy(start),
            mode=MergeMode.merged,
            num_workers=num_workers,
            pristine=pristine,
        )
        wanted[pristine.name] = tiny.train(learner, stream)
        exported.append({user: learner.export(user) for user in roster.names})
        learner.close()
        assert all(map(torch.equal, model.state_dict().values(), base.state_dict().values()))
    assert wanted["host"] == pytest.approx(wanted["base"], rel=EXACT)
    for user in roster.names:
        for site in start:
            host, own = (tiny.flat(found[user][site]) for found in exported)
            torch.testing.assert_close(host, own, rtol=EXACT, atol=EXACT)
