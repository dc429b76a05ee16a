"""Task losses and predictions from a base model's logits.

Every loss is a mean over its scored terms; hidden gradients carry that mean to the adapters.
"""

import torch
from torch import Tensor
from torch.nn import functional

from cola.config.choices import Objective
from cola.task_data import Batch

IGNORED = -100
"""Label of a token that is not scored."""


def task_loss(objective: Objective, logits: Tensor, batch: Batch) -> Tensor:
    """Mean loss over the batch's scored terms, a scalar; in float32 at least.

    Args:
        objective: what is scored.
        logits: (B, classes), (B, 1) for regression, (B, T, vocabulary) for models that write.
        batch: labels (B,) or (B, T); a batch without any scored term has loss 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if objective is Objective.regression:
        return functional.mse_loss(logits.squeeze(-1), batch.labels.to(logits.dtype))
    if objective.writes:
        return _token_loss(logits, _targets(objective, batch.labels), batch.num_terms)
    return functional.cross_entropy(logits, batch.labels)


def row_losses(objective: Objective, logits: Tensor, batch: Batch) -> Tensor:
    """The same loss row by row, (B,): summed over a row's scored terms, not averaged.

    Nothing of a row reaches another's gradient, not even a value that is not a number.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch.labels
    if objective is Objective.regression:
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square()
    if objective.writes:
        labels = _targets(objective, labels)
        terms = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return terms.view_as(labels).sum(dim=1)
    return functional.cross_entropy(logits, labels, reduction="none")


def _targets(objective: Objective, labels: Tensor) -> Tensor:
    """The token that each position is to predict, (B, T).

    A decoder predicts its own next token; what an encoder-decoder reads is shifted already. Labels
    are moved, not logits, which would be copied: of a large vocabulary they take gigabytes.
    """
    if objective is Objective.causal:
        return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return labels


def _token_loss(logits: Tensor, labels: Tensor, num_terms: int) -> Tensor:
    total = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / max(num_terms, 1)


def predict(objective: Objective, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and references of rows, both (B,); models that write generate theirs instead."""
    if objective is Objective.regression:
        return logits.squeeze(-1), batch.labels
    return logits.argmax(dim=-1), batch.labels
