"""The slow reference: adapters trained by plain back-propagation through the whole model.

Kept apart from taps, fleets, stacks and closed forms on purpose, so that nothing they share can be
wrong in both. `cola-verify` and the equivalence tests compare against it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cola.adapters import Adapter
from cola.config.choices import Reduction, UserGradient, UsersMode
from cola.sites import SiteName

Hook = Callable[[nn.Module, Any, Tensor], Tensor]
"""Forward hook of a site with one input."""


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

    remove = _hook(model, {site: partial(adapt, adapter) for site, adapter in adapters.items()})
    parameters = {
        f"{site}.{name}": parameter
        for site, adapter in adapters.items()
        for name, parameter in adapter.named_parameters()
    }
    return parameters, remove


def attach_users(
    model: nn.Module,
    adapters: Mapping[SiteName, Sequence[Adapter]],
    owners: Callable[[], Tensor],
    *,
    scales: Sequence[float],
    mode: UsersMode,
    gradient: UserGradient = UserGradient.federated,
    reduction: Reduction = Reduction.mean,
    detached: bool = False,
    active: Callable[[], Sequence[bool]] | None = None,
) -> tuple[dict[str, nn.Parameter], Callable[[], None]]:
    """Adds the adapters of K users to every site's output, with rows masked by hand.

    Paper: Sec. 3.3. `alone`: every row sees, and teaches, its own user's adapters. `collaboration`:
    every row sees all users' adapters, reduced, as if they were merged into the weights; whom it
    teaches is `gradient`'s matter.

    Args:
        model: a frozen base model.
        adapters: by site, those of user 0 to K - 1, on the model's device and in its dtype.
        owners: gives the user (B,) of each row of the batch that is being run, in any order.
        scales: (K,) alpha of each user.
        mode: `alone` or `collaboration`.
        gradient: in collaboration, `federated`: a row teaches its own user's adapters by the hidden
            gradient it has in the merged model, times alpha, not divided by K as the forward pass
            is. `exact`: all rows teach everybody, the true gradient of the merged objective.
        reduction: of the users' outputs in collaboration.
        detached: as in `attach_trainable`.
        active: says which users (K,) take part in collaboration now; None: all of them.

    Returns:
        Parameters as `site.user.name`, and a function that takes the hooks off.
    """

    def alone(own: Sequence[Adapter], x: Tensor, hidden: Tensor) -> Tensor:
        adapted = hidden
        for k, adapter in enumerate(own):
            adapted = adapted + _mask(owners(), k, hidden) * (scales[k] * adapter(x))
        return adapted

    def collaboration(own: Sequence[Adapter], x: Tensor, hidden: Tensor) -> Tensor:
        present = [k for k in range(len(own)) if active is None or active()[k]]
        share = 1 / len(present) if reduction is Reduction.mean and present else 1.0
        adapted = hidden
        for k in present:
            if gradient is UserGradient.exact:
                adapted = adapted + share * scales[k] * own[k](x)
                continue
            adapted = adapted + share * scales[k] * _frozen(own[k], x)
            adapted = adapted + _mask(owners(), k, hidden) * _lesson(own[k], x, scales[k])
        return adapted

    act = {UsersMode.alone: alone, UsersMode.collaboration: collaboration}[mode]

    def adapt(own: Sequence[Adapter], module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        (hidden_input,) = args
        return act(own, hidden_input.detach() if detached else hidden_input, hidden)

    hooks = {site: partial(adapt, own) for site, own in adapters.items()}
    parameters = {
        f"{site}.{user}.{name}": parameter
        for site, own in adapters.items()
        for user, adapter in enumerate(own)
        for name, parameter in adapter.named_parameters()
    }
    return parameters, _hook(model, hooks)


def _mask(owners: Tensor, user: int, hidden: Tensor) -> Tensor:
    """1 where a row is the user's, else 0, to be multiplied with the hidden representation.

    The leading axis may be the batch's rows times tokens or beams, each row's next to one another.
    """
    factor, rest = divmod(len(hidden), len(owners))
    assert rest == 0, f"{len(hidden)} rows at a site, {len(owners)} in the batch"
    mask = (owners == user).repeat_interleave(factor).to(hidden)
    return mask.view(-1, *[1] * (hidden.dim() - 1))


def _frozen(adapter: Adapter, x: Tensor) -> Tensor:
    """The output with the gradient of x only."""
    constants = {name: parameter.detach() for name, parameter in adapter.named_parameters()}
    output: Tensor = functional_call(adapter, constants, (x,))
    return output


def _lesson(adapter: Adapter, x: Tensor, scale: float) -> Tensor:
    """Zero, with the gradient of the scaled output by the parameters only."""
    output: Tensor = scale * adapter(x.detach())
    return output - output.detach()


def _hook(model: nn.Module, hooks: Mapping[SiteName, Hook]) -> Callable[[], None]:
    handles = [
        model.get_submodule(site).register_forward_hook(hook) for site, hook in hooks.items()
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
