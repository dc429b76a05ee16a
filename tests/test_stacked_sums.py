"""Merged weights of many sites by one product: rounded once, as one by one."""

import pytest
import torch
from torch import Tensor, nn

from cola.adapters import LowRankAdapter
from cola.config.choices import Pristine, Rounding
from cola.merging import Merger
from cola.sites import SiteName, describe_site
from cola.stacked_sums import WeightStack
from tests import tiny

SHAPES = {"q": (64, 48), "v": (64, 48), "up": (96, 48), "o": (64, 48)}


def base_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    modules = {
        name: nn.Linear(inputs, outputs, bias=False) for name, (outputs, inputs) in SHAPES.items()
    }
    return nn.ModuleDict(modules).bfloat16().requires_grad_(False)


def filled(base: nn.ModuleDict, *, rank: int = 3, seed: int = 1) -> dict[SiteName, LowRankAdapter]:
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, module in base.items():
        adapter = adapters[name] = LowRankAdapter(describe_site(name, module), rank)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapters


def merger(base: nn.ModuleDict, *, stacks: bool = True, **settings: Pristine | Rounding) -> Merger:
    specs = {name: describe_site(name, module) for name, module in base.items()}
    return Merger(base, specs, scale=tiny.SCALE, stacks=stacks, **settings)


def weights(base: nn.ModuleDict) -> dict[SiteName, Tensor]:
    return {name: module.weight.clone() for name, module in base.items()}


def wanted(base: nn.ModuleDict, adapters: dict[SiteName, LowRankAdapter]) -> dict[SiteName, Tensor]:
    """Summed in float64, rounded once."""
    sums = {}
    for name, module in base.items():
        b, a = adapters[name].lora_b.double(), adapters[name].lora_a.double()
        sums[name] = (module.weight.double() + tiny.SCALE * b @ a).detach().bfloat16()
    return sums


def test_stacked_weights_are_merged_as_exactly_as_one_by_one() -> None:
    base = base_model()
    adapters = filled(base)
    exact, before = wanted(base, adapters), weights(base)
    merging = merger(base)
    for _ in range(2):  # the second time with the stacks of the first
        merging.install_all(merging.publish_all(adapters))
        for name, weight in weights(base).items():
            assert weight.dtype is torch.bfloat16
            assert (weight == exact[name]).float().mean() > 0.999, name
            torch.testing.assert_close(weight, exact[name], rtol=2**-7, atol=1e-6)
    merging.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(base).items())


def test_stack_serves_the_sites_that_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model()
    adapters = filled(base)
    merging = merger(base)
    sizes: list[int] = []
    product = WeightStack.merged

    def counted(stack: WeightStack, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
        sizes.append(len(left))
        return product(stack, left, right, scale=scale)

    monkeypatch.setattr(WeightStack, "merged", counted)
    merging.publish_all(adapters)
    assert sizes == [3], "q, v and o; nothing has the shape of up"
    exact = wanted(base, adapters)
    some = {name: adapters[name] for name in ("o", "q")}  # one had no data, say
    merging.install_all(merging.publish_all(some))
    assert sizes == [3]
    found = weights(base)
    assert all((found[name] == exact[name]).float().mean() > 0.99 for name in some)
    merging.publish_all(adapters)
    assert sizes == [3, 3]


def test_lost_share_is_that_of_weights_merged_one_by_one() -> None:
    shares = []
    for stacks in (True, False):
        base = base_model()
        merging = merger(base, stacks=stacks)
        adapters = filled(base)
        with torch.no_grad():
            adapters["v"].lora_b *= 1e-2
            adapters["o"].lora_b[0] = 0.0  # moves nothing in this row
        merging.install_all(merging.publish_all(adapters))
        shares.append({name: share.item() for name, share in merging.lost_share.items()})
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert shares[0]["v"] > 2 * shares[0]["q"] > 0


@pytest.mark.parametrize(
    "settings",
    [{"pristine": Pristine.base}, {"rounding": Rounding.stochastic}],
    ids=["base", "stochastic"],
)
def test_what_a_product_cannot_do_is_merged_one_by_one(
    settings: dict[str, Pristine | Rounding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightStack, "merged", None)
    base = base_model()
    before, merging = weights(base), merger(base, **settings)
    merging.install_all(merging.publish_all(filled(base)))
    assert not any(torch.equal(weight, before[name]) for name, weight in weights(base).items())


def test_a_weight_that_is_stored_transposed_is_merged_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    modules = {name: Conv1D(48, 48) for name in ("q", "v")}  # square: only its kind tells
    base = nn.ModuleDict({**modules, "o": nn.Linear(48, 48)}).bfloat16().requires_grad_(False)
    adapters = filled(base)
    merging = merger(base)
    before = weights(base)
    merging.install_all(merging.publish_all(adapters))
    assert len(merging._stacks) == 1
    for name, weight in weights(base).items():
        delta = adapters[name].lora_b.double() @ adapters[name].lora_a.double()
        delta = delta if name == "o" else delta.T
        exact = (before[name].double() + tiny.SCALE * delta).detach().bfloat16()
        assert (weight == exact).float().mean() > 0.999, name
