"""Adapters on their own: structure, start, linearity, gradients by finite differences."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cola.adaptation_data import AdaptationData
from cola.adapters import (
    LinearAdapter,
    MLPAdapter,
    build_adapter,
    install_parameters,
    require_mergeable,
    skeleton,
)
from cola.config.choices import AdapterKind
from cola.config.schema import AdapterConfig
from cola.errors import MergeError, SiteError
from cola.sites import SiteKind, SiteSpec, describe_site
from tests import tiny
from tests.tolerances import EXACT

SITES = ["linear", "conv1d", "conv2d", "strided"]
LINEAR_KINDS = [AdapterKind.lowrank, AdapterKind.linear]

by_kind = pytest.mark.parametrize("kind", list(AdapterKind), ids=lambda kind: kind.name)
by_linear_kind = pytest.mark.parametrize("kind", LINEAR_KINDS, ids=lambda kind: kind.name)
by_site = pytest.mark.parametrize("name", SITES)


def linear_spec(in_features: int, out_features: int, *, bias: bool = False) -> SiteSpec:
    return SiteSpec(
        name="site",
        kind=SiteKind.linear,
        in_features=in_features,
        out_features=out_features,
        adapter_bias=bias,
    )


@by_kind
@by_site
def test_gradients_equal_finite_differences(name: str, kind: AdapterKind) -> None:
    site = tiny.site(name)
    adapter = tiny.filled_adapter(kind, site.spec)
    names, parameters = zip(*adapter.named_parameters(), strict=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(adapter, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(output, (site.hidden_input.requires_grad_(), *parameters))


@by_kind
@by_site
def test_output_has_the_shape_of_the_site_and_starts_at_zero(name: str, kind: AdapterKind) -> None:
    site = tiny.site(name, dtype=torch.float32)
    adapter = build_adapter(AdapterConfig(kind=kind, rank=2, hidden=[5, 7]), site.spec, seed=0)
    output = adapter(site.hidden_input)
    assert output.shape == site.module(site.hidden_input).shape
    assert not output.any()


@pytest.mark.parametrize(
    ("kind", "in_features", "out_features", "bias", "count"),
    [
        (AdapterKind.lowrank, 784, 10, True, 6_352),
        (AdapterKind.linear, 784, 10, True, 7_850),
        (AdapterKind.mlp, 784, 10, True, 136_074),
        (AdapterKind.lowrank, 3072, 10, True, 24_656),
        (AdapterKind.linear, 3072, 10, True, 30_730),
        (AdapterKind.mlp, 3072, 10, True, 428_938),
        (AdapterKind.lowrank, 768, 2304, False, 294_912 // 12),
        (AdapterKind.linear, 768, 2304, False, 21_233_664 // 12),
        (AdapterKind.mlp, 768, 2304, False, 8_683_008 // 12),
    ],
)
def test_parameter_count_is_the_published_one(
    kind: AdapterKind, in_features: int, out_features: int, bias: bool, count: int
) -> None:
    spec = linear_spec(in_features, out_features, bias=bias)
    with torch.device("meta"):
        adapter = build_adapter(AdapterConfig(kind=kind), spec, seed=0)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == count


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (AdapterKind.lowrank, 44_184),
        (AdapterKind.linear, 1_554_954),
        (AdapterKind.mlp, 538_058),
    ],
)
def test_parameter_count_of_a_cnn_is_the_published_one(kind: AdapterKind, count: int) -> None:
    widths = [1, 64, 128, 256, 512]
    with torch.device("meta"):
        modules: list[nn.Module] = [
            nn.Conv2d(widths[i], widths[i + 1], 3, padding=1) for i in range(4)
        ]
        modules.append(nn.Linear(512, 10))
        adapters = [
            build_adapter(
                AdapterConfig(kind=kind), describe_site("x", module, adapter_bias=True), seed=0
            )
            for module in modules
        ]
    assert sum(p.numel() for adapter in adapters for p in adapter.parameters()) == count


@by_kind
def test_initial_values_depend_on_seed_and_site_only(kind: AdapterKind) -> None:
    config, spec = AdapterConfig(kind=kind, rank=2, hidden=[5, 7]), tiny.site("linear").spec
    torch.manual_seed(1)
    first = build_adapter(config, spec, seed=5)
    torch.manual_seed(2)
    build_adapter(config, tiny.site("conv2d").spec, seed=5)
    second = build_adapter(config, spec, seed=5)
    assert torch.equal(tiny.flat(first), tiny.flat(second))


@pytest.mark.parametrize(
    ("seed", "site"), [(6, "site"), (5, "other")], ids=["other seed", "other site"]
)
def test_initial_a_differs_between_seeds_and_sites(seed: int, site: str) -> None:
    one = build_adapter(AdapterConfig(kind=AdapterKind.lowrank), linear_spec(6, 5), seed=5)
    spec = SiteSpec(name=site, kind=SiteKind.linear, in_features=6, out_features=5)
    other = build_adapter(AdapterConfig(kind=AdapterKind.lowrank), spec, seed=seed)
    assert not torch.isclose(one.get_parameter("lora_a"), other.get_parameter("lora_a")).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [AdapterKind.lowrank, AdapterKind.mlp], ids=lambda k: k.name)
def test_initial_values_are_equal_across_dtypes(kind: AdapterKind, dtype: torch.dtype) -> None:
    config, spec = AdapterConfig(kind=kind, rank=2, hidden=[5, 7]), tiny.site("linear").spec
    single = build_adapter(config, spec, seed=0)
    torch.set_default_dtype(dtype)
    try:
        other = build_adapter(config, spec, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(other.parameters()).dtype is dtype
    assert torch.equal(tiny.flat(single).to(dtype), tiny.flat(other))


@by_site
def test_initial_a_is_uniform_within_one_over_root_fan_in(name: str) -> None:
    spec = tiny.site(name).spec
    adapter = build_adapter(AdapterConfig(kind=AdapterKind.lowrank, rank=200), spec, seed=0)
    lora_a = adapter.get_parameter("lora_a").detach()
    reference = torch.empty_like(lora_a)
    nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert lora_a.abs().max() == pytest.approx(reference.abs().max().item(), rel=0.02)
    assert lora_a.std() == pytest.approx(reference.std().item(), rel=0.1)


@by_linear_kind
@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_delta_weight_equals_forward_on_basis_vectors(name: str, kind: AdapterKind) -> None:
    site = tiny.site(name)
    adapter = require_mergeable(tiny.filled_adapter(kind, site.spec))
    basis = torch.eye(site.spec.in_features, dtype=torch.float64)
    bias = adapter(torch.zeros_like(basis[:1]))
    torch.testing.assert_close((adapter(basis) - bias).T, adapter.delta_weight())
    delta_bias = adapter.delta_bias()
    torch.testing.assert_close(
        bias[0], torch.zeros(4).double() if delta_bias is None else delta_bias
    )


@by_linear_kind
@pytest.mark.parametrize("name", ["conv2d", "strided"])
def test_delta_weight_convolves_basis_images_as_forward_does(name: str, kind: AdapterKind) -> None:
    site = tiny.site(name)
    adapter = require_mergeable(tiny.filled_adapter(kind, site.spec))
    shape = site.hidden_input.shape[1:]
    basis = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    spec = site.spec
    wanted = functional.conv2d(
        basis, adapter.delta_weight(), adapter.delta_bias(), spec.stride, spec.padding
    )
    torch.testing.assert_close(adapter(basis), wanted)


def test_lowrank_delta_weight_has_the_configured_rank() -> None:
    spec = linear_spec(6, 5)
    adapter = build_adapter(AdapterConfig(kind=AdapterKind.lowrank, rank=3), spec, seed=0)
    nn.init.normal_(adapter.get_parameter("lora_b"))
    assert torch.linalg.matrix_rank(require_mergeable(adapter).delta_weight()) == 3


@by_kind
def test_head_gets_a_linear_adapter_with_bias(kind: AdapterKind) -> None:
    head = describe_site("head", nn.Linear(4, 3, bias=False), adapter_bias=True, is_head=True)
    adapter = build_adapter(AdapterConfig(kind=kind), head, seed=0)
    assert isinstance(adapter, LinearAdapter)
    assert adapter.bias is not None


def test_linear_adapter_has_no_bias_where_the_site_asks_for_none() -> None:
    adapter = build_adapter(AdapterConfig(kind=AdapterKind.linear), linear_spec(4, 3), seed=0)
    assert require_mergeable(adapter).delta_bias() is None


@pytest.mark.parametrize(
    ("size", "stride"), [(7, 2), (8, 2), (8, 3), (9, (1, 4))], ids=lambda value: str(value)
)
def test_mlp_at_a_strided_convolution_sees_the_pixels_under_its_centres(
    size: int, stride: int | tuple[int, int]
) -> None:
    module = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    adapter = tiny.filled_adapter(AdapterKind.mlp, describe_site("conv", module))
    x = torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(0)).double()
    output = adapter(x)
    hidden = module.double()(x)
    assert output.shape == hidden.shape
    rows, columns = module.stride
    centre = x[:, :, rows, columns]  # under the output pixel (1, 1)
    pixel = adapter(centre[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(output[:, :, 1, 1], pixel)


@pytest.mark.parametrize(
    "settings",
    [{"padding": 0}, {"padding": 2}, {"padding": (1, 0)}, {"padding": 1, "dilation": 2}],
    ids=str,
)
def test_mlp_refuses_a_convolution_that_changes_the_size(settings: dict[str, int]) -> None:
    spec = describe_site("stem", nn.Conv2d(2, 3, 3, **settings))
    with pytest.raises(SiteError, match=r"site 'stem' .*adapter=lowrank or linear"):
        build_adapter(AdapterConfig(kind=AdapterKind.mlp), spec, seed=0)


def test_mlp_accepts_same_padding_with_dilation() -> None:
    module = nn.Conv2d(2, 3, 3, padding=2, dilation=2)
    adapter = build_adapter(
        AdapterConfig(kind=AdapterKind.mlp), describe_site("conv", module), seed=0
    )
    x = torch.zeros(1, 2, 6, 6)
    assert adapter(x).shape == module(x).shape


def test_mlp_refuses_to_merge() -> None:
    adapter = MLPAdapter(linear_spec(4, 3), [5])
    with pytest.raises(MergeError, match=r"site 'site' has an mlp .*lowrank or adapter=linear"):
        require_mergeable(adapter)


@by_kind
@by_site
def test_skeleton_with_installed_parameters_acts_alike(name: str, kind: AdapterKind) -> None:
    site = tiny.site(name)
    adapter = tiny.filled_adapter(kind, site.spec)
    wanted = adapter(site.hidden_input)
    empty = skeleton(adapter)
    assert sum(parameter.numel() for parameter in empty.parameters()) == 0
    install_parameters(empty, copy.deepcopy(adapter.state_dict()))
    # Not bit for bit: frozen parameters may take another kernel.
    torch.testing.assert_close(empty(site.hidden_input), wanted, rtol=EXACT, atol=EXACT)
    assert not any(parameter.requires_grad for parameter in empty.parameters())


@pytest.mark.parametrize(
    ("x", "g", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2), "the same number of rows and axes"),
        (torch.zeros(3, 2), torch.zeros(3, 2, 1), "the same number of rows and axes"),
        (torch.zeros(3, 2), torch.zeros(3, 2).double(), "the same floating-point type"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2).int(), "the same floating-point type"),
        (torch.zeros(3, 2), torch.zeros(3, 2, device="meta"), "hidden gradient on meta"),
        (torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 2), "must be detached"),
        (torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True), "must be detached"),
    ],
)
def test_adaptation_data_refuses_what_does_not_fit(x: Tensor, g: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptationData(hidden_input=x, hidden_gradient=g)
