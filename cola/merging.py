"""Placements: adapters beside the sites (a bank), or inside their weights (a merger).

Paper: Algorithm 1, lines 3 and 8, and Proposition 2. A merged weight is always computed as
round(W0 + scale * delta W) from a pristine copy, never by adding to and subtracting from the weight
in use: that drifts, and in bfloat16 it loses most of a small delta.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cola.adapters import install_parameters, skeleton
from cola.config.choices import Pristine, Rounding
from cola.sites import SiteName, SiteSpec, to_base_layout
from cola.user_adapters import SiteAdapter, require_linear


class Bank:
    """Adapters on the base device, frozen: h + scale * g(x).

    The adapter's graph is kept, so that gradients of sites upstream flow through it. With
    `detached` they do not: an ablation whose gradients are wrong at sites with sites downstream.
    """

    def __init__(
        self,
        adapters: Mapping[SiteName, SiteAdapter],
        *,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        detached: bool = False,
        copies: bool = True,
    ) -> None:
        """Takes the structure of each adapter; parameters are those that get installed.

        Args:
            adapters: by site.
            scale: alpha; 1 for adapters of users, who have alphas of their own.
            device: of the base model.
            dtype: of the base model.
            detached: stop gradients at the adapters' outputs.
            copies: publish snapshots; False shares the fitted tensors, which is safe only when no
                fit runs beside the base model.
        """
        self._adapters = {site: skeleton(adapter) for site, adapter in adapters.items()}
        self._installed: dict[SiteName, Mapping[str, Tensor]] = {}
        self._shared: dict[SiteName, dict[str, Tensor]] = {}
        self._scale = scale
        self._device, self._dtype = device, dtype
        self._detached, self._copies = detached, copies

    def publish(self, adapter: SiteAdapter) -> dict[str, Tensor]:
        """The adapter's parameters in the base model's dtype."""
        site = adapter.spec.name
        if site in self._shared:  # the fitted tensors themselves, stepped in place
            return self._shared[site]
        published = {
            name: parameter.detach().to(self._dtype, copy=self._copies)
            for name, parameter in adapter.named_parameters()
        }
        if not self._copies and next(adapter.parameters()).dtype is self._dtype:
            self._shared[site] = published
        return published

    def install(self, site: SiteName, published: Mapping[str, Tensor]) -> None:
        """Uses these parameters from now on."""
        if self._installed.get(site) is published:
            return
        self._installed[site] = published
        state = {name: t.to(self._device, non_blocking=True) for name, t in published.items()}
        install_parameters(self._adapters[site], state)

    def adapt(self, site: SiteName, hidden_input: Tensor, hidden: Tensor) -> Tensor:
        """Adapted hidden representation, (..., H)."""
        if self._detached:
            with torch.no_grad():
                delta = self._adapters[site](hidden_input)
        else:
            delta = self._adapters[site](hidden_input)
        return torch.add(hidden, delta, alpha=self._scale)

    def remove(self) -> None:
        """The base model was never touched."""


@dataclass(frozen=True)
class _Site:
    """A merged site and its weights as they were found."""

    spec: SiteSpec
    module: nn.Module
    weight: Tensor
    bias: Tensor | None


class Merger:
    """Adapters inside the sites' weights: no adapter on the base device, memory independent of it.

    `lost_share` is, for low-precision weights, the share of delta W's entries that rounding
    swallowed in the last merge (the merged entry equals the pristine one), by site.
    """

    def __init__(
        self,
        base_model: nn.Module,
        sites: Mapping[SiteName, SiteSpec],
        *,
        scale: float,
        pristine: Pristine = Pristine.host,
        rounding: Rounding = Rounding.nearest,
    ) -> None:
        self._scale = scale
        self._rounding = rounding
        self.lost_share: dict[SiteName, Tensor] = {}
        self._sites: dict[SiteName, _Site] = {}
        for name, spec in sites.items():
            module = base_model.get_submodule(name)
            weight = module.get_parameter("weight")
            keep = torch.device("cpu") if pristine is Pristine.host else weight.device
            bias = getattr(module, "bias", None)
            self._sites[name] = _Site(
                spec,
                module,
                weight.detach().to(keep, copy=True),
                None if bias is None else bias.detach().to(keep, copy=True),
            )

    @torch.no_grad()
    def publish(self, adapter: SiteAdapter) -> dict[str, Tensor]:
        """The site's merged weight, and its bias if the adapter has one, in the base dtype."""
        adapter = require_linear(adapter)
        site = self._sites[adapter.spec.name]
        delta = to_base_layout(adapter.delta_weight(), site.spec)
        published = {"weight": self._merge(site.weight, delta, adapter.spec.name)}
        delta_bias = adapter.delta_bias()
        if delta_bias is not None:
            none = torch.zeros_like(delta_bias, dtype=site.weight.dtype)
            bias = none if site.bias is None else site.bias
            published["bias"] = self._merge(bias, delta_bias, None)
        return published

    @torch.no_grad()
    def install(self, site: SiteName, published: Mapping[str, Tensor]) -> None:
        """Copies merged weights into the base model, in place: views keep their parameter."""
        module = self._sites[site].module
        for name, tensor in published.items():
            parameter = getattr(module, name)
            if parameter is None:
                weight = module.get_parameter("weight")
                parameter = nn.Parameter(torch.empty_like(tensor, device=weight.device), False)
                module.register_parameter(name, parameter)
            parameter.copy_(tensor, non_blocking=True)

    def adapt(self, site: SiteName, hidden_input: Tensor, hidden: Tensor) -> Tensor:
        """The weight holds the adapter already."""
        return hidden

    @torch.no_grad()
    def remove(self) -> None:
        """Restores every weight bit for bit."""
        for site in self._sites.values():
            site.module.get_parameter("weight").copy_(site.weight)
            if site.bias is not None:
                site.module.get_parameter("bias").copy_(site.bias)
            elif getattr(site.module, "bias", None) is not None:
                site.module.register_parameter("bias", None)

    def _merge(self, weight: Tensor, delta: Tensor, site: SiteName | None) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(torch.float32, weight.dtype), delta.dtype)
        wide = weight.to(delta.device, dtype)
        delta = delta.to(dtype)
        exact = torch.add(wide, delta, alpha=self._scale)
        if weight.dtype is dtype:
            return exact
        is_stochastic = self._rounding is Rounding.stochastic and weight.dtype is torch.bfloat16
        merged = _round_stochastically(exact) if is_stochastic else exact.to(weight.dtype)
        if site is not None:
            lost = (merged.to(dtype) == wide) & (delta != 0)
            self.lost_share[site] = lost.sum() / (delta != 0).sum().clamp(min=1)
        return merged


def _round_stochastically(exact: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with probabilities that make the mean exact.

    bfloat16 is the upper half of float32: adding 16 random bits below it and cutting them off
    carries with just the right probability. The noise is seeded by the values themselves, so that
    a resumed run rounds alike without a generator to save.
    """
    bits = int(exact.sum(dtype=torch.float64).view(torch.int64))
    # A generator reads 32 bits of its seed, and the low ones of a short sum are all zero.
    generator = torch.Generator().manual_seed((bits ^ bits >> 32) & 0xFFFFFFFF)
    noise = torch.randint(0, 1 << 16, exact.shape, generator=generator, dtype=torch.int32)
    rounded = exact.float().view(torch.int32) + noise.to(exact.device)
    return (rounded & -65536).view(torch.float32).to(torch.bfloat16)
