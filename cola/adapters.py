"""Adapters g_w: low-rank, linear and MLP, for linear and convolutional sites.

All start at g = 0. Each draws its initial parameters from a generator of its own, seeded by (seed,
site, user), so they do not depend on the model, the method, the other users or the order of
construction: LoRA and the low-rank adapter of one seed start from the same A.
"""

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola.config.choices import AdapterKind
from cola.config.schema import AdapterConfig
from cola.errors import MergeError, SiteError
from cola.sites import SiteKind, SiteName, SiteSpec
from cola.user_rows import EVERYONE, UserId


def adapter_generator(seed: int, site: SiteName, user: UserId = EVERYONE) -> torch.Generator:
    """Generator of one adapter's initial parameters, a function of (seed, site, user) alone."""
    name = f"{seed}/{site}" if user == EVERYONE else f"{seed}/{site}/{user}"
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _convolve(x: Tensor, weight: Tensor, spec: SiteSpec, bias: Tensor | None = None) -> Tensor:
    return functional.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation)


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    # Drawn in float32 on the CPU whatever the adapter's dtype and device, so all agree.
    with torch.no_grad():
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        parameter.copy_(values.uniform_(-bound, bound, generator=generator))


class LowRankAdapter(nn.Module):
    """g(x) = B A x without bias. For a Conv2d: the site's convolution to R channels, then 1x1.

    `lora_a` has shape (R, D) or (R, D, kh, kw), `lora_b` (H, R) or (H, R, 1, 1).
    """

    def __init__(self, spec: SiteSpec, rank: int) -> None:
        super().__init__()
        self.spec = spec
        is_conv = spec.kind is SiteKind.conv2d
        kernel, point = (spec.kernel_size, (1, 1)) if is_conv else ((), ())
        self.lora_a = nn.Parameter(torch.zeros(rank, spec.in_features, *kernel))
        self.lora_b = nn.Parameter(torch.zeros(spec.out_features, rank, *point))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A as kaiming_uniform(a=sqrt(5)), that is 1/sqrt(fan_in); B stays zero."""
        _uniform(self.lora_a, 1 / math.sqrt(self.lora_a[0].numel()), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., H), or (N, D, h, w) to (N, H, h', w'); not yet scaled."""
        if self.spec.kind is SiteKind.conv2d:
            return functional.conv2d(_convolve(x, self.lora_a, self.spec), self.lora_b)
        return functional.linear(functional.linear(x, self.lora_a), self.lora_b)

    def delta_weight(self) -> Tensor:
        """(H, D) or (H, D, kh, kw): the weight update that this adapter means. Proposition 2."""
        b, a = self.delta_factors()
        return (b @ a).reshape(-1, *self.lora_a.shape[1:])

    def delta_factors(self) -> tuple[Tensor, Tensor]:
        """B (H, R) and A (R, D) or (R, D * kh * kw), whose product is the delta weight."""
        return self.lora_b.flatten(1), self.lora_a.flatten(1)

    def delta_bias(self) -> Tensor | None:
        """A low-rank adapter has no bias."""
        return None


