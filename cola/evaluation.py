"""Scores a model on a split: the task's metric, its loss, per user too, and samples to be read.

Models that classify are judged by their logits. Models that write are judged by the text they
generate, and their loss is that of the reference text (teacher forcing).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cola.batches import evaluation_batches
from cola.config.schema import EvaluationConfig, GenerationConfig
from cola.config.user_settings import list_names
from cola.errors import DataError
from cola.generation import generate_texts
from cola.objectives import predict, task_loss
from cola.row_views import pick_rows
from cola.task_data import Example, Split, TaskData, Values
from cola.user_rows import UserRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, str]
"""One prediction to be read: `input` (text tasks), `prediction`, `reference`, `user` if any."""

Route = Callable[[UserRows | None], None]
"""Tells a learner whose rows the next forward passes have."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one look at a split found.

    Attributes:
        scores: the task's metrics, the judged one first, then `loss`, the mean over all scored
            terms of the split.
        tokens_per_second: new tokens where the model writes, tokens read where it classifies;
            None for images.
        by_user: metrics of every user with rows, in the run's order; empty without users.
        samples: of the first rows.
    """

    scores: dict[str, float]
    tokens_per_second: float | None = None
    by_user: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def metrics(self, prefix: str) -> dict[str, float]:
        """All numbers as they are logged."""
        found = {f"{prefix}/{name}": value for name, value in self.scores.items()}
        if self.tokens_per_second is not None:
            found[f"{prefix}/tokens_per_second"] = self.tokens_per_second
        for user, scores in self.by_user.items():
            found |= {f"{prefix}/user/{user}/{name}": value for name, value in scores.items()}
        return found


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Predictions and references of a split's rows, N of each, and the rate at which they came."""

    predictions: Values
    references: Values
    tokens_per_second: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    task: TaskData,
    *,
    config: EvaluationConfig,
    generation: GenerationConfig,
    device: torch.device,
    route: Route,
    present: frozenset[int] | None,
) -> Evaluation:
    """Scores a model in evaluation mode.

    Args:
        model: adapted.
        split: rows to score.
        task: its metric judges.
        config: batch size and number of samples.
        generation: how models that write decode.
        device: the model's.
        route: of the learner.
        present: positions of users that take part: others have no say. None: all rows count.

    Raises:
        DataError: no row of the split is of a user that takes part.
    """
    split = split if present is None else _of_present(split, task, present)
    try:
        loss, answers = _read(model, split, task, config.batch_size, device, route)
        if answers is None:
            answers = _write(model, split, task, generation, device, route)
    finally:
        route(None)
    scores = task.score(predictions=answers.predictions, references=answers.references)
    return Evaluation(
        scores={**scores, "loss": loss},
        tokens_per_second=answers.tokens_per_second,
        by_user=_by_user(split, task, answers),
        samples=_samples(split, task, answers, config.num_samples),
    )


def _of_present(split: Split, task: TaskData, present: frozenset[int]) -> Split:
    """The split without rows of users that take no part."""
    assert split.owners is not None, "users that take part have rows"
    takes_part = torch.tensor([user in present for user in range(len(task.users))])
    kept = takes_part[split.owners].nonzero().flatten()
    if len(kept) == len(split.owners):
        return split
    if not len(kept):
        absent = [name for user, name in enumerate(task.users) if user not in present]
        raise DataError(
            f"{task.name} ({split.name}): no row is of a user that takes part now, for all are of "
            f"users that do not: {list_names(absent)}; change users.schedule, or trainer.eval_every"
        )
    return pick_rows(split, kept)


def _read(
    model: nn.Module,
    split: Split,
    task: TaskData,
    batch_size: int,
    device: torch.device,
    route: Route,
) -> tuple[float, _Answers | None]:
    """Mean loss of a split, and what the logits answer where the model classifies."""
    objective = task.problem.objective
    predictions, references, places = [], [], []
    loss = torch.zeros((), device=device, dtype=torch.float64)
    num_terms = 0
    start = time.perf_counter()
    for indices, batch in evaluation_batches(split, task, batch_size=batch_size, device=device):
        route(batch.rows)
        logits = model(**batch.inputs).logits
        loss += task_loss(objective, logits, batch) * batch.num_terms
        num_terms += batch.num_terms
        if not objective.writes:
            predicted, wanted = predict(objective, logits.float(), batch)
            predictions.append(predicted)
            references.append(wanted)
            places.append(indices)
    mean = (loss / max(num_terms, 1)).item()  # waits for the device
    if objective.writes:
        return mean, None
    seconds = time.perf_counter() - start
    order = torch.argsort(torch.cat(places))  # batches may have their rows user by user
    return mean, _Answers(
        predictions=torch.cat(predictions).cpu()[order],
        references=torch.cat(references).cpu()[order],
        tokens_per_second=_num_tokens(split) / seconds if task.tokenizer else None,
    )


def _write(
    model: nn.Module,
    split: Split,
    task: TaskData,
    generation: GenerationConfig,
    device: torch.device,
    route: Route,
) -> _Answers:
    owners = split.owners.tolist() if task.groups_users and split.owners is not None else None
    generated = generate_texts(
        model, split.rows, task, generation, device, owners=owners, route=route
    )
    return _Answers(
        predictions=generated.texts,
        references=[row["reference"] for row in split.rows],
        tokens_per_second=generated.tokens_per_second,
    )


def _num_tokens(split: Split) -> int:
    return sum(len(row["input_ids"]) for row in split.rows)


def _by_user(split: Split, task: TaskData, answers: _Answers) -> dict[str, dict[str, float]]:
    if split.owners is None:
        return {}
    counts = torch.bincount(split.owners, minlength=len(task.users)).tolist()
    own_rows = torch.split(torch.argsort(split.owners, stable=True), counts)
    return {
        user: task.score(
            predictions=_take(answers.predictions, own), references=_take(answers.references, own)
        )
        for user, own in zip(task.users, own_rows, strict=True)
        if len(own)
    }


def _take(values: Values, indices: Tensor) -> Values:
    return values[indices] if isinstance(values, Tensor) else [values[i] for i in indices.tolist()]


def _samples(split: Split, task: TaskData, answers: _Answers, num: int) -> list[Sample]:
    samples = []
    for index in range(min(num, len(split.rows))):
        sample = {
            "prediction": _as_text(answers.predictions[index], task.label_names),
            "reference": _as_text(answers.references[index], task.label_names),
        }
        if task.tokenizer is not None:
            sample = {"input": _input_text(split.rows[index], task.tokenizer), **sample}
        if split.owners is not None:
            sample["user"] = task.users[int(split.owners[index])]
        samples.append(sample)
    return samples


def _input_text(row: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the model was given, as it read it: cut to length, without special tokens."""
    ids = row.get("prompt_ids", row["input_ids"])
    text: Any = tokenizer.decode(ids, skip_special_tokens=True)
    return str(text).strip()


def _as_text(answer: Tensor | str, label_names: Sequence[str]) -> str:
    """A text as it is, a class by its name or number, a value with four digits."""
    if isinstance(answer, str):
        return answer
    if answer.is_floating_point():
        return f"{answer.item():.4g}"
    return label_names[int(answer)] if label_names else str(int(answer))
