"""Tiny models, batches and learners that several test files share."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from cola.adapters import Adapter, build_adapter
from cola.autograd_learner import AutogradLearner
from cola.config.choices import (
    AdapterKind,
    ClipMode,
    MergeMode,
    Objective,
    OptimizerName,
    Pristine,
    Reduction,
    Rounding,
)
from cola.config.schema import AdapterConfig, OptimizerConfig
from cola.gradient_learner import GradientLearner, set_training_mode
from cola.gradient_settings import GradientLearning
from cola.gradient_wiring import build_gradient_learner
from cola.interfaces import Adaptation, Learner
from cola.objectives import task_loss
from cola.offload.placing import OffloadPlan
from cola.optimizers import build_optimizer, optimizer_step
from cola.oracle import attach_trainable
from cola.sites import SiteName, SiteSpec, describe_site
from cola.task_data import Batch

SCALE = 0.7

ALLOWED = [
    (kind, mode)
    for kind in AdapterKind
    for mode in MergeMode
    if not (kind is AdapterKind.mlp and mode is MergeMode.merged)  # Proposition 2
]
"""Adapter kinds and the merge modes they can train in."""

# Kernels this small lose time to a second thread, and lose all of it on a busy machine.
torch.set_num_threads(1)


class Output(NamedTuple):
    logits: Tensor


class TinyNet(nn.Module):
    """query and value share their input; mix, again and head follow in series.

    `again` runs twice (weight sharing), `twist` is a GPT-2 Conv1D.
    """

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.query = nn.Linear(6, 5)
        self.value = nn.Linear(6, 5)
        self.twist = Conv1D(4, 5)
        self.again = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Output:
        x = torch.tanh(self.query(features)) * self.value(features)  # (B, T, 5)
        x = torch.tanh(self.twist(x))
        x = torch.tanh(self.again(x))
        x = torch.tanh(self.again(x))
        return Output(self.head(x.mean(dim=1)))


class TinyConv(nn.Module):
    """Two convolutions (one with a stride) with BatchNorm between, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, features: Tensor) -> Output:
        x = torch.tanh(self.norm(self.first(features)))
        x = torch.tanh(self.second(x))
        return Output(self.head(x.mean(dim=(2, 3))))