class LinearAdapter(nn.Module):
    """g(x) = W x, with a bias where the site asks for one. For a Conv2d: the same convolution."""

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__()
        self.spec = spec
        kernel = spec.kernel_size if spec.kind is SiteKind.conv2d else ()
        self.weight = nn.Parameter(torch.zeros(spec.out_features, spec.in_features, *kernel))
        self.bias = nn.Parameter(torch.zeros(spec.out_features)) if spec.adapter_bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """All parameters start at zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., H), or (N, D, h, w) to (N, H, h', w'); not yet scaled."""
        if self.spec.kind is SiteKind.conv2d:
            return _convolve(x, self.weight, self.spec, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def delta_weight(self) -> Tensor:
        """(H, D) or (H, D, kh, kw): the weight itself. Proposition 2."""
        return self.weight

    def delta_factors(self) -> None:
        """The delta weight of a linear adapter is no product."""

    def delta_bias(self) -> Tensor | None:
        """(H,), or None where the site's adapter has no bias."""
        return self.bias


class MLPAdapter(nn.Module):
    """g(x) = D -> hidden... -> H with ReLU and biases; per pixel at a Conv2d. Last layer zero."""

    def __init__(self, spec: SiteSpec, hidden: Sequence[int]) -> None:
        super().__init__()
        self.spec = spec
        if spec.kind is SiteKind.conv2d:
            _require_same_padding(spec)
        widths = [spec.in_features, *hidden, spec.out_features]
        layers = [nn.Linear(d, h) for d, h in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """PyTorch's default for linear layers; the last layer is zero."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            _uniform(layer.weight, bound, generator)
            _uniform(layer.bias, bound, generator)
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., H), or (N, D, h, w) to (N, H, h', w'); not yet scaled."""
        if self.spec.kind is SiteKind.conv2d:
            rows, columns = self.spec.stride
            x = x[:, :, ::rows, ::columns].movedim(1, -1)
        *hidden, last = self.layers  # a slice would build a module in every call
        for layer in hidden:
            x = functional.relu(layer(x))
        x = last(x)
        return x.movedim(-1, 1) if self.spec.kind is SiteKind.conv2d else x


Adapter = LowRankAdapter | LinearAdapter | MLPAdapter
MergeableAdapter = LowRankAdapter | LinearAdapter
AdapterState = Mapping[str, Tensor]
"""An adapter's parameters by name."""


def _require_same_padding(spec: SiteSpec) -> None:
    for kernel, padding, dilation in zip(
        spec.kernel_size, spec.padding, spec.dilation, strict=True
    ):
        if 2 * padding != dilation * (kernel - 1):
            raise SiteError(
                f"site {spec.name!r} has a {spec.kernel_size} kernel with padding {spec.padding}; "
                "an mlp adapter acts per pixel and needs an output of the input's size: use "
                "adapter=lowrank or linear, or leave the site out of model.sites"
            )


def build_adapter(
    config: AdapterConfig, spec: SiteSpec, *, seed: int, user: UserId = EVERYONE
) -> Adapter:
    """The adapter of one site and user, on the current default device, in float32.

    New heads always get a linear adapter with bias, because gradient learning has no other
    trainable parameter. On the meta device no values are drawn.
    """
    builders: dict[AdapterKind, Callable[[], Adapter]] = {
        AdapterKind.lowrank: lambda: LowRankAdapter(spec, config.rank),
        AdapterKind.linear: lambda: LinearAdapter(spec),
        AdapterKind.mlp: lambda: MLPAdapter(spec, config.hidden),
    }
    adapter = builders[AdapterKind.linear if spec.is_head else config.kind]()
    if not next(adapter.parameters()).is_meta:
        adapter.reset_parameters(adapter_generator(seed, spec.name, user))
    return adapter


def require_mergeable(adapter: Adapter) -> MergeableAdapter:
    """The adapter, if it is linear in its input (Proposition 2).

    Raises:
        MergeError: it is not.
    """
    if isinstance(adapter, MLPAdapter):
        raise MergeError(
            f"site {adapter.spec.name!r} has an mlp adapter, which is not linear in its input and "
            "cannot be merged into a weight: use adapter=lowrank or adapter=linear, or "
            "merge=unmerged (evaluation.merge=unmerged)"
        )
    return adapter


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What a reader of the parameters has to know to rebuild the adapter; JSON values."""
    spec = adapter.spec
    described: dict[str, Any] = {
        "kind": type(adapter).__name__.removesuffix("Adapter").lower(),
        "site_kind": spec.kind.name,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "is_head": spec.is_head,
        "shapes": {name: list(parameter.shape) for name, parameter in adapter.named_parameters()},
    }
    if spec.kind is SiteKind.conv2d:
        described |= {
            "kernel_size": list(spec.kernel_size),
            "stride": list(spec.stride),
            "padding": list(spec.padding),
            "dilation": list(spec.dilation),
        }
    return described


M = TypeVar("M", bound=nn.Module)


def skeleton(adapter: M) -> M:
    """The same structure with empty parameters, to install others' parameters into."""
    memo = {id(p): nn.Parameter(torch.empty(0), requires_grad=False) for p in adapter.parameters()}
    return copy.deepcopy(adapter, memo)


def install_parameters(adapter: nn.Module, state: AdapterState) -> None:
    """Points an adapter's parameters at the given tensors, frozen and without a copy."""
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        setattr(adapter.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
