"""Sites: the sub-modules of a base model that get an adapter, and the layout of their weights.

Shared by adapters, taps, merging and models. A worker receives `SiteSpec` alone: it knows the shape
of a site, nothing of the base model around it.
"""

import sys
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from cola.errors import SiteError

SiteName = str
"""Dotted name of a sub-module of the base model."""


class SiteKind(Enum):
    """Module types that can be tapped."""

    linear = "linear"  # torch.nn.Linear, weight (H, D)
    conv1d = "conv1d"  # transformers' Conv1D of GPT-2: a linear map with weight (D, H)
    conv2d = "conv2d"  # torch.nn.Conv2d, weight (H, D, height, width)


class RowStream(Enum):
    """Which of a batch's padded texts the rows of a site are tokens of.

    A row of padding has no hidden gradient, so that it need not leave the base device.
    """

    whole = "whole"  # no padded text (images, heads), or it is not known which
    inputs = "inputs"  # what the model reads, `input_ids`
    targets = "targets"  # what an encoder-decoder writes, `labels`


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """Shape of one site.

    Attributes:
        name: dotted module name.
        kind: module type.
        in_features: D, size of the hidden input (channels for Conv2d).
        out_features: H, size of the hidden representation.
        adapter_bias: a linear adapter here has a bias (new heads and image models).
        is_head: a newly initialised head, which always gets a linear adapter.
        stream: what its rows are tokens of.
        kernel_size, stride, padding, dilation: of a Conv2d, else ones and zeros.
    """

    name: SiteName
    kind: SiteKind
    in_features: int
    out_features: int
    adapter_bias: bool = False
    is_head: bool = False
    stream: RowStream = RowStream.whole
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


def _is_conv1d(module: nn.Module) -> bool:
    # Without transformers imported there can be no Conv1D; image runs never pay that import.
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_site_module(module: nn.Module) -> bool:
    """Whether the module is of a type that can be tapped."""
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module)


def describe_site(
    name: SiteName, module: nn.Module, *, adapter_bias: bool = False, is_head: bool = False
) -> SiteSpec:
    """Reads the shape of a site from its module.

    Raises:
        SiteError: the module is of another type, or a grouped, strided-by-name or otherwise
            unsupported convolution.
    """
    if isinstance(module, nn.Conv2d):
        return _describe_conv2d(name, module, adapter_bias=adapter_bias, is_head=is_head)
    if isinstance(module, nn.Linear):
        kind, out_features, in_features = SiteKind.linear, module.out_features, module.in_features
    elif _is_conv1d(module):
        in_features, out_features = module.get_parameter("weight").shape
        kind = SiteKind.conv1d
    else:
        raise SiteError(
            f"site {name!r} is a {type(module).__name__}; adapters attach to Linear, Conv1D and "
            "Conv2d: change model.sites"
        )
    return SiteSpec(
        name=name,
        kind=kind,
        in_features=in_features,
        out_features=out_features,
        adapter_bias=adapter_bias,
        is_head=is_head,
    )


def _describe_conv2d(
    name: SiteName, module: nn.Conv2d, *, adapter_bias: bool, is_head: bool
) -> SiteSpec:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise SiteError(
            f"site {name!r} is a Conv2d with groups={module.groups}, "
            f"padding_mode={module.padding_mode!r}, padding={module.padding!r}; only groups=1 with "
            "numeric zero padding can be adapted: leave it out of model.sites"
        )
    return SiteSpec(
        name=name,
        kind=SiteKind.conv2d,
        in_features=module.in_channels,
        out_features=module.out_channels,
        adapter_bias=adapter_bias,
        is_head=is_head,
        kernel_size=(module.kernel_size[0], module.kernel_size[1]),
        stride=(module.stride[0], module.stride[1]),
        padding=(int(module.padding[0]), int(module.padding[1])),
        dilation=(module.dilation[0], module.dilation[1]),
    )


def flatten_rows(tensor: Tensor, spec: SiteSpec) -> Tensor:
    """Hidden inputs or representations of a site as rows: (..., D) to (N, D).

    Images keep their form (N, C, height, width), since a convolution is not a map of single rows.
    """
    if spec.kind is SiteKind.conv2d:
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])


def to_base_layout(delta_weight: Tensor, spec: SiteSpec) -> Tensor:
    """An adapter's delta weight, (H, D) or (H, D, kh, kw), in the layout of the base weight."""
    return delta_weight.T if spec.kind is SiteKind.conv1d else delta_weight