class CheckpointedNet(TinyNet):
    """TinyNet in two checkpointed parts; `again` runs in both of them, the head in none."""

    use_reentrant = False

    def forward(self, features: Tensor) -> Output:
        x = self._checkpoint(self._front, features)
        return Output(self.head(self._checkpoint(self._back, x)))

    def _front(self, features: Tensor) -> Tensor:
        x = torch.tanh(self.query(features)) * self.value(features)  # (B, T, 5)
        return torch.tanh(self.again(torch.tanh(self.twist(x))))

    def _back(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(x)).mean(dim=1)

    def _checkpoint(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        result: Tensor = checkpoint(part, x, use_reentrant=self.use_reentrant)
        return result


class ReentrantNet(CheckpointedNet):
    """The form of checkpointing that loses hidden gradients on a frozen base model."""

    use_reentrant = True


class InPlaceNet(nn.Module):
    """In-place operations right after every site; no site's output is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 1, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, features: Tensor) -> Output:
        x = self.first(features).tanh_()
        x = self.second(x).relu_()
        return Output(self.head(x.mean(dim=(2, 3))).mul_(2))


class InPlaceViewNet(nn.Module):
    """In-place operations on sites' outputs that PyTorch returns as views: (B, T, H)."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = Conv1D(4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, features: Tensor) -> Output:
        x = self.first(features).tanh_()
        x = self.second(x).relu_()
        return Output(self.head(x.mean(dim=1)))


class Site(NamedTuple):
    """A module on its own, and hidden inputs for it."""

    module: nn.Module
    spec: SiteSpec
    hidden_input: Tensor


def site(
    name: str, *, bias: bool = True, adapter_bias: bool = True, dtype: torch.dtype = torch.float64
) -> Site:
    """`linear`, `conv1d`, `conv2d` or `strided` (a Conv2d with the padding of a same-size one)."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(3)
    module: nn.Module
    if name == "linear":
        module, shape = nn.Linear(5, 4, bias=bias), (7, 5)
    elif name == "conv1d":
        assert bias, "transformers' Conv1D always has a bias"
        module, shape = Conv1D(4, 5), (7, 5)
    else:
        stride = (2, 3) if name == "strided" else 1
        module = nn.Conv2d(2, 3, (3, 5), stride=stride, padding=(1, 2), bias=bias)
        shape = (2, 2, 5, 7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    module.to(dtype).requires_grad_(False)
    spec = describe_site(name, module, adapter_bias=adapter_bias)
    hidden_input = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Site(module, spec, hidden_input)


def filled_adapter(kind: AdapterKind, spec: SiteSpec, *, seed: int = 0) -> Adapter:
    """One adapter in float64, away from zero."""
    adapter = build_adapter(AdapterConfig(kind=kind, rank=2, hidden=[5, 7]), spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return adapter.double()


def net(kind: type[nn.Module] = TinyNet, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for parameter in model.parameters():  # Conv1D starts at 0.02, which hides everything
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).requires_grad_(False)


def specs(model: nn.Module, *, heads: Sequence[str] = ()) -> dict[SiteName, SiteSpec]:
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name: describe_site(name, module, adapter_bias=True, is_head=name in heads)
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }


def batches(model: nn.Module, num: int, *, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Batches of different sizes, so that mean and sum intervals differ."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 5) if isinstance(model, TinyConv | InPlaceNet) else (4, 6)
    result = []
    for index in range(num):
        size = 3 + index % 3
        features = torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, 3, (size,), generator=generator)
        result.append(Batch(inputs={"features": features}, labels=labels, num_terms=size))
    return result


def optimizer(name: str = "adamw", clip: str = "none", clip_norm: float = 0.05) -> OptimizerConfig:
    return OptimizerConfig(
        name=OptimizerName[name],
        lr=0.05,
        weight_decay=0.01,
        clip=ClipMode[clip],
        clip_norm=clip_norm,
    )


def filled_adapters(
    model: nn.Module, kind: AdapterKind, *, seed: int = 0, std: float = 0.3
) -> dict[SiteName, Adapter]:
    """Adapters away from zero, where mistakes would not show."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, spec in specs(model).items():
        adapter = build_adapter(AdapterConfig(kind=kind, rank=2, hidden=[5, 7]), spec, seed=seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
        adapters[name] = adapter.to(dtype)
    return adapters


def offload_plan(num_workers: int) -> OffloadPlan:
    """Fits on threads of the host, or, with none, on the base device."""
    devices = (torch.device("cpu"),) if num_workers else ()
    return OffloadPlan(devices=devices, workers=num_workers or None)


def gradient_learner(
    model: nn.Module,
    adapters: dict[SiteName, Adapter],
    *,
    mode: MergeMode = MergeMode.unmerged,
    optimizer_config: OptimizerConfig | None = None,
    reduction: Reduction = Reduction.mean,
    offload: str = "none",
    num_workers: int = 2,
    pristine: Pristine = Pristine.host,
    rounding: Rounding = Rounding.nearest,
    evaluate_merged: bool | None = None,
) -> GradientLearner:
    return build_gradient_learner(
        model,
        specs(model),
        copy.deepcopy(adapters),
        settings(
            mode=mode,
            pristine=pristine,
            rounding=rounding,
            optimizer=optimizer_config or optimizer(),
            reduction=reduction,
            offload=offload_plan(0 if offload == "none" else num_workers),
            evaluates_merged=evaluate_merged,
        ),
    )


def settings(**changes: Any) -> GradientLearning:
    usual: dict[str, Any] = {
        "objective": Objective.classification,
        "scale": SCALE,
        "mode": MergeMode.unmerged,
        "optimizer": optimizer(),
        "reduction": Reduction.mean,
        "offload": OffloadPlan(),
    }
    return GradientLearning(**usual | changes)


def oracle_learner(
    model: nn.Module,
    adapters: dict[SiteName, Adapter],
    *,
    optimizer_config: OptimizerConfig | None = None,
    reduction: Reduction = Reduction.mean,
    detached: bool = False,
) -> AutogradLearner:
    own = copy.deepcopy(adapters)
    parameters, _ = attach_trainable(model, own, scale=SCALE, detached=detached)
    return AutogradLearner(
        model,
        parameters,
        objective=Objective.classification,
        optimizer=optimizer_config or optimizer(),
        reduction=reduction,
        set_training_mode=set_training_mode,
        adapters=lambda: own,
    )


def train(learner: Learner, stream: Sequence[Batch], *, interval: int = 1) -> list[float]:
    """The trainer's loop, with a rate that changes from adaptation to adaptation."""
    losses = []
    for step, batch in enumerate(stream, start=1):
        is_last = step == len(stream)
        number = -(-step // interval)
        closes = step % interval == 0 or is_last
        closing = Adaptation(number=number, learning_rate=0.05 / number) if closes else None
        losses.append(learner.record(batch, closing).item())
        if closing:
            learner.update(closing)
    return losses


def train_clipping_each(
    model: nn.Module,
    adapters: dict[SiteName, Adapter],
    stream: Sequence[Batch],
    *,
    optimizer_config: OptimizerConfig,
    interval: int,
) -> dict[SiteName, Adapter]:
    """Autograd with torch's own clip on each adapter: what no other learner does."""
    own = copy.deepcopy(adapters)
    parameters, remove = attach_trainable(model, own, scale=SCALE)
    stepped = build_optimizer(parameters.values(), optimizer_config)
    for number, start in enumerate(range(0, len(stream), interval), start=1):
        group = stream[start : start + interval]
        for batch in group:
            weight = batch.num_terms / sum(other.num_terms for other in group)
            loss = task_loss(Objective.classification, model(**batch.inputs).logits, batch)
            (weight * loss).backward()
        for adapter in own.values():
            clip_grad_norm_(adapter.parameters(), optimizer_config.clip_norm)
        optimizer_step(stepped, 0.05 / number)
        stepped.zero_grad()
    remove()
    return own


def adapt(learner: Learner, batch: Batch, number: int) -> None:
    """One batch, one adaptation."""
    adaptation = Adaptation(number=number, learning_rate=0.05)
    learner.record(batch, adaptation)
    learner.update(adaptation)


def joined(stream: Sequence[Batch]) -> Batch:
    """The batches as a single one."""
    return Batch(
        inputs={"features": torch.cat([batch.inputs["features"] for batch in stream])},
        labels=torch.cat([batch.labels for batch in stream]),
        num_terms=sum(batch.num_terms for batch in stream),
    )


def logits(learner: Learner, batch: Batch) -> Tensor:
    """What the adapted model answers in evaluation."""
    with learner.evaluating() as model, torch.no_grad():
        result: Tensor = model(**batch.inputs).logits
        return result.clone()


def distance(
    found: dict[SiteName, Adapter], wanted: dict[SiteName, Adapter], start: dict[SiteName, Adapter]
) -> float:
    """Largest ||w - w*|| / ||w* - w0|| over adapters."""
    worst = 0.0
    for site in wanted:
        moved = flat(wanted[site]) - flat(start[site])
        error = flat(found[site]) - flat(wanted[site])
        assert moved.norm() > 0, f"{site} did not move: the comparison would say nothing"
        worst = max(worst, (error.norm() / moved.norm()).item())
    return worst


def flat(adapter: Adapter) -> Tensor:
    """All parameters of an adapter as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in adapter.parameters()])


def flat_gradient(adapter: Adapter) -> Tensor:
    """All gradients of an adapter as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])
