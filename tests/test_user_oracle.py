"""The oracle of several users against plainer things: models apart, and merged weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cola.adapters import Adapter, LinearAdapter, LowRankAdapter
from cola.config.choices import AdapterKind, Reduction, UserGradient, UsersMode
from cola.oracle import attach_trainable, attach_users
from cola.sites import SiteName, SiteSpec, to_base_layout
from tests import tiny
from tests.tolerances import EXACT

SCALES = [0.7, 1.3, 0.4]
OWNERS = torch.tensor([2, 0, 1, 1, 0, 2, 0])  # of rows that are not grouped
NETS = {"net": tiny.TinyNet, "conv": tiny.TinyConv}

by_net = pytest.mark.parametrize("net", NETS)
by_detached = pytest.mark.parametrize("detached", [False, True], ids=["exact", "detached"])
by_reduction = pytest.mark.parametrize("reduction", list(Reduction), ids=lambda r: r.name)


def build(net: str) -> nn.Module:
    return tiny.net(NETS[net]).eval()  # statistics of BatchNorm would tie rows together


def users_of(model: nn.Module, *kinds: AdapterKind) -> dict[SiteName, list[Adapter]]:
    """Different adapters for every user."""
    own = [tiny.filled_adapters(model, kind, seed=seed) for seed, kind in enumerate(kinds)]
    return {site: [adapters[site] for adapters in own] for site in own[0]}


MIXED = (AdapterKind.lowrank, AdapterKind.mlp, AdapterKind.linear)
LINEAR = (AdapterKind.lowrank, AdapterKind.linear, AdapterKind.lowrank)


def rows_of(model: nn.Module) -> Tensor:
    shape = (2, 5, 5) if isinstance(model, tiny.TinyConv) else (4, 6)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(OWNERS), *shape, generator=generator, dtype=torch.float64)


def losses(logits: Tensor) -> Tensor:
    """(B,), each of its own row alone."""
    targets = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits - targets).square().sum(dim=1)


def run(model: nn.Module, features: Tensor, parameters: Mapping[str, nn.Parameter]) -> Any:
    """Logits, and the gradient of the summed losses by name."""
    logits = model(features).logits
    gradients = torch.autograd.grad(losses(logits).sum(), list(parameters.values()))
    return logits.detach(), dict(zip(parameters, gradients, strict=True))


def oracle(
    model: nn.Module, adapters: dict[SiteName, list[Adapter]], mode: UsersMode, **settings: Any
) -> Any:
    parameters, remove = attach_users(
        model,
        adapters,
        lambda: OWNERS,
        scales=SCALES[: len(adapters["head"])],
        mode=mode,
        **settings,
    )
    found = run(model, rows_of(model), parameters)
    remove()
    return found


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.norm() > 0, f"{name}: the comparison would say nothing"
        assert (found[name] - value).norm() <= EXACT * value.norm(), name


@by_detached
@by_net
def test_users_alone_equal_models_of_their_own(net: str, detached: bool) -> None:
    model = build(net)
    adapters = users_of(model, *MIXED)
    logits, gradients = oracle(model, adapters, UsersMode.alone, detached=detached)
    wanted = {}
    for user, scale in enumerate(SCALES):
        own = {site: several[user] for site, several in adapters.items()}
        single = copy.deepcopy(model)
        parameters, _ = attach_trainable(single, own, scale=scale, detached=detached)
        # Losses compare rows with their targets by position: the others' rows stay, uncounted.
        is_own = OWNERS.eq(user)
        found = single(rows_of(model)).logits
        torch.testing.assert_close(logits[is_own], found[is_own].detach(), rtol=EXACT, atol=EXACT)
        loss = losses(found)[is_own].sum()
        for name, gradient in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            site, leaf = split(name, adapters)
            wanted[f"{site}.{user}.{leaf}"] = gradient
    assert_equal(gradients, wanted)


def split(name: str, adapters: Mapping[SiteName, Any]) -> tuple[SiteName, str]:
    site = next(site for site in adapters if name.startswith(f"{site}."))
    return site, name[len(site) + 1 :]


class Merged:
    """The model with all adapters inside its weights: W0 + sum of weight * delta weight."""

    def __init__(
        self, model: nn.Module, adapters: dict[SiteName, list[Adapter]], weights: Sequence[float]
    ) -> None:
        self.model, self.adapters, self.weights = model, adapters, weights
        self.specs: dict[SiteName, SiteSpec] = tiny.specs(model)

    def parameters(self) -> dict[str, Tensor]:
        """Base parameters by name, attached to the adapters."""
        merged = dict(self.model.named_parameters())
        for site, own in self.adapters.items():
            for weight, adapter in zip(self.weights, own, strict=True):
                for name, delta in self.deltas(site, adapter).items():
                    merged[name] = merged[name] + weight * delta
        return merged

    def deltas(self, site: SiteName, adapter: Adapter) -> dict[str, Tensor]:
        assert isinstance(adapter, LowRankAdapter | LinearAdapter)
        found = {f"{site}.weight": to_base_layout(adapter.delta_weight(), self.specs[site])}
        bias = adapter.delta_bias()
        return found if bias is None else {**found, f"{site}.bias": bias}

    def logits(self, parameters: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(self.model, parameters, (rows_of(self.model),)).logits
        return result

    def adapter_gradients(self, loss: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """By parameter, each user's own loss."""
        found = {}
        for site, own in self.adapters.items():
            for user, adapter in enumerate(own):
                names, parameters = zip(*adapter.named_parameters(), strict=True)
                gradients = torch.autograd.grad(loss(user), parameters)
                for name, gradient in zip(names, gradients, strict=True):
                    found[f"{site}.{user}.{name}"] = gradient
        return found


