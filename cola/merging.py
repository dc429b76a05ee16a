"""The merged placement: adapters inside the sites' weights.

Paper: Algorithm 1, lines 3 and 8, and Proposition 2. A merged weight is always computed as
round(W0 + scale * delta W) from a pristine copy, never by adding to and subtracting from the weight
in use: that drifts, and in bfloat16 it loses most of a small delta.

Where the pristine copy lies decides what travels. On the host, the sum is made where adapters are
fitted, and the merged weight comes back in the base model's dtype. On the base device, the sum is
made there, and only what is added comes back, in the dtype of the fits: the factors of low-rank
adapters, or the delta weight where those would be no smaller, or where there are none.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cola.adapters import LowRankAdapter, MergeableAdapter
from cola.config.choices import Pristine, Rounding
from cola.rounded_sums import Update, add_rounded
from cola.rounding_loss import RoundingLoss
from cola.sites import SiteKind, SiteName, SiteSpec, to_base_layout
from cola.stacked_sums import WeightStack, factors
from cola.user_adapters import SiteAdapter, UserAdapters, require_linear


@dataclass(frozen=True)
class _Site:
    """A merged site and its weights as they were found."""

    spec: SiteSpec
    module: nn.Module
    weight: Tensor
    bias: Tensor | None


class Merger:
    """Adapters inside the sites' weights: no adapter on the base device, memory independent of it.

    With the pristine weights on the base device, an install also takes the factors of one site, or
    a block of its delta weight's rows, and the block that they are summed in (`rounded_sums`).
    """

    def __init__(
        self,
        base_model: nn.Module,
        sites: Mapping[SiteName, SiteSpec],
        *,
        scale: float,
        pristine: Pristine = Pristine.host,
        rounding: Rounding = Rounding.nearest,
        homes: Mapping[SiteName, torch.device] | None = None,
        stacks: bool | None = None,
    ) -> None:
        """Copies the weights as they are.

        Args:
            base_model: on its device.
            sites: to merge into.
            scale: alpha; 1 for adapters of users, who have alphas of their own.
            pristine: where the copies lie.
            rounding: of the sums.
            homes: where `pristine=host` lies, by site: the device that fits; None: the host.
            stacks: whether low-rank adapters that are published together are merged into bfloat16
                weights of one shape by one product; None: on a GPU that fits them.
        """
        self._scale = scale
        self._rounding = rounding
        self._adds_on_base = pristine is Pristine.base
        self._loss = RoundingLoss()
        self._may_stack = stacks
        self._stacks: dict[tuple[SiteName, ...], WeightStack] = {}
        self._unstacked = set(sites)
        self._sites: dict[SiteName, _Site] = {}
        self._fits_on: dict[SiteName, torch.device] = {}
        for name, spec in sites.items():
            module = base_model.get_submodule(name)
            weight = module.get_parameter("weight")
            self._fits_on[name] = weight.device if homes is None else homes[name]
            home = torch.device("cpu") if homes is None else homes[name]
            keep = weight.device if self._adds_on_base else home
            bias = getattr(module, "bias", None)
            copied = weight.detach().to(keep, copy=True)
            if homes is None and keep.type == "cpu" and weight.is_cuda:
                copied = copied.pin_memory()  # every merge on the base device reads it from here
            self._sites[name] = _Site(
                spec,
                module,
                copied,
                None if bias is None else bias.detach().to(keep, copy=True),
            )

    @property
    def held_bytes(self) -> dict[torch.device, dict[str, int]]:
        """By device: the weights as they were found, and merged ones until the base has them."""
        held: defaultdict[torch.device, dict[str, int]] = defaultdict(Counter)
        for name, site in self._sites.items():
            num = site.weight.nbytes + (0 if site.bias is None else site.bias.nbytes)
            held[site.weight.device]["pristine"] += num
            if not self._adds_on_base:
                held[self._fits_on[name]]["merged"] += num
        return dict(held)

    @property
    def lost_share(self) -> dict[SiteName, Tensor]:
        """What rounding swallowed of the weights in use, by site, for low-precision weights.

        The share of delta W's entries whose merged entry equals the pristine one, in a fixed sample
        of rows; in all of them for weights of at most `NUM_SAMPLED` entries. Computed when it is
        asked for: the base device is waited for.
        """
        merged = {name: self._sites[name] for name in self._loss.sites}
        return {
            name: self._loss.share(name, site.weight, site.module.get_parameter("weight").detach())
            for name, site in merged.items()
        }

    @torch.no_grad()
    def publish(self, adapter: SiteAdapter) -> dict[str, Tensor]:
        """The site's merged weight, or what `install` makes it from; its bias if it changes."""
        adapter = require_linear(adapter)
        site = self._sites[adapter.spec.name]
        update, delta_bias = _update_of(adapter), adapter.delta_bias()
        self._loss.publish(site.spec.name, site.weight, update)
        if self._adds_on_base:
            return _snapshot(adapter, update, delta_bias)
        home = update.left.device
        # Pinned memory is what the base device fetches from fast.
        pinned = home.type == "cpu" and site.module.get_parameter("weight").is_cuda
        published = {"weight": torch.empty_like(site.weight, device=home, pin_memory=pinned)}
        if delta_bias is not None:
            published["bias"] = torch.empty_like(delta_bias, dtype=site.weight.dtype)
        self._add(site, update, delta_bias, published)
        return published

    def publish_all(
        self, adapters: Mapping[SiteName, SiteAdapter]
    ) -> dict[SiteName, Mapping[str, Tensor]]:
        """The same for several sites."""
        published: dict[SiteName, Mapping[str, Tensor]] = {}
        for sites, stack in self._stacked(adapters):
            if stack is None:
                published.update((site, self.publish(adapters[site])) for site in sites)
            else:
                published.update(self._publish_stack(stack, {s: adapters[s] for s in sites}))
        return published

    @torch.no_grad()
    def install(self, site: SiteName, published: Mapping[str, Tensor]) -> None:
        """Writes merged weights into the base model, in place: views keep their parameter."""
        merged = self._sites[site]
        if self._adds_on_base:
            update = Update(published["left"], published.get("right"))
            delta_bias = published.get("delta_bias")
            self._add(merged, update, delta_bias, _parameters(merged.module, delta_bias))
            self._loss.install(site)
        else:
            self.install_all({site: published})

    @torch.no_grad()
    def install_all(self, published: Mapping[SiteName, Mapping[str, Tensor]]) -> None:
        """The same for several sites."""
        if self._adds_on_base:
            for site, tensors in published.items():
                self.install(site, tensors)
            return
        into: list[Tensor] = []
        out_of: list[Tensor] = []
        for site, tensors in published.items():
            parameters = _parameters(self._sites[site].module, tensors.get("bias"))
            into += [parameters[name] for name in tensors]
            out_of += tensors.values()
            self._loss.install(site)
        if into:  # by one call: a launch each would keep the host busy for longer
            torch._foreach_copy_(into, out_of, non_blocking=True)

    def adapt(self, site: SiteName, hidden_input: Tensor, hidden: Tensor) -> Tensor:
        """The weight holds the adapter already."""
        return hidden

    @torch.no_grad()
    def remove(self) -> None:
        """Restores every weight bit for bit."""
        self._loss.forget()
        for site in self._sites.values():
            site.module.get_parameter("weight").copy_(site.weight)
            if site.bias is not None:
                site.module.get_parameter("bias").copy_(site.bias)
            elif getattr(site.module, "bias", None) is not None:
                site.module.register_parameter("bias", None)

    def _stacked(
        self, adapters: Mapping[SiteName, SiteAdapter]
    ) -> list[tuple[tuple[SiteName, ...], WeightStack | None]]:
        """Sites, those whose weights are merged by one product together and with their stack."""
        alike: dict[object, list[SiteName]] = {}
        for name, adapter in adapters.items():
            weight = self._sites[name].weight
            key: object = name
            if isinstance(adapter, LowRankAdapter) and self._is_stackable(adapter, weight):
                key = (weight.shape, adapter.lora_a.shape)
            alike.setdefault(key, []).append(name)
        return [(names, self._stack(names)) for names in map(tuple, alike.values())]

    def _is_stackable(self, adapter: LowRankAdapter, weight: Tensor) -> bool:
        may = weight.is_cuda if self._may_stack is None else self._may_stack
        is_plain = not self._adds_on_base and self._rounding is Rounding.nearest
        fits = weight.dtype is torch.bfloat16 and adapter.lora_a.dtype is torch.float32
        is_product = adapter.lora_a.numel() + adapter.lora_b.numel() < weight.numel()
        return may and is_plain and fits and is_product and weight.dim() == 2

    def _stack(self, names: tuple[SiteName, ...]) -> WeightStack | None:
        """The stack of these sites, made when they come together first; None: one by one."""
        found = self._stacks.get(names)
        if found is not None or len(names) == 1 or not self._unstacked.issuperset(names):
            return found
        stack = self._stacks[names] = WeightStack([self._sites[name].weight for name in names])
        for name, weight in zip(names, stack.weights, strict=True):
            self._sites[name] = dataclasses.replace(self._sites[name], weight=weight)
        self._unstacked.difference_update(names)
        return stack

    def _publish_stack(
        self, stack: WeightStack, adapters: Mapping[SiteName, SiteAdapter]
    ) -> dict[SiteName, dict[str, Tensor]]:
        """Merged weights of a stack's sites."""
        updates = [_update_of(require_linear(adapter)) for adapter in adapters.values()]
        left, right = factors(updates)
        self._loss.publish_stacked(adapters, stack.weights[0], left, right)
        merged = stack.merged(left, right, scale=self._scale)
        return {site: {"weight": own} for site, own in zip(adapters, merged, strict=True)}

    def _add(
        self, site: _Site, update: Update, delta_bias: Tensor | None, out: Mapping[str, Tensor]
    ) -> None:
        """Writes the merged weight of a site, and its bias if that changes."""
        scale, rounding = self._scale, self._rounding
        add_rounded(site.weight, update, out["weight"], scale=scale, rounding=rounding)
        if delta_bias is not None:
            bias = torch.zeros_like(out["bias"]) if site.bias is None else site.bias
            update = Update(delta_bias[:, None])
            add_rounded(bias, update, out["bias"], scale=scale, rounding=rounding)


