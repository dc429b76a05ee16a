"""Text tasks from rows in plain words: a model writes a target, or gives a label.

An encoder-decoder reads the source and writes the target; a causal model continues the source with
the target. Where rows come from and how a source is worded is up to the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cola.config.choices import Objective
from cola.task_data import Split, TaskData
from cola.tasks.collate import build_prompt_collator, build_text_collator
from cola.tasks.encoding import (
    TaskRequest,
    encode_pairs,
    encode_responses,
    encode_texts,
    require_tokenizer,
)
from cola.tasks.fields import check_labels
from cola.tasks.splits import NamedRows, Splits


@dataclass(frozen=True, slots=True)
class TextRow:
    """One row to write an answer to, before encoding.

    Attributes:
        source: what the model is given, word for word.
        target: what it has to write, and what its text is compared with.
        user: who owns the row, where the data names somebody.
    """

    source: str
    target: str
    user: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledRow:
    """One row to classify, or to predict the value of, before encoding.

    Attributes:
        text: what the model is given.
        label: class or value.
        user: who owns the row, where the data names somebody.
    """

    text: str
    label: float
    user: str | None = None


def build_text_task(request: TaskRequest, name: str, splits: Splits[TextRow]) -> TaskData:
    """Encode the splits of a writing task.

    Args:
        request: its objective, `seq2seq` or `causal`, decides the form of the rows.
        name: the set, for messages and the run's summary.
        splits: targets are not empty.

    Raises:
        ConfigError: the model has no tokenizer, or it or `task.max_length` does not fit.
    """
    tokenizer, objective = require_tokenizer(request), request.problem.objective
    return TaskData(
        name=name,
        problem=request.problem,
        train=_encode(request, name, splits.train, is_scored=False),
        selection=_encode(request, name, splits.selection, is_scored=True),
        report=_encode(request, name, splits.report, is_scored=True),
        collate=build_text_collator(
            request.task, objective, tokenizer, decoder_start_id=request.decoder_start_id
        ),
        score=request.score,
        collate_prompts=build_prompt_collator(objective, tokenizer),
        tokenizer=tokenizer,
    )


def build_labelled_task(
    request: TaskRequest,
    name: str,
    splits: Splits[LabelledRow],
    *,
    label_names: Sequence[str] = (),
) -> TaskData:
    """Encode the splits of a task of classes or values.

    Args:
        request: its objective is `classification` or `regression`.
        name: the set, for messages and the run's summary.
        splits: rows in plain words.
        label_names: of the classes, where they have names.

    Raises:
        ConfigError: the model has no tokenizer.
        DataError: a label is out of range.
    """
    tokenizer = require_tokenizer(request)
    for split in (splits.train, splits.selection, splits.report):
        labels = [{"label": row.label} for row in split.rows]
        check_labels(labels, request.problem, f"{name} ({split.name})")
    return TaskData(
        name=name,
        problem=request.problem,
        train=encode_labelled(request, name, splits.train),
        selection=encode_labelled(request, name, splits.selection),
        report=encode_labelled(request, name, splits.report),
        collate=build_text_collator(request.task, request.problem.objective, tokenizer),
        score=request.score,
        tokenizer=tokenizer,
        label_names=label_names,
    )


def encode_labelled(request: TaskRequest, name: str, split: NamedRows[LabelledRow]) -> Split:
    """Tokens of one split of a task of classes or values, whose labels are in range.

    Args:
        request: see `build_labelled_task`.
        name: the set, for the log.
        split: rows in plain words.
    """
    rows = encode_texts(
        [row.text for row in split.rows],
        [row.label for row in split.rows],
        tokenizer=require_tokenizer(request),
        max_length=request.problem.max_length,
        name=f"{name} ({split.name})",
    )
    return Split(name=split.name, rows=rows.with_values(_users(split)))


def _users(split: NamedRows[TextRow] | NamedRows[LabelledRow]) -> dict[str, Sequence[Any]]:
    users = [row.user for row in split.rows]
    return {"user": users} if any(users) else {}


def _encode(
    request: TaskRequest, name: str, split: NamedRows[TextRow], *, is_scored: bool
) -> Split:
    """Tokens of a split; what a scored one is compared with stays text."""
    encode = encode_pairs if request.problem.objective is Objective.seq2seq else encode_responses
    values: dict[str, Sequence[Any]] = {}
    if is_scored:
        values["reference"] = [row.target for row in split.rows]
    rows = encode(
        [row.source for row in split.rows],
        [row.target for row in split.rows],
        tokenizer=require_tokenizer(request),
        max_length=request.problem.max_length,
        name=f"{name} ({split.name})",
        with_prompts=is_scored,
    )
    return Split(name=split.name, rows=rows.with_values({**values, **_users(split)}))
