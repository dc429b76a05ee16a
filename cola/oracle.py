"""The slow reference: adapters trained by plain back-propagation through the whole model.

Kept apart from taps, fleets and closed forms on purpose, so that nothing they share can be wrong in
both. `cola-verify` and the equivalence tests compare against it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.adapters import Adapter
from cola.sites import SiteName


def attach_trainable(
    model: nn.Module,
    adapters: Mapping[SiteName, Adapter],
    *,
    scale: float,
    detached: bool = False,
) -> tuple[dict[str, nn.Parameter], Callable[[], None]]:
    """Adds scale * g(x) to every site's output, with the adapters inside the autograd graph.

    Args:
        model: a frozen base model.
        adapters: by site, on the model's device and in its dtype.
        scale: alpha.
        detached: the stop-gradient oracle. An adapter still receives its own true gradient, but
            nothing flows through its output to sites upstream.

    Returns:
        Parameters by name, and a function that takes the hooks off.
    """

    def adapt(adapter: Adapter, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        (hidden_input,) = args
        if detached:
            hidden_input = hidden_input.detach()
        return torch.add(hidden, adapter(hidden_input), alpha=scale)

    handles = [
        model.get_submodule(site).register_forward_hook(partial(adapt, adapter))
        for site, adapter in adapters.items()
    ]
    parameters = {
        f"{site}.{name}": parameter
        for site, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return parameters, remove
