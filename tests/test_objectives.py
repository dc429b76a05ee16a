"""Losses of models that write: against the formula, and without a copy of the logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cola.config.choices import Objective
from cola.objectives import IGNORED, row_losses, task_loss
from cola.task_data import Batch
from tests.tolerances import EXACT


def written(objective: Objective) -> tuple[Tensor, Batch]:
    """Logits of three rows of four tokens, and a batch; every row scores other positions."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[IGNORED, 1, 2, 3], [IGNORED, IGNORED, 5, IGNORED], [4, IGNORED, 0, 6]])
    scored = labels[:, 1:] if objective is Objective.causal else labels
    row_terms = (scored != IGNORED).sum(dim=1)
    return logits, Batch(
        inputs={}, labels=labels, num_terms=int(row_terms.sum()), row_terms=row_terms
    )


def sliced(objective: Objective, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of every row's losses, (B,), as the formula has it."""
    if objective is Objective.causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = -functional.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0)[..., None])
    return (losses[..., 0] * (labels != IGNORED)).sum(dim=1)


class Memories(TorchDispatchMode):
    """Keeps what operations answer with that is as large as the logits."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.num, self.large = num, list[Tensor]()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = call(*args, **(kwargs or {}))
        if isinstance(answer, Tensor) and answer.numel() > self.num // 2:
            self.large.append(answer)
        return answer


@pytest.mark.parametrize("objective", [Objective.causal, Objective.seq2seq])
def test_loss_and_gradient_are_the_formulas(objective: Objective) -> None:
    logits, batch = written(objective)
    rows = sliced(objective, logits, batch.labels)
    (wanted,) = torch.autograd.grad(rows.sum() / batch.num_terms, logits)
    loss = task_loss(objective, logits, batch)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, rows.sum() / batch.num_terms, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(row_losses(objective, logits, batch), rows, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("objective", [Objective.causal, Objective.seq2seq])
@pytest.mark.parametrize("loss", [task_loss, row_losses])
def test_logits_are_not_copied(loss: Any, objective: Objective) -> None:
    logits, batch = written(objective)
    with Memories(logits.numel()) as memories:
        loss(objective, logits, batch)
    places = {tensor.untyped_storage().data_ptr() for tensor in memories.large}
    assert len(places - {logits.data_ptr()}) == 1  # their logarithms of probabilities
