"""Placements: merged weights are exact, restored bit for bit, and rounded as announced."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import LinearAdapter, MergeableAdapter, require_mergeable
from cola.bank import Bank
from cola.config.choices import AdapterKind, MergeMode, Pristine, Rounding
from cola.errors import MergeError
from cola.merging import Merger
from cola.sites import describe_site
from tests import tiny
from tests.tolerances import EXACT, FLOAT32

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# transformers' Conv1D always has a bias.
MODULES = [(name, bias) for name in ("linear", "conv2d", "strided") for bias in (True, False)]
MODULES.append(("conv1d", True))

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_module = pytest.mark.parametrize(("name", "bias"), MODULES)
by_kind = pytest.mark.parametrize(
    "kind", [AdapterKind.lowrank, AdapterKind.linear], ids=lambda kind: kind.name
)
by_pristine = pytest.mark.parametrize("pristine", list(Pristine), ids=lambda p: p.name)


def merger(site: tiny.Site, **settings: Pristine | Rounding) -> tuple[nn.Module, Merger]:
    base = nn.ModuleDict({site.spec.name: site.module})
    return base, Merger(base, {site.spec.name: site.spec}, scale=tiny.SCALE, **settings)


def master(kind: AdapterKind, site: tiny.Site, *, seed: int = 0) -> MergeableAdapter:
    """As workers hold it: float32 at least."""
    dtype = torch.promote_types(torch.float32, site.module.weight.dtype)
    return require_mergeable(tiny.filled_adapter(kind, site.spec, seed=seed).to(dtype))


def bits(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.named_parameters()))


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) and found[name].dtype is wanted[name].dtype
        for name in wanted
    )


@by_dtype
@by_kind
@by_module
@by_pristine
def test_merge_then_unmerge_restores_every_bit(
    pristine: Pristine, name: str, bias: bool, kind: AdapterKind, dtype: torch.dtype
) -> None:
    site = tiny.site(name, bias=bias, dtype=dtype)
    before = bits(site.module)
    weight = site.module.weight
    base, merging = merger(site, pristine=pristine)
    merging.install(name, merging.publish(master(kind, site)))
    assert not same_bits(bits(site.module), before)
    assert site.module.weight is weight, "views and ties of the parameter must live on"
    assert {p.dtype for p in base.parameters()} == {dtype}
    assert not any(p.requires_grad for p in base.parameters())
    assert site.module(site.hidden_input).isfinite().all()
    merging.remove()
    assert same_bits(bits(site.module), before)
    assert site.module.weight is weight


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@by_dtype
@by_pristine
def test_bias_appears_with_the_adapter_and_goes_with_it(
    pristine: Pristine, name: str, dtype: torch.dtype
) -> None:
    site = tiny.site(name, bias=False, dtype=dtype)
    adapter = master(AdapterKind.linear, site)
    _, merging = merger(site, pristine=pristine)
    for _ in range(2):
        merging.install(name, merging.publish(adapter))
        torch.testing.assert_close(site.module.bias, (tiny.SCALE * adapter.delta_bias()).to(dtype))
        merging.remove()
        assert site.module.bias is None


@pytest.mark.parametrize(("pristine", "num_rounds"), [(Pristine.host, 1000), (Pristine.base, 100)])
@by_dtype
@by_module
def test_a_thousand_refreshes_leave_the_bits_of_one(
    name: str, bias: bool, dtype: torch.dtype, pristine: Pristine, num_rounds: int
) -> None:
    site = tiny.site(name, bias=bias, dtype=dtype)
    first, second = (master(AdapterKind.linear, site, seed=seed) for seed in (0, 1))
    _, merging = merger(site, pristine=pristine)
    merging.install(name, merging.publish(first))
    once = bits(site.module)
    others = [merging.publish(adapter) for adapter in (second, first)]
    for round_ in range(num_rounds):
        merging.install(name, others[round_ % 2])
        if round_ % 100 == 99:  # published again from the pristine copy, not from what is there
            others = [merging.publish(adapter) for adapter in (second, first)]
    assert same_bits(bits(site.module), once)


@by_kind
@by_module
def test_merged_forward_equals_unmerged(name: str, bias: bool, kind: AdapterKind) -> None:
    site = tiny.site(name, bias=bias)
    adapter = master(kind, site)
    hidden = site.module(site.hidden_input)
    bank = Bank({name: adapter}, scale=tiny.SCALE, device=torch.device("cpu"), dtype=torch.float64)
    bank.install(name, bank.publish(adapter))
    wanted = bank.adapt(name, site.hidden_input, hidden.clone())  # may write into its memory
    torch.testing.assert_close(wanted, hidden + tiny.SCALE * adapter(site.hidden_input))
    _, merging = merger(site)
    merging.install(name, merging.publish(adapter))
    merged = site.module(site.hidden_input)
    assert torch.equal(merging.adapt(name, site.hidden_input, merged), merged)
    torch.testing.assert_close(merged, wanted, rtol=EXACT, atol=EXACT)


def wide_site(dtype: torch.dtype = torch.bfloat16) -> tiny.Site:
    """A weight with enough entries to count shares of."""
    module = nn.Linear(400, 300, bias=False)
    nn.init.normal_(module.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    module.to(dtype).requires_grad_(False)
    return tiny.Site(module, describe_site("wide", module), torch.zeros(1, 400, dtype=dtype))


def delta_of_relative_size(site: tiny.Site, ratio: float, *, seed: int = 0) -> LinearAdapter:
    adapter = LinearAdapter(site.spec)
    generator = torch.Generator().manual_seed(seed + 10)  # not the weight's
    with torch.no_grad():
        delta = adapter.weight.normal_(generator=generator)
        delta *= ratio * site.module.weight.float().norm() / (tiny.SCALE * delta.norm())
    return adapter


@pytest.mark.parametrize(
    ("ratio", "share"), [(1e-4, 0.98), (1e-3, 0.78), (1e-2, 0.17), (1e-1, 0.02)]
)
def test_lost_share_in_bfloat16_is_the_published_one(ratio: float, share: float) -> None:
    site = wide_site()
    pristine = site.module.weight.clone()
    _, merging = merger(site)
    merging.install("wide", merging.publish(delta_of_relative_size(site, ratio)))
    unchanged = (site.module.weight == pristine).float().mean().item()
    assert unchanged == pytest.approx(share, abs=0.02)
    assert merging.lost_share["wide"].item() == pytest.approx(unchanged, abs=0.005)  # a sample


@by_pristine
def test_lost_share_is_of_all_entries_of_a_small_weight(pristine: Pristine) -> None:
    site = tiny.site("linear", dtype=torch.bfloat16)
    before = site.module.weight.clone()
    _, merging = merger(site, pristine=pristine)
    assert merging.lost_share == {}, "nothing is merged yet"
    adapter = master(AdapterKind.linear, site)
    with torch.no_grad():
        adapter.weight.mul_(1e-2)
    merging.install("linear", merging.publish(adapter))
    lost = (site.module.weight == before).float().mean()
    assert 0 < lost < 1
    assert merging.lost_share["linear"] == lost
    with torch.no_grad():
        adapter.weight.zero_()
    merging.publish(adapter)  # not in use yet
    assert merging.lost_share["linear"] == lost
    merging.remove()
    assert merging.lost_share == {}


@by_pristine
def test_lost_share_reads_a_sample_of_a_large_weight(
    pristine: Pristine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola.rounding_loss.NUM_SAMPLED", 1000)  # two of 300 rows
    site = wide_site()
    _, merging = merger(site, pristine=pristine)
    merging.install("wide", merging.publish(delta_of_relative_size(site, 1e-3)))
    site.module.weight[1:150].fill_(9.0)  # no row of the sample
    assert merging.lost_share["wide"].item() == pytest.approx(0.78, abs=0.05)
    site.module.weight[150].fill_(9.0)
    assert merging.lost_share["wide"].item() == pytest.approx(0.39, abs=0.05)


def test_lost_share_counts_entries_of_the_delta_only() -> None:
    site = wide_site()
    adapter = delta_of_relative_size(site, 1e-1)
    with torch.no_grad():
        adapter.weight[10:] = 0.0
    _, merging = merger(site)
    merging.install("wide", merging.publish(adapter))
    assert merging.lost_share["wide"].item() < 0.05
    with torch.no_grad():
        adapter.weight.zero_()
    merging.install("wide", merging.publish(adapter))
    assert merging.lost_share["wide"].item() == 0.0


def test_nothing_is_lost_in_float32() -> None:
    site = wide_site(torch.float32)
    adapter = delta_of_relative_size(site, 1e-4)
    _, merging = merger(site, rounding=Rounding.stochastic)
    published = merging.publish(adapter)
    exact = site.module.weight.double() + tiny.SCALE * adapter.weight.double()
    torch.testing.assert_close(published["weight"].double(), exact, rtol=1.2e-7, atol=0)  # 1 ulp
    merging.install("wide", published)
    assert merging.lost_share == {}


def test_nearest_rounding_rounds_the_exact_sum_once() -> None:
    site = wide_site()
    adapter = delta_of_relative_size(site, 1e-2)
    _, merging = merger(site)
    exact = site.module.weight.double() + (tiny.SCALE * adapter.weight).double()
    published = merging.publish(adapter)["weight"]
    # Rounding the delta first would be off by up to one unit in the last place.
    assert (published == exact.float().bfloat16()).float().mean() == 1.0


def test_stochastic_rounding_repeats_itself_for_equal_input() -> None:
    site = wide_site()
    _, merging = merger(site, rounding=Rounding.stochastic)
    torch.manual_seed(1)
    first = merging.publish(delta_of_relative_size(site, 1e-3))["weight"]
    torch.manual_seed(2)
    assert torch.equal(first, merging.publish(delta_of_relative_size(site, 1e-3))["weight"])
    other = merging.publish(delta_of_relative_size(site, 1e-3, seed=1))["weight"]
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 50)], ids=str)
def test_stochastic_rounding_is_unbiased_over_many_deltas(shape: tuple[int, int]) -> None:
    num_rounds = 1500
    module = nn.Linear(shape[1], shape[0], bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # one binade, so that all entries share their unit in the last place
        module.weight.uniform_(1.2, 1.8, generator=generator)
    unit = 2.0**-7
    module.bfloat16().requires_grad_(False)
    site = tiny.Site(module, describe_site("site", module), torch.zeros(1))
    _, merging = merger(site, rounding=Rounding.stochastic)
    adapter = LinearAdapter(site.spec)
    total = torch.zeros(shape, dtype=torch.float64)
    for _ in range(num_rounds):
        with torch.no_grad():
            adapter.weight.uniform_(0.2 * unit, 0.3 * unit, generator=generator).div_(tiny.SCALE)
        exact = module.weight.double() + tiny.SCALE * adapter.weight.double()
        merged = merging.publish(adapter)["weight"].double()
        assert ((merged - exact).abs() <= unit).all()
        total += merged - exact
    # Up with probability 1/4: 0.43 units of spread per round. Nearest would be off by 0.25.
    spread = 0.434 * unit / num_rounds**0.5
    assert (total / num_rounds).abs().max() <= 5 * spread


def test_merging_an_mlp_adapter_is_refused() -> None:
    base = tiny.net()
    start = tiny.filled_adapters(base, AdapterKind.mlp)
    with pytest.raises(MergeError, match=r"site 'query' has an mlp adapter.*merge=unmerged"):
        tiny.gradient_learner(base, start, mode=MergeMode.merged)


@pytest.mark.parametrize("net", [tiny.TinyNet, tiny.TinyConv, tiny.CheckpointedNet])
@pytest.mark.parametrize("offload", ["none", "cpu"])
@by_pristine
@pytest.mark.parametrize("trains_merged", [False, True], ids=["unmerged", "merged"])
def test_evaluating_the_other_way_gives_equal_logits_and_restores_exactly(
    trains_merged: bool, pristine: Pristine, offload: str, net: type[nn.Module]
) -> None:
    modes = {False: MergeMode.unmerged, True: MergeMode.merged}
    base = tiny.net(net)
    start, stream = tiny.filled_adapters(base, AdapterKind.lowrank), tiny.batches(base, 4)
    answers, found = {}, {}
    for evaluates_merged in (trains_merged, not trains_merged):
        model = copy.deepcopy(base)
        learner = tiny.gradient_learner(
            model,
            start,
            mode=modes[trains_merged],
            evaluate_merged=evaluates_merged,
            offload=offload,
            pristine=pristine,
        )
        answers[evaluates_merged] = []
        for number, batch in enumerate(stream, start=1):
            tiny.adapt(learner, batch, number)
            before = bits(model)
            answers[evaluates_merged].append(tiny.logits(learner, stream[0]))
            # Merged training installs at the next forward pass, so before it weights are older.
            settled = bits(model)
            answers[evaluates_merged].append(tiny.logits(learner, batch))
            assert same_bits(bits(model), settled)
            assert trains_merged or same_bits(settled, before)
        found[evaluates_merged] = learner.export()
        learner.close()
        assert same_bits(bits(model), bits(base))
    for one, other in zip(answers[True], answers[False], strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    assert tiny.distance(found[True], found[False], start) <= EXACT


def test_float32_evaluation_merged_equals_unmerged_within_its_precision() -> None:
    base = tiny.net(dtype=torch.float32)
    start = tiny.filled_adapters(base, AdapterKind.lowrank)
    (batch,) = tiny.batches(base, 1, dtype=torch.float32)
    answers = []
    for evaluates_merged in (True, False):
        learner = tiny.gradient_learner(base, start, evaluate_merged=evaluates_merged)
        answers.append(tiny.logits(learner, batch))
        learner.close()
    torch.testing.assert_close(*answers, rtol=FLOAT32, atol=FLOAT32)


def test_snapshots_beside_the_sites_are_no_part_of_a_graph() -> None:
    site = tiny.site("linear")
    adapter = tiny.filled_adapter(AdapterKind.lowrank, site.spec).requires_grad_()
    bank = Bank(
        {site.spec.name: adapter}, scale=1.0, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    published = bank.publish(adapter)
    for name, parameter in adapter.named_parameters():
        assert torch.equal(published[name], parameter.detach().bfloat16())
        assert not published[name].requires_grad