def weights_of(reduction: Reduction, num: int = len(SCALES)) -> list[float]:
    return [scale / num if reduction is Reduction.mean else scale for scale in SCALES[:num]]


@by_reduction
@by_net
def test_exact_collaboration_equals_autograd_through_merged_weights(
    net: str, reduction: Reduction
) -> None:
    model = build(net)
    adapters = users_of(model, *LINEAR)
    logits, gradients = oracle(
        model,
        adapters,
        UsersMode.collaboration,
        gradient=UserGradient.exact,
        reduction=reduction,
    )
    merged = Merged(model, adapters, weights_of(reduction))
    torch.testing.assert_close(
        logits, merged.logits(merged.parameters()).detach(), rtol=EXACT, atol=EXACT
    )
    wanted = merged.adapter_gradients(lambda user: losses(merged.logits(merged.parameters())).sum())
    assert_equal(gradients, wanted)


@by_reduction
@by_net
def test_federated_users_learn_from_the_merged_weights_gradient_of_their_rows(
    net: str, reduction: Reduction
) -> None:
    model = build(net)
    adapters = users_of(model, *LINEAR)
    logits, gradients = oracle(model, adapters, UsersMode.collaboration, reduction=reduction)
    merged = Merged(model, adapters, weights_of(reduction))
    weights = {name: w.detach().requires_grad_() for name, w in merged.parameters().items()}
    torch.testing.assert_close(logits, merged.logits(weights).detach(), rtol=EXACT, atol=EXACT)
    by_row = losses(merged.logits(weights))

    def taught(user: int) -> Tensor:
        """<gradient of the user's rows by the merged weight, alpha * delta weight>."""
        own = torch.autograd.grad(
            by_row[OWNERS.eq(user)].sum(),
            list(weights.values()),
            retain_graph=True,
            allow_unused=True,
        )
        gradient = dict(zip(weights, own, strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for site, several in adapters.items():
            for name, delta in merged.deltas(site, several[user]).items():
                total = total + SCALES[user] * (gradient[name] * delta).sum()
        return total

    assert_equal(gradients, merged.adapter_gradients(taught))


@by_detached
@pytest.mark.parametrize("gradient", list(UserGradient), ids=lambda g: g.name)
@pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda k: k.name)
def test_a_single_collaborator_equals_the_oracle_of_one(
    kind: AdapterKind, gradient: UserGradient, detached: bool
) -> None:
    model = build("net")
    adapters = {site: own[:1] for site, own in users_of(model, kind).items()}
    everyone = torch.zeros_like(OWNERS)
    parameters, remove = attach_users(
        model,
        adapters,
        lambda: everyone,
        scales=[0.7],
        mode=UsersMode.collaboration,
        gradient=gradient,
        detached=detached,
    )
    logits, gradients = run(model, rows_of(model), parameters)
    remove()
    single = {site: own[0] for site, own in adapters.items()}
    parameters, _ = attach_trainable(model, single, scale=0.7, detached=detached)
    wanted_logits, wanted = run(model, rows_of(model), parameters)
    torch.testing.assert_close(logits, wanted_logits, rtol=EXACT, atol=EXACT)
    assert_equal(dict(zip(wanted, gradients.values(), strict=True)), wanted)


@pytest.mark.parametrize("gradient", list(UserGradient), ids=lambda g: g.name)
def test_an_inactive_user_neither_counts_nor_learns(gradient: UserGradient) -> None:
    model = build("net")
    adapters = users_of(model, *MIXED)
    owners = torch.tensor([1, 0, 1, 1, 0, 0, 0])
    results = []
    for num, active in ((3, lambda: [True, True, False]), (2, None)):
        parameters, remove = attach_users(
            model,
            {site: own[:num] for site, own in adapters.items()},
            lambda: owners,
            scales=SCALES[:num],
            mode=UsersMode.collaboration,
            gradient=gradient,
            active=active,
        )
        logits = model(rows_of(model)).logits
        losses(logits).sum().backward()
        results.append((logits, {name: p.grad for name, p in parameters.items()}))
        for parameter in parameters.values():
            parameter.grad = None
        remove()
    (logits, found), (wanted_logits, wanted) = results
    assert torch.equal(logits, wanted_logits)
    assert_equal({name: found[name] for name in wanted}, wanted)
    assert all(found[name] is None for name in found.keys() - wanted.keys())


def test_nobody_active_leaves_the_base_model() -> None:
    model = build("net")
    before = model(rows_of(model)).logits
    attach_users(
        model,
        users_of(model, *LINEAR),
        lambda: OWNERS,
        scales=SCALES,
        mode=UsersMode.collaboration,
        active=lambda: [False] * 3,
    )
    assert torch.equal(model(rows_of(model)).logits, before)


class Beams(nn.Module):
    """Every row becomes two, and its tokens rows of their own: the site sees (B * 2 * T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        beams = features.repeat_interleave(2, dim=0)
        return self.head(beams.flatten(0, 1)).unflatten(0, beams.shape[:2])


def test_rows_repeated_by_beams_keep_their_owner() -> None:
    torch.manual_seed(0)
    model = Beams().double().requires_grad_(False)
    adapters = users_of(model, *MIXED)
    features = torch.randn(len(OWNERS), 4, 6, dtype=torch.float64)
    plain = model(features)
    attach_users(model, adapters, lambda: OWNERS, scales=SCALES, mode=UsersMode.alone)
    found = model(features) - plain
    for row, user in enumerate(OWNERS.tolist()):
        wanted = SCALES[user] * adapters["head"][user](features[row])  # (T, H)
        for beam in (2 * row, 2 * row + 1):
            torch.testing.assert_close(found[beam], wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("mode", [UsersMode.alone, UsersMode.collaboration], ids=lambda m: m.name)
def test_owners_are_asked_at_every_batch(mode: UsersMode) -> None:
    model = build("net")
    current = [OWNERS]
    parameters, _ = attach_users(
        model, users_of(model, *LINEAR), lambda: current[0], scales=SCALES, mode=mode
    )
    _, first = run(model, rows_of(model), parameters)
    current[0] = OWNERS.flip(0)
    _, other = run(model, rows_of(model), parameters)
    current[0] = OWNERS
    _, again = run(model, rows_of(model), parameters)
    assert_equal(again, first)
    assert not torch.allclose(other["head.0.lora_a"], first["head.0.lora_a"])


def test_removing_leaves_the_base_model() -> None:
    model = build("net")
    before = model(rows_of(model)).logits
    oracle(model, users_of(model, *MIXED), UsersMode.alone)
    assert torch.equal(model(rows_of(model)).logits, before)