def _update_of(adapter: MergeableAdapter | UserAdapters) -> Update:
    """Rows that are added to the base weight; as factors, if these are fewer numbers."""
    is_transposed = adapter.spec.kind is SiteKind.conv1d
    factors = adapter.delta_factors()
    if factors is not None:
        left, right = (factors[1].T, factors[0].T) if is_transposed else factors
        if left.numel() + right.numel() < len(left) * right.shape[1]:
            return Update(left.contiguous(), right.contiguous())  # as they travel: equal products
    return Update(to_base_layout(adapter.delta_weight(), adapter.spec).flatten(1))


def _snapshot(
    adapter: MergeableAdapter | UserAdapters, update: Update, delta_bias: Tensor | None
) -> dict[str, Tensor]:
    """What is added, contiguous, and apart from parameters that the next fit steps in place."""
    stepped = {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters()}
    parts = {"left": update.left, "right": update.right, "delta_bias": delta_bias}
    return {
        name: part.clone(memory_format=torch.contiguous_format)
        if part.untyped_storage().data_ptr() in stepped
        else part.contiguous()
        for name, part in parts.items()
        if part is not None
    }


def _parameters(module: nn.Module, bias: Tensor | None) -> dict[str, Tensor]:
    """The parameters to write, by name; a bias appears where there was none."""
    weight = module.get_parameter("weight")
    if bias is None:
        return {"weight": weight}
    if module.bias is None:
        empty = torch.empty_like(bias, dtype=weight.dtype, device=weight.device)
        module.register_parameter("bias", nn.Parameter(empty, requires_grad=False))
    return {"weight": weight, "bias": module.get_parameter("bias")}
