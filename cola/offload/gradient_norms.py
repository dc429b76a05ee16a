"""Norms of gradients: are they finite, and how far are they clipped. Algorithm 1, line 14."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cola.errors import OffloadError
from cola.sites import SiteName


@torch.no_grad()
def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of every tensor, (P,), in as few kernels as the device has for it."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def clip_factors(
    norms: Tensor, sizes: Sequence[int], scale: float, clip_norm: float
) -> Iterable[Tensor]:
    """Of every adapter: scale * min(1, clip_norm / norm), without waiting for the device.

    Args:
        norms: (P,) of all gradients.
        sizes: how many of them each adapter has, in order.
        scale: of the gradients.
        clip_norm: largest norm that an adapter's gradient is left with.
    """
    parts = torch.split_with_sizes(norms, list(sizes))
    norm = scale * torch.stack([torch.linalg.vector_norm(part) for part in parts])
    factors: Tensor = scale * (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # (A,)
    return torch.unbind(factors)


def require_finite(
    norms: Tensor, tensors: Mapping[SiteName, Sequence[Tensor]], number: int
) -> None:
    """Asks for what trains to be finite; on a GPU the host waits here.

    Args:
        norms: (P,) of all tensors.
        tensors: by site.
        number: of the adaptation.

    Raises:
        OffloadError: names the first site of which a norm is not.
    """
    if math.isfinite(norms.max()):  # two calls; `isfinite` of a tensor is six
        return
    parts = torch.split_with_sizes(norms, [len(own) for own in tensors.values()])
    finite = {site: part.isfinite().all() for site, part in zip(tensors, parts, strict=True)}
    broken = next(site for site, is_finite in finite.items() if not is_finite)
    raise OffloadError(
        f"adaptation {number}: the hidden gradient of site {broken!r} is not finite: lower "
        "optimizer.lr, set optimizer.clip=adapter, or check the data"
    )
