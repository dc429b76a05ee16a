"""Proposition 1: what is fitted from (x, hidden gradient) is the gradient of the task loss."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola.adaptation_data import AdaptationData, concatenate
from cola.adapters import Adapter
from cola.config.choices import AdapterKind
from cola.gradient_learning import adapter_gradients, surrogate_gradients, surrogate_loss
from cola.sites import flatten_rows
from tests import tiny
from tests.tolerances import EXACT, FLOAT32

ROUTES = {"cheapest": adapter_gradients, "surrogate": surrogate_gradients}

by_kind = pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda kind: kind.name)
by_site = pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "strided"])
by_route = pytest.mark.parametrize("route", ROUTES)


def gradient_like(hidden: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def case(name: str, kind: AdapterKind, seed: int = 0) -> tuple[Adapter, AdaptationData]:
    site = tiny.site(name)
    adapter = tiny.filled_adapter(kind, site.spec)
    gradient = gradient_like(site.module(site.hidden_input), seed)
    return adapter, AdaptationData(hidden_input=site.hidden_input, hidden_gradient=gradient)


def true_gradients(adapter: Adapter, data: AdaptationData, scale: float) -> dict[str, Tensor]:
    """Of a loss whose gradient by the adapted hidden representation is the data's."""
    loss = (scale * adapter(data.hidden_input) * data.hidden_gradient).sum()
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@by_route
@by_kind
@by_site
def test_every_route_equals_autograd(name: str, kind: AdapterKind, route: str) -> None:
    adapter, data = case(name, kind)
    found = ROUTES[route](adapter, data, tiny.SCALE)
    wanted = true_gradients(adapter, data, tiny.SCALE)
    assert found.keys() == wanted.keys()
    assert all(found[key].shape == wanted[key].shape for key in wanted)
    assert error(flat(found), flat(wanted)) <= EXACT
    assert not any(gradient.requires_grad for gradient in found.values())
    assert all(parameter.grad is None for parameter in adapter.parameters())


class Fitted(torch.autograd.Function):
    """scale * g(x) summed against constants; its backward is the package's own gradient."""

    @staticmethod
    def forward(ctx: Any, adapter: Adapter, data: AdaptationData, *parameters: Tensor) -> Tensor:
        ctx.gradients = list(adapter_gradients(adapter, data, tiny.SCALE).values())
        return (tiny.SCALE * adapter(data.hidden_input) * data.hidden_gradient).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(gradients[0] * gradient for gradient in ctx.gradients))


@by_kind
@by_site
def test_fitted_gradient_equals_finite_differences(name: str, kind: AdapterKind) -> None:
    adapter, data = case(name, kind)
    assert torch.autograd.gradcheck(
        lambda *parameters: Fitted.apply(adapter, data, *parameters), tuple(adapter.parameters())
    )


def test_surrogate_loss_is_half_the_squared_gradient_summed_over_rows() -> None:
    output = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gradient = gradient_like(output)
    loss = surrogate_loss(output, gradient)
    torch.testing.assert_close(loss, 0.5 * gradient.square().sum())
    loss.backward()
    assert torch.equal(output.grad, gradient)


def test_surrogate_gradients_work_with_gradients_disabled_around_them() -> None:
    adapter, data = case("linear", AdapterKind.mlp)
    with torch.no_grad():  # as a worker calls it, whatever the caller's mode
        found = surrogate_gradients(adapter, data, tiny.SCALE)
    assert error(flat(found), flat(true_gradients(adapter, data, tiny.SCALE))) <= EXACT


@by_kind
@by_site
def test_doubling_the_rows_doubles_the_gradient(name: str, kind: AdapterKind) -> None:
    adapter, data = case(name, kind)
    once = flat(adapter_gradients(adapter, data, tiny.SCALE))
    twice = flat(adapter_gradients(adapter, concatenate([data, data]), tiny.SCALE))
    assert error(twice, 2 * once) <= EXACT


@by_route
@by_kind
@by_site
def test_alpha_scales_the_gradient(name: str, kind: AdapterKind, route: str) -> None:
    adapter, data = case(name, kind)
    one = flat(ROUTES[route](adapter, data, 1.0))
    assert error(flat(ROUTES[route](adapter, data, 0.25)), 0.25 * one) <= EXACT


@by_kind
@by_site
def test_accumulating_batches_equals_buffering_them(name: str, kind: AdapterKind) -> None:
    adapter, first = case(name, kind)
    _, second = case(name, kind, seed=1)
    second = AdaptationData(
        hidden_input=second.hidden_input[:1], hidden_gradient=second.hidden_gradient[:1]
    )
    buffered = adapter_gradients(adapter, concatenate([first, second]), tiny.SCALE)
    parts = [flat(adapter_gradients(adapter, data, tiny.SCALE)) for data in (first, second)]
    assert error(parts[0] + parts[1], flat(buffered)) <= EXACT


def test_rows_of_tokens_are_flattened_and_images_are_not() -> None:
    linear, conv = tiny.site("linear").spec, tiny.site("conv2d").spec
    assert flatten_rows(torch.zeros(2, 3, 5), linear).shape == (6, 5)
    assert flatten_rows(torch.zeros(2, 3, 4, 4), conv).shape == (2, 3, 4, 4)


def single(adapter: Adapter, data: AdaptationData) -> tuple[Adapter, AdaptationData]:
    return adapter.float(), data.to(torch.float32)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    exponent=st.floats(-8, 2),
    kind=st.sampled_from(list(AdapterKind)),
    name=st.sampled_from(["linear", "conv1d", "conv2d"]),
    route=st.sampled_from(list(ROUTES)),
)
def test_float32_gradient_is_accurate_at_every_scale(
    exponent: float, kind: AdapterKind, name: str, route: str
) -> None:
    adapter, data = case(name, kind)
    data = AdaptationData(
        hidden_input=data.hidden_input, hidden_gradient=10.0**exponent * data.hidden_gradient
    )
    wanted = flat(true_gradients(adapter, data, tiny.SCALE))
    found = flat(ROUTES[route](*single(adapter, data), tiny.SCALE))
    assert error(found, wanted) <= FLOAT32


@pytest.mark.parametrize(("size", "least"), [(1e-6, 3e-3), (1e-8, 0.3)])
@by_kind
def test_the_target_of_equation_6_would_lose_a_small_gradient(
    kind: AdapterKind, size: float, least: float
) -> None:
    adapter, data = case("linear", kind)
    data = AdaptationData(
        hidden_input=data.hidden_input, hidden_gradient=size * data.hidden_gradient
    )
    wanted = flat(true_gradients(adapter, data, tiny.SCALE))
    adapter, data = single(adapter, data)
    output = tiny.SCALE * adapter(data.hidden_input)
    target = output.detach() - data.hidden_gradient
    (0.5 * (output - target).square().sum()).backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    assert error(flat(gradients), wanted) >= least
