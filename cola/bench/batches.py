"""Batches of made-up rows, laid out as a task's collator lays out real ones; no data is read.

Tokens and pixels are random: neither time nor memory depends on them. Lengths do matter, since
rows of padding need not travel: beside full rows there are those of two of the paper's sets, in a
form that a batch of any size meets evenly. Shapes: B rows, T tokens.
"""

import dataclasses
import math
import random
from collections.abc import Sequence

import torch

from cola.bench.row import BenchRow
from cola.config.choices import Objective, RowLengths
from cola.models import BaseModel
from cola.task_data import Batch, Example, Problem
from cola.tasks.collate import build_text_collator, collate_images
from cola.tasks.encoding import IGNORED
from cola.user_rows import UserRows

_FIRST_WORD = 5  # ids below are special tokens of most vocabularies
_RESPONSE_SHARE = 1 / 3  # of a row's tokens, at its end; the prompt before is not scored

# Smallest, every tenth part and largest of the tokens of real rows, special tokens included, as
# MiniLM's word pieces count them: CoLA's 8,551 training sentences, and 151 unaltered rows of
# Dolly's 15,011 with their contexts.
_DECILES: dict[RowLengths, tuple[int, ...]] = {
    RowLengths.cola: (6, 9, 10, 11, 12, 12, 13, 14, 16, 19, 49),
    RowLengths.dolly: (16, 28, 46, 64, 95, 120, 164, 193, 304, 437, 1810),
}


def row_lengths(lengths: RowLengths, num_rows: int, longest: int, *, seed: int) -> list[int]:
    """Tokens of each row: evenly spaced quantiles of the distribution, in a seeded order.

    Args:
        lengths: which distribution.
        num_rows: B.
        longest: what longer rows are cut to.
        seed: of the order alone: every seed has the same lengths.
    """
    if lengths is RowLengths.full:
        return [longest] * num_rows
    deciles = _DECILES[lengths]
    found = []
    for index in range(num_rows):
        place = (index + 0.5) / num_rows * (len(deciles) - 1)
        low = int(place)
        tokens = deciles[low] + (place - low) * (deciles[low + 1] - deciles[low])
        found.append(min(round(tokens), longest))
    random.Random(seed).shuffle(found)
    return found


def build_batches(
    row: BenchRow, base: BaseModel, problem: Problem, lengths: RowLengths
) -> list[Batch]:
    """What a row is measured on, over and over: one batch, or several where users take turns.

    With K users and fewer rows than users, batches follow one another until every user had a row;
    with more, users have as equal parts as can be. Users without a row do not step, as in any run.

    Args:
        row: says how many rows and users.
        base: of the row; batches lie on its device.
        problem: what the model is built for.
        lengths: of text.
    """
    examples = _examples(row, base, problem, lengths)
    collated = _collate(row, base, problem, examples)
    device = next(base.module.parameters()).device
    if not row.config.users.name.owns_adapters:
        return [collated.to(device)]
    return [
        dataclasses.replace(collated, rows=rows).to(device)
        for rows in _deal_rows(row.batch_size, row.num_users)
    ]


def count_tokens(batch: Batch, problem: Problem) -> tuple[int, int]:
    """Tokens of a batch, all and without padding, of sources and targets; of images, images."""
    if problem.objective is Objective.image:
        return len(batch.labels), len(batch.labels)
    total = batch.inputs["input_ids"].numel()
    real = int(batch.inputs["attention_mask"].sum())
    if problem.objective is Objective.seq2seq:
        total += batch.labels.numel()
        real += int((batch.labels != IGNORED).sum())
    return total, real


def _deal_rows(num_rows: int, num_users: int) -> list[UserRows]:
    """Whose rows successive batches have."""
    if num_rows < num_users:
        starts = range(0, num_users, num_rows)
        parts = [range(start, min(start + num_rows, num_users)) for start in starts]
        # The last batch is as large as the others: the first users have rows in it again.
        parts[-1] = range(num_users - num_rows, num_users)
        return [UserRows(users=tuple(part), counts=(1,) * num_rows) for part in parts]
    share, rest = divmod(num_rows, num_users)
    counts = tuple(share + (user < rest) for user in range(num_users))
    return [UserRows(users=tuple(range(num_users)), counts=counts)]


def _collate(
    row: BenchRow, base: BaseModel, problem: Problem, examples: Sequence[Example]
) -> Batch:
    if problem.objective is Objective.image:
        return collate_images(examples)
    assert base.tokenizer is not None
    collate = build_text_collator(
        row.config.task,
        problem.objective,
        base.tokenizer,
        decoder_start_id=base.decoder_start_id,
    )
    return collate(examples)


def _examples(
    row: BenchRow, base: BaseModel, problem: Problem, lengths: RowLengths
) -> list[Example]:
    """One encoded row for each row of the batch."""
    generator = torch.Generator().manual_seed(row.config.seed)
    if problem.objective is Objective.image:
        assert problem.image_shape is not None
        pixels = torch.randn(row.batch_size, *problem.image_shape, generator=generator)
        labels = torch.randint(problem.num_labels, (row.batch_size,), generator=generator)
        return [
            {"pixels": one, "label": int(label)} for one, label in zip(pixels, labels, strict=True)
        ]
    tokens = row_lengths(lengths, row.batch_size, problem.max_length, seed=row.config.seed)
    return [_text(num, base, problem, generator) for num in tokens]


def _text(num: int, base: BaseModel, problem: Problem, generator: torch.Generator) -> Example:
    """A row of `num` tokens for a model of any kind; it ends in EOS, as real rows do."""

    def words(count: int) -> torch.Tensor:
        ids = torch.randint(_FIRST_WORD, _vocabulary(base) - 1, (count,), generator=generator)
        if (end := getattr(base.tokenizer, "eos_token_id", None)) is not None:
            ids[-1] = end
        return ids

    ids, response = words(num), max(1, math.ceil(num * _RESPONSE_SHARE))
    if problem.objective is Objective.causal:
        labels = ids.clone()
        labels[: num - response] = IGNORED
        return {"input_ids": ids, "labels": labels}
    if problem.objective is Objective.seq2seq:
        full = num == problem.max_length
        return {"input_ids": ids, "labels": words(num if full else response)}
    if problem.objective is Objective.regression:
        return {"input_ids": ids, "label": 0.5}
    label = int(torch.randint(problem.num_labels, (1,), generator=generator))
    return {"input_ids": ids, "label": label}


def _vocabulary(base: BaseModel) -> int:
    """Token ids that the model knows."""
    embedding = base.module.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.num_embeddings)
