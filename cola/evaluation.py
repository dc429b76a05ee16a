"""Scores a model on a split: the task's metric and its loss."""

import torch
from torch import nn

from cola.batches import evaluation_batches
from cola.interfaces import Split, TaskData
from cola.objectives import predict, task_loss


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, task: TaskData, *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Metrics of a model in evaluation mode; the first is the one a run is judged by.

    Returns:
        The task's metrics, then `loss`, the mean over all scored terms of the split.
    """
    objective = task.problem.objective
    predictions, references = [], []
    loss = torch.zeros((), device=device, dtype=torch.float64)
    num_terms = 0
    for batch in evaluation_batches(split, task, batch_size=batch_size, device=device):
        logits = model(**batch.inputs).logits
        predicted, wanted = predict(objective, logits.float(), batch)
        predictions.append(predicted)
        references.append(wanted)
        loss += task_loss(objective, logits, batch) * batch.num_terms
        num_terms += batch.num_terms
    scores = task.score(
        predictions=torch.cat(predictions).cpu(), references=torch.cat(references).cpu()
    )
    return {**scores, "loss": (loss / max(num_terms, 1)).item()}
