"""What a run holds on each device, by owner, told from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cola.adapter_plan import MOMENTS, AdapterPlan
from cola.config.choices import ClipMode, MergeMode, MethodName, OffloadTarget, Pristine
from cola.config.schema import ExperimentConfig
from cola.meters import count_bytes
from cola.models import BaseModel
from cola.offload.placing import STEPPED_TOGETHER, blocks_of, num_host_threads
from cola.offload.worker import MAX_PENDING
from cola.sites import SiteName

FLOAT32_BYTES = 4

Memory = dict[str, dict[str, int]]
"""Bytes by device, `base` or `host` (where adapters are offloaded to), and by owner."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave the base device in a step, by the site that sends them.

    Attributes:
        inputs: hidden inputs, each once, in the forward pass.
        others: hidden gradients, or adapters' gradients, in the backward pass.
    """

    inputs: Mapping[SiteName, int] = field(default_factory=dict)
    others: Mapping[SiteName, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of all sites."""
        return sum(self.inputs.values()) + sum(self.others.values())

    def of(self, block: Sequence[SiteName]) -> int:
        """Of some sites."""
        return sum(sent.get(site, 0) for site in block for sent in (self.inputs, self.others))


NO_TRAFFIC = Traffic()


def plan_memory(
    config: ExperimentConfig,
    base: BaseModel,
    plan: AdapterPlan,
    *,
    traffic: Traffic = NO_TRAFFIC,
    kept: int = 0,
) -> Memory:
    """Memory of gradient learning, LoRA and full fine-tuning, without buffers of kernels.

    Adapters and optimizers are float32, the base model has its own dtype.

    Args:
        config: of the run.
        base: with weights, or on the meta device.
        plan: its adapters.
        traffic: what leaves the base device in a step.
        kept: bytes that are kept for the backward pass.
    """
    memory = base_memory(config, weight_bytes(base), kept)
    owner = memory["base"]
    if config.method.name is MethodName.ft:
        num_moments = MOMENTS[config.optimizer.name] * base.num_parameters
        add_training(owner, base.num_parameters, num_moments)
        return memory
    num_gradients = plan.num_fitted
    if config.method.name is MethodName.cola:
        merged = config.merge.mode is MergeMode.merged
        if config.offload.name is not OffloadTarget.none:
            in_flight = _in_flight(config, base, traffic)
            owner = memory["host"] = {"adaptation data in flight, at most": in_flight}
            num_gradients = _num_gradients(config, base, plan)
            if not merged:
                memory["base"]["adapters"] = bank_bytes(base, plan)
        if merged and config.merge.pristine is Pristine.base:
            memory["base"]["pristine weights"] = merged_bytes(base)
        elif merged:
            memory.setdefault("host", {})["pristine weights"] = merged_bytes(base)
            owner["merged weights"] = merged_bytes(base)  # until the base model has them
    owner["adapters"] = plan.num_stacked * FLOAT32_BYTES
    add_training(owner, num_gradients, plan.num_moments)
    return memory


def base_memory(config: ExperimentConfig, weights: int, kept: int) -> Memory:
    """The base model and what is kept for its backward pass."""
    memory = {"base": {"base model": weights}}
    keeper = "host" if config.method.activation_offload else "base"
    memory.setdefault(keeper, {})["kept for the backward pass"] = kept
    return memory


def add_training(owner: dict[str, int], num_gradients: int, num_moments: int) -> None:
    """Adds gradients and optimizer states."""
    owner["gradients"] = num_gradients * FLOAT32_BYTES
    owner["optimizer"] = num_moments * FLOAT32_BYTES


def weight_bytes(base: BaseModel) -> int:
    """Of parameters and buffers."""
    return count_bytes([*base.module.parameters(), *base.module.buffers()])


def bank_bytes(base: BaseModel, plan: AdapterPlan) -> int:
    """Of the adapters beside their sites."""
    return plan.num_stacked * next(base.module.parameters()).element_size()


def merged_bytes(base: BaseModel) -> int:
    """Of the weights that adapters are merged into."""
    return count_bytes(
        base.module.get_submodule(site).get_parameter("weight") for site in base.sites
    )


def _in_flight(config: ExperimentConfig, base: BaseModel, traffic: Traffic) -> int:
    """Bytes of what has left and is not counted in: of two steps, or of what a host's workers have.

    All inputs of a batch leave before its first gradient; of the one before it only those blocks
    are left whose fits the base model need not wait for.
    """
    if config.offload.name is not OffloadTarget.cpu:
        return 2 * traffic.total
    waiting = _num_in_turn(config) * max(map(traffic.of, blocks_of(list(base.sites))), default=0)
    return min(2 * traffic.total, sum(traffic.inputs.values()) + waiting)


def _num_in_turn(config: ExperimentConfig) -> int:
    """Blocks that a host's workers have: those that wait and one that is fitted, each."""
    return num_host_threads(config.offload.workers) * (MAX_PENDING + 1)


def _num_gradients(config: ExperimentConfig, base: BaseModel, plan: AdapterPlan) -> int:
    """Values of gradients at a time; on a host large adapters step one by one, as data comes."""
    on_host = config.offload.name is OffloadTarget.cpu
    together = config.trainer.interval > 1 or config.optimizer.clip is ClipMode["global"]
    if together or not on_host:
        return plan.num_fitted
    sizes = [sum(map(plan.num_fitted_at, block)) for block in blocks_of(list(base.sites))]
    large = [size for size in sizes if size > STEPPED_TOGETHER]
    at_once = _num_in_turn(config) * max(large, default=0)
    return plan.num_fitted - sum(large) + min(sum(large), at_once)
