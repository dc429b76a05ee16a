"""`dry_run=true`: what a run would adapt, move and hold, without weights, data or network.

The base model is built on the meta device and run forward once on a full batch, so that shapes,
bytes on the wire and tensors saved for the backward pass are those of the real model.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cola.adapter_plan import MOMENTS, AdapterPlan, plan_adapters
from cola.baselines.methods import build_peft_method
from cola.config.choices import (
    MergeMode,
    MethodName,
    OffloadTarget,
    Payload,
    Pristine,
    WireDType,
)
from cola.config.schema import ExperimentConfig
from cola.experiment import build_problem, check_sites
from cola.memory_plan import (
    FLOAT32_BYTES,
    Traffic,
    add_training,
    bank_bytes,
    base_memory,
    merged_bytes,
    plan_memory,
    weight_bytes,
)
from cola.meta_trace import kept_bytes
from cola.meters import MIB
from cola.models import BaseModel, build_base_model
from cola.report.text import format_table, print_text
from cola.sites import SiteName
from cola.task_data import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """Facts of a run before it starts.

    Attributes:
        sites: number of sites, M.
        base_parameters: of the frozen base model.
        users: K; 1 where one set of adapters is for everyone.
        trainable_parameters: of the method, of all users together.
        wire_out_bytes: what leaves in one step: hidden inputs and gradients, dense, or, with
            `offload.payload=gradient`, the adapters' gradients that are formed of them.
        wire_back_bytes: what one adaptation sends back.
        memory_bytes: by device, then by owner.
    """

    sites: int
    base_parameters: int
    users: int
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
        ["users with adapters (K)", f"{dry.users:,}"],
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
    problem = build_problem(config)
    base = build_base_model(config.model, problem, seed=config.seed, on_meta=True)
    check_sites(config, base)
    if config.method.name not in (MethodName.cola, MethodName.ft, MethodName.lora):
        return _estimate_peft(config, problem, base)
    plan = plan_adapters(config, base.sites)
    trains_all = config.method.name is MethodName.ft
    traffic, kept = _trace(config, problem, base, plan)
    offloads = (
        config.method.name is MethodName.cola and config.offload.name is not OffloadTarget.none
    )
    return DryRun(
        sites=len(base.sites),
        base_parameters=base.num_parameters,
        users=plan.num_users,
        trainable_parameters=base.num_parameters if trains_all else plan.num_trained,
        wire_out_bytes=traffic.total if offloads else 0,
        wire_back_bytes=_back_bytes(config, base, plan) if offloads else 0,
        memory_bytes=plan_memory(config, base, plan, traffic=traffic, kept=kept),
    )


def _estimate_peft(config: ExperimentConfig, problem: Problem, base: BaseModel) -> DryRun:
    """The facts of a method that the PEFT library adds to the base model."""
    weights, base_parameters = weight_bytes(base), base.num_parameters
    # The horizon decides when AdaLoRA takes ranks away, not how many it starts with.
    method = build_peft_method(config, base, problem.objective, adaptations=1)
    model = method.model.train().requires_grad_(False)
    for parameter in method.trainable.values():
        parameter.requires_grad_(True)
    num_trained = sum(parameter.numel() for parameter in method.trainable.values())
    kept = kept_bytes(config, problem, model, held=list(model.parameters()))
    memory = base_memory(config, weights, kept)
    memory["base"]["adapters"] = num_trained * FLOAT32_BYTES
    add_training(memory["base"], num_trained, MOMENTS[config.optimizer.name] * num_trained)
    return DryRun(
        sites=len(base.sites),
        base_parameters=base_parameters,
        users=1,
        trainable_parameters=num_trained,
        wire_out_bytes=0,
        wire_back_bytes=0,
        memory_bytes=memory,
    )


def _trace(
    config: ExperimentConfig, problem: Problem, base: BaseModel, plan: AdapterPlan
) -> tuple[Traffic, int]:
    """Runs one training batch forward on the meta device.

    Returns:
        What is sent (hidden inputs, each once, and hidden gradients, before rows of padding are
        left out; or adapters' gradients); and bytes kept for the backward pass.
    """
    method, offload = config.method.name, config.offload
    forms = offload.payload is Payload.gradient
    stays = offload.name is OffloadTarget.none or forms
    rounds = offload.wire_dtype is WireDType.bfloat16
    model = base.module.train().requires_grad_(method is MethodName.ft)
    inputs: Counter[SiteName] = Counter()
    others: Counter[SiteName] = Counter()
    sent: list[Tensor] = []
    kept: list[Tensor] = []
    # Makes the frozen model's hidden representations part of the graph, as the taps do.
    anchor = torch.zeros((), device="meta", requires_grad=True)

    def adapt(site: SiteName, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        # Both in the type that the site computes in; autocast is bfloat16, and unknown to meta.
        size = 2 if config.model.autocast or rounds else hidden.element_size()
        if forms:
            others[site] += plan.num_parameters(site) * (2 if rounds else FLOAT32_BYTES)
        else:
            others[site] += hidden.numel() * size
            if not any(args[0] is other for other in sent):
                sent.append(args[0])
                inputs[site] += args[0].numel() * size
        if method is MethodName.cola and stays:
            kept.append(args[0])  # until its gradient arrives
        if method is MethodName.cola and config.merge.mode is not MergeMode.unmerged:
            return hidden + anchor
        return torch.add(hidden, plan.output(site, args[0])) + anchor

    sites = () if method is MethodName.ft else base.sites
    for site in sites:
        model.get_submodule(site).register_forward_hook(partial(adapt, site))
    for parameter in plan.parameters():
        parameter.requires_grad_(method is MethodName.lora)
    weights = [*model.parameters(), *plan.parameters()]
    # The adapters' calls fill `kept` and what is sent.
    saved = kept_bytes(config, problem, model, held=weights, also=kept)
    return Traffic(inputs, others), saved


def _back_bytes(config: ExperimentConfig, base: BaseModel, plan: AdapterPlan) -> int:
    """What an adaptation sends back: parameters, merged weights, or what is added to them."""
    if config.merge.mode is not MergeMode.merged:
        return bank_bytes(base, plan)
    merged = merged_bytes(base)
    if config.merge.pristine is Pristine.host:
        return merged
    size = next(base.module.parameters()).element_size()
    return min(plan.num_stacked, merged // size) * FLOAT32_BYTES
