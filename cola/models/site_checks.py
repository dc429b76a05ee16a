"""Checks of settings against a built model: they need its shapes, which the schema cannot know."""

from collections.abc import Mapping
from math import prod

from torch import nn

from cola.errors import ConfigError
from cola.sites import SiteName, SiteSpec

_NUM_NAMED = 3  # sites that an error lists


def check_rank(
    sites: Mapping[SiteName, SiteSpec], rank: int, *, setting: str = "adapter.rank"
) -> None:
    """Refuses a low-rank adapter that has more ranks than its site's weight can have.

    Heads are left out: they get a linear adapter whatever the kind.

    Args:
        sites: of the model.
        rank: of the adapters.
        setting: what gives the rank, for the message.

    Raises:
        ConfigError: names the sites and the largest rank that fits all of them.
    """
    limits = {name: _largest_rank(spec) for name, spec in sites.items() if not spec.is_head}
    too_small = {name: limit for name, limit in limits.items() if rank > limit}
    if not too_small:
        return
    named = ", ".join(f"{name} ({limit})" for name, limit in list(too_small.items())[:_NUM_NAMED])
    more = f" and {len(too_small) - _NUM_NAMED} more" if len(too_small) > _NUM_NAMED else ""
    raise ConfigError(
        f"{setting}={rank} is above the smaller side of {named}{more}; "
        f"set it to at most {min(too_small.values())}"
    )


def _largest_rank(spec: SiteSpec) -> int:
    # A is a full convolution to the rank, hence an (R, D * height * width) matrix.
    return min(spec.in_features * prod(spec.kernel_size), spec.out_features)


def shared_parameter_sites(
    module: nn.Module, sites: Mapping[SiteName, SiteSpec]
) -> tuple[SiteName, ...]:
    """Sites whose weight or bias another module also holds (GPT-2 ties wte and lm_head).

    Merging into such a site would change the other module too, so merged mode refuses them.
    """
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(child)
    return tuple(
        name
        for name in sites
        if any(len(owners[parameter]) > 1 for parameter in _own_parameters(module, name))
    )


def _own_parameters(module: nn.Module, name: SiteName) -> list[nn.Parameter]:
    return list(module.get_submodule(name).parameters(recurse=False))
