"""The unmerged placement: adapters beside the sites, h + scale * g(x).

Paper: equation of the adapted hidden representation, Algorithm 1 without lines 3 and 8. The
adapter's graph is kept, so that gradients of sites upstream flow through it; its parameters are
frozen here.
"""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from cola.adapters import install_parameters, skeleton
from cola.added_products import add_lowrank
from cola.sites import SiteName
from cola.user_adapters import SiteAdapter

ROUNDS_KEPT = 3
"""Adaptations whose snapshots are apart: the newest, the one before, which a base model that lags
behind still fetches, and the one that is being written."""


class Bank:
    """Adapters on the base device.

    With `detached` no gradient flows through them: an ablation whose gradients are wrong at sites
    with sites downstream.
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
        stays_in_place: bool = False,
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
            stays_in_place: parameters in effect keep their memory, as captured graphs need it.
        """
        self._adapters = {site: skeleton(adapter) for site, adapter in adapters.items()}
        self._installed: dict[SiteName, Mapping[str, Tensor]] = {}
        self._shared: dict[SiteName, dict[str, Tensor]] = {}
        self._own: dict[SiteName, dict[str, Tensor]] = {}  # memory of what comes from elsewhere
        self._outgoing: dict[SiteName, deque[dict[str, Tensor]]] = {}
        self._scale = scale
        self._device, self._dtype = device, dtype
        self._detached = detached
        self._copies = copies or stays_in_place
        self._stays_in_place = stays_in_place

    def adapter(self, site: SiteName) -> SiteAdapter:
        """The adapter with the parameters in effect, in the base model's dtype."""
        return self._adapters[site]

    def publish(self, adapter: SiteAdapter) -> Mapping[str, Tensor]:
        """The adapter's parameters in the base model's dtype."""
        return self.publish_all({adapter.spec.name: adapter})[adapter.spec.name]

    def publish_all(
        self, adapters: Mapping[SiteName, SiteAdapter]
    ) -> dict[SiteName, Mapping[str, Tensor]]:
        """The same for several sites, in one go."""
        if not self._copies:
            return {site: self._share(site, adapter) for site, adapter in adapters.items()}
        named = {site: dict(adapter.named_parameters()) for site, adapter in adapters.items()}
        published = {site: self._outgoing_memory(site, own) for site, own in named.items()}
        _copy_all(published, named)
        return dict(published)

    def install(self, site: SiteName, published: Mapping[str, Tensor]) -> None:
        """Uses these parameters from now on."""
        self.install_all({site: published})

    def install_all(self, published: Mapping[SiteName, Mapping[str, Tensor]]) -> None:
        """The same for several sites, in one go."""
        news = {s: own for s, own in published.items() if self._installed.get(s) is not own}
        self._installed.update(news)
        coming = {}
        for site, own in news.items():
            is_here = all(tensor.device == self._device for tensor in own.values())
            if is_here and not self._stays_in_place:
                install_parameters(self._adapters[site], own)
                continue
            if site not in self._own:
                self._own[site] = {
                    n: torch.empty_like(t, device=self._device) for n, t in own.items()
                }
                install_parameters(self._adapters[site], self._own[site])
            coming[site] = own
        _copy_all({site: self._own[site] for site in coming}, coming)

    def _share(self, site: SiteName, adapter: SiteAdapter) -> Mapping[str, Tensor]:
        """The fitted tensors themselves, stepped in place, if the base model can use them."""
        if site in self._shared:
            return self._shared[site]
        named = {name: parameter.detach() for name, parameter in adapter.named_parameters()}
        if next(iter(named.values())).dtype is self._dtype:
            self._shared[site] = named
            return named
        return {name: parameter.to(self._dtype) for name, parameter in named.items()}

    def _outgoing_memory(self, site: SiteName, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where a snapshot goes: memory that the base device fetches from fast, used in turn."""
        if site not in self._outgoing:
            from_host = next(iter(like.values())).device.type == "cpu"
            pinned = from_host and self._device.type == "cuda"
            self._outgoing[site] = deque(
                {
                    name: torch.empty_like(p, dtype=self._dtype, pin_memory=pinned)
                    for name, p in like.items()
                }
                for _ in range(ROUNDS_KEPT)
            )
        self._outgoing[site].rotate()
        return dict(self._outgoing[site][0])  # a new one, by which a new round is known

    def adapt(self, site: SiteName, hidden_input: Tensor, hidden: Tensor) -> Tensor:
        """Adapted hidden representation, (..., H)."""
        adapter = self._adapters[site]
        if self._detached:
            with torch.no_grad():
                delta = adapter(hidden_input)
        else:
            adapted = add_lowrank(hidden, hidden_input, adapter, self._scale)
            if adapted is not None:
                return adapted
            delta = adapter(hidden_input)
        return torch.add(hidden, delta, alpha=self._scale)

    def remove(self) -> None:
        """The base model was never touched."""


@torch.no_grad()
def _copy_all(
    targets: Mapping[SiteName, Mapping[str, Tensor]],
    sources: Mapping[SiteName, Mapping[str, Tensor]],
) -> None:
    """Copies all tensors by one call; from pinned memory, without waiting."""
    into = [tensor for site in targets for tensor in targets[site].values()]
    out_of = [tensor for site in targets for tensor in sources[site].values()]
    if into:
        torch._foreach_copy_(into, out_of, non_blocking=True)
