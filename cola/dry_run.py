"""`dry_run=true`: what a run would adapt, move and hold, without weights, data or network.

The base model is built on the meta device and run forward once on a full batch, so that shapes,
bytes on the wire and tensors saved for the backward pass are those of the real model.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.adapters import Adapter, build_adapter
from cola.config.choices import (
    MergeMode,
    MethodName,
    Objective,
    OffloadTarget,
    OptimizerName,
    Pristine,
)
from cola.config.schema import ExperimentConfig
from cola.experiment import check_sites
from cola.interfaces import Batch, Problem
from cola.meters import MIB, count_bytes
from cola.models import BaseModel, build_base_model
from cola.objectives import task_loss
from cola.report.text import format_table, print_text
from cola.sites import SiteName
from cola.tasks import resolve_problem

FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """Facts of a run before it starts.

    Attributes:
        sites: number of sites, M.
        base_parameters: of the frozen base model.
        trainable_parameters: of the method.
        wire_out_bytes: hidden inputs and gradients of one step, dense, each site its own.
        wire_back_bytes: what one adaptation sends back.
        memory_bytes: by device, then by owner.
    """

    sites: int
    base_parameters: int
    trainable_parameters: int
    wire_out_bytes: int
    wire_back_bytes: int
    memory_bytes: Mapping[str, Mapping[str, int]]


def print_dry_run(config: ExperimentConfig) -> None:
    """Prints the facts, on standard output."""
    dry = estimate(config)
    size = f"batch {config.trainer.batch_size}"
    if config.task.image_shape is None:
        size += f", length {config.task.max_length}"
    facts = [
        ["model", config.model.path or config.model.name],
        ["task", "/".join(filter(None, [config.task.name, config.task.subset]))],
        ["sites (M)", f"{dry.sites:,}"],
        ["base parameters", f"{dry.base_parameters:,}"],
        ["trainable parameters", f"{dry.trainable_parameters:,}"],
        [f"wire, base to offload, MiB per step ({size})", f"{dry.wire_out_bytes / MIB:,.2f}"],
        ["wire, offload to base, MiB per adaptation", f"{dry.wire_back_bytes / MIB:,.2f}"],
    ]
    print_text(format_table(["fact", "value"], facts))
    rows = [
        [device, owner, f"{num / MIB:,.1f}"]
        for device, owners in dry.memory_bytes.items()
        for owner, num in [*owners.items(), ("total", sum(owners.values()))]
    ]
    print_text("\nEstimated memory, without temporary buffers of kernels:\n")
    print_text(format_table(["device", "what", "MiB"], rows))


def estimate(config: ExperimentConfig) -> DryRun:
    """The facts of a configuration.

    Raises:
        ConfigError, SiteError: the model cannot be built or adapted as asked.
    """
    problem = resolve_problem(config.task, config.model.family)
    base = build_base_model(config.model, problem, seed=config.seed, on_meta=True)
    check_sites(config, base)
    with torch.device("meta"):
        adapters = {
            name: build_adapter(config.adapter, spec, seed=config.seed)
            for name, spec in base.sites.items()
        }
    num_adapter = sum(p.numel() for a in adapters.values() for p in a.parameters())
    trains_all = config.method.name is MethodName.ft
    traffic, kept = _trace(config, problem, base, adapters)
    offloads = (
        config.method.name is MethodName.cola and config.offload.name is not OffloadTarget.none
    )
    is_merged = config.merge.mode is MergeMode.merged
    back = _merged_bytes(base) if is_merged else _bank_bytes(base, num_adapter)
    return DryRun(
        sites=len(base.sites),
        base_parameters=base.num_parameters,
        trainable_parameters=base.num_parameters if trains_all else num_adapter,
        wire_out_bytes=traffic if offloads else 0,
        wire_back_bytes=back if offloads else 0,
        memory_bytes=_memory(config, base, num_adapter, traffic, kept),
    )


def _trace(
    config: ExperimentConfig,
    problem: Problem,
    base: BaseModel,
    adapters: Mapping[SiteName, Adapter],
) -> tuple[int, int]:
    """Runs one training batch forward on the meta device.

    Returns:
        Bytes of (x, gradient) over all sites, and bytes kept for the backward pass.
    """
    method = config.method.name
    model = base.module.train().requires_grad_(method is MethodName.ft)
    traffic: list[int] = []
    kept: list[Tensor] = []
    # Makes the frozen model's hidden representations part of the graph, as the taps do.
    anchor = torch.zeros((), device="meta", requires_grad=True)

    def adapt(site: SiteName, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        traffic.append(args[0].nbytes + hidden.nbytes)
        if method is MethodName.cola:
            kept.append(args[0])  # until its gradient arrives
        if method is MethodName.cola and config.merge.mode is not MergeMode.unmerged:
            return hidden + anchor
        adapter = adapters[site].to(hidden.dtype).requires_grad_(method is MethodName.lora)
        return torch.add(hidden, adapter(args[0])) + anchor

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    sites = () if method is MethodName.ft else base.sites
    for site in sites:
        model.get_submodule(site).register_forward_hook(partial(adapt, site))
    if problem.objective is Objective.causal:
        # transformers would look for padding and packing in the inputs, which hold no values here;
        # it does neither without a padding token and with a cache.
        model.config.pad_token_id, model.config.use_cache = None, True  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = _meta_batch(problem, config.trainer.batch_size)
        task_loss(problem.objective, model(**batch.inputs).logits, batch)
    weights = [*model.parameters(), *(p for a in adapters.values() for p in a.parameters())]
    # Weights are saved for the backward pass as well, but they are held anyway.
    return sum(traffic), count_bytes([*weights, *kept]) - count_bytes(weights)


def _meta_batch(problem: Problem, size: int) -> Batch:
    with torch.device("meta"):
        if problem.image_shape is not None:
            inputs = {"pixels": torch.zeros(size, *problem.image_shape)}
        else:
            # No attention mask: transformers would look into it, and here it holds no values.
            inputs = {"input_ids": torch.zeros(size, problem.max_length, dtype=torch.long)}
        is_causal = problem.objective is Objective.causal
        shape = (size, problem.max_length) if is_causal else (size,)
        labels = torch.zeros(shape, dtype=torch.long)
    return Batch(inputs=inputs, labels=labels, num_terms=size)


def _memory(
    config: ExperimentConfig, base: BaseModel, num_adapter: int, traffic: int, kept: int
) -> dict[str, dict[str, int]]:
    """Bytes by device and owner. Adapters and optimizers are float32, the base its own dtype."""
    weights = count_bytes([*base.module.parameters(), *base.module.buffers()])
    memory = {"base": {"base model": weights, "kept for the backward pass": kept}}
    num_trained = num_adapter
    owner = memory["base"]
    if config.method.name is MethodName.ft:
        num_trained = base.num_parameters
    elif config.method.name is MethodName.lora:
        owner["adapters"] = num_adapter * FLOAT32_BYTES
    else:
        merged = config.merge.mode is MergeMode.merged
        if config.offload.name is not OffloadTarget.none:
            owner = memory["host"] = {"adaptation data in flight, at most": 2 * traffic}
            if not merged:
                memory["base"]["adapters"] = _bank_bytes(base, num_adapter)
        owner["adapters"] = num_adapter * FLOAT32_BYTES
        if merged:
            keeper = "base" if config.merge.pristine is Pristine.base else "host"
            memory.setdefault(keeper, {})["pristine weights"] = _merged_bytes(base)
    moments = 2 if config.optimizer.name is OptimizerName.adamw else 1
    owner["gradients"] = num_trained * FLOAT32_BYTES
    owner["optimizer"] = moments * num_trained * FLOAT32_BYTES
    return memory


def _bank_bytes(base: BaseModel, num_adapter: int) -> int:
    return num_adapter * next(base.module.parameters()).element_size()


def _merged_bytes(base: BaseModel) -> int:
    return count_bytes(
        base.module.get_submodule(site).get_parameter("weight") for site in base.sites
    )
