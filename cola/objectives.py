"""Task losses and predictions from a base model's logits.

Every loss is a mean over its scored terms; hidden gradients carry that mean to the adapters.
"""

from torch import Tensor
from torch.nn import functional

from cola.config.choices import Objective
from cola.interfaces import Batch

IGNORED = -100
"""Label of a token that is not scored."""


def task_loss(objective: Objective, logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss over the batch's scored terms, a scalar.

    Args:
        objective: what is scored.
        logits: (B, classes), (B, 1) for regression, (B, T, vocabulary) for causal models.
        batch: labels (B,) or (B, T); a batch without any scored term has loss 0.
    """
    if objective is Objective.regression:
        return functional.mse_loss(logits.squeeze(-1), batch.labels.to(logits.dtype))
    if objective is Objective.causal:
        predicted, labels = logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        total = functional.cross_entropy(predicted, labels, ignore_index=IGNORED, reduction="sum")
        return total / max(batch.num_terms, 1)
    return functional.cross_entropy(logits, batch.labels)


def predict(objective: Objective, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and references of the scored terms, both (N,)."""
    if objective is Objective.regression:
        return logits.squeeze(-1), batch.labels
    if objective is Objective.causal:
        labels = batch.labels[:, 1:]
        is_scored = labels != IGNORED
        return logits[:, :-1].argmax(dim=-1)[is_scored], labels[is_scored]
    return logits.argmax(dim=-1), batch.labels
