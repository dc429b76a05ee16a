"""One training batch forward on the meta device: what a step would keep for its backward pass.

Shapes and types are those of the real model; no tensor holds values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cola.config.choices import Objective
from cola.config.schema import ExperimentConfig
from cola.errors import ConfigError
from cola.meters import count_bytes
from cola.objectives import task_loss
from cola.task_data import Batch, Problem


def kept_bytes(
    config: ExperimentConfig,
    problem: Problem,
    model: nn.Module,
    *,
    held: Sequence[Tensor],
    also: Sequence[Tensor] = (),
) -> int:
    """Bytes that one batch keeps for the backward pass.

    Args:
        config: of the batch's size, and whether what is kept waits on the CPU.
        problem: of the batch's shape.
        model: on the meta device, in training mode.
        held: weights, which the step keeps as well, but which are held anyway.
        also: what hooks of the model keep; read after the forward pass.

    Raises:
        ConfigError: the model looks at values.
    """
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    # torch's dispatch modes are not typed.
    answers = _NothingPadded()  # type: ignore[no-untyped-call]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), answers:
        batch = _meta_batch(problem, config.trainer.batch_size)
        try:
            task_loss(problem.objective, model(**batch.inputs).logits, batch)
        except NotImplementedError as error:  # BART and T5 pick a classifier's row by its values
            raise ConfigError(
                f"dry_run=true: {config.model.path or config.model.name} takes a path that depends "
                "on the values of its inputs, which a dry run has none of; use "
                "trainer.max_steps=1 instead"
            ) from error
    if config.method.activation_offload:  # every use is a copy of its own, weights among them
        return sum(tensor.nbytes for tensor in kept)
    return count_bytes([*held, *kept, *also]) - count_bytes(held)


class _NothingPadded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what transformers asks of the inputs' values, which do not exist here.

    It asks whether all tokens are real, and whether all belong to one text: yes.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def _meta_batch(problem: Problem, size: int) -> Batch:
    with torch.device("meta"):
        if problem.image_shape is not None:
            inputs = {"pixels": torch.zeros(size, *problem.image_shape)}
        else:
            tokens = torch.zeros(size, problem.max_length, dtype=torch.long)
            inputs = {"input_ids": tokens, "attention_mask": tokens}
            if problem.objective is Objective.seq2seq:
                inputs["decoder_input_ids"] = tokens
        writes = problem.objective in (Objective.causal, Objective.seq2seq)
        shape = (size, problem.max_length) if writes else (size,)
        labels = torch.zeros(shape, dtype=torch.long)
    return Batch(inputs=inputs, labels=labels, num_terms=size)
