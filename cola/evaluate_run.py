"""The body of `cola-evaluate`: a run's checkpoint, scored or asked to write, without touching it.

The model, the task and the learner are built as the run builds them, and its state is loaded. The
run may be going on: its folder is only read, and gets a file in `evaluations/`.
"""

import dataclasses
import json
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cola.checkpoint import NEW_PARAMETERS, peek_state, restore_parameters
from cola.config.choices import EvaluationMerge, Objective
from cola.config.evaluation import EvaluationRequest
from cola.config.keys import nearest_words
from cola.config.user_settings import list_names
from cola.errors import ConfigError
from cola.evaluation import Evaluation, evaluate
from cola.experiment import build_base_and_task, build_run_learner
from cola.generation import generate_texts
from cola.interfaces import Learner
from cola.report.text import format_table, print_text
from cola.run_report import MERGE_WORDS, evaluates_merged
from cola.runtime import resolve_device
from cola.task_data import Example, Split, TaskData
from cola.tasks.encoding import IGNORED
from cola.tasks.tokenizing import end_of, tokenize, tokenize_prompts

logger = logging.getLogger(__name__)

FOLDER = "evaluations"
SHOWN_SAMPLES = 3


def evaluate_run(request: EvaluationRequest) -> dict[str, Any]:
    """Evaluates as requested, prints the answer and writes it to the run's `evaluations/`.

    Returns:
        What was written.

    Raises:
        ConfigError: the run has no checkpoint yet, its model writes no text to answer with, or it
            is not said which user's adapters answer.
        ColaError: the model or the data cannot be had.
    """
    config = request.config
    state = _load_state(request)
    base, task = build_base_and_task(config)
    if request.prompt is not None and not task.problem.objective.writes:
        raise ConfigError(
            f"prompt={request.prompt}: the model of this run answers with a class or a value, not "
            "with text; leave prompt out to score a split"
        )
    owner = None if request.prompt is None else _owner(request, task)
    if (drawn := request.run_dir / NEW_PARAMETERS).exists():
        restore_parameters(base.module, load_file(drawn))
    learner = build_run_learner(config, base, task)
    try:
        learner.load_state_dict(state["learner"])
        if request.prompt is None:
            answer = _score(request, learner, task)
        else:
            answer = _write(request, learner, task, owner)
    finally:
        learner.close()
    step = state["step"] if "step" in state else state["progression"]["step"]
    result = {
        "run": request.run_dir.name,
        "checkpoint": "newest" if request.newest else "best",
        "step": step,
        **answer,
    }
    path = _save(request.run_dir, result)
    logger.info("step %d of %s, written to %s", step, request.run_dir.name, path)
    return result


def _load_state(request: EvaluationRequest) -> dict[str, Any]:
    state = peek_state(request.run_dir / "checkpoints", newest=request.newest)
    if state is None:
        other = (
            "checkpoint=newest has what was saved last, if anything; " if not request.newest else ""
        )
        raise ConfigError(
            f"run={request.run_dir}: no {'' if request.newest else 'best '}checkpoint yet; {other}"
            "wait for the run's first evaluation (trainer.eval_every, checkpoint.every)"
        )
    return state


def _score(request: EvaluationRequest, learner: Learner, task: TaskData) -> dict[str, Any]:
    """Splits as the run scores them; with `evaluation.merge=both` the other way, too."""
    config = request.config
    merged = evaluates_merged(config)
    found = _look(request, learner, task, None)
    answer: dict[str, Any] = {"merge": MERGE_WORDS[merged], "splits": _described(found)}
    if config.evaluation.merge is EvaluationMerge.both and merged is not None:
        print_text(f"{MERGE_WORDS[merged]}:\n")
        _print(found)
        found = _look(request, learner, task, not merged)
        answer["unmerged" if merged else "merged"] = _described(found)
        print_text(f"\n{MERGE_WORDS[not merged]}:\n")
    _print(found)
    return answer


def _described(found: dict[str, Evaluation]) -> dict[str, Any]:
    return {name: vars(evaluation) for name, evaluation in found.items()}


def _print(found: dict[str, Evaluation]) -> None:
    print_text(_table(found))
    for evaluation in found.values():
        _show(evaluation.samples[:SHOWN_SAMPLES])


def _look(
    request: EvaluationRequest, learner: Learner, task: TaskData, merged: bool | None
) -> dict[str, Evaluation]:
    """What the asked splits' rows get, adapters being inside the weights or beside them."""
    config = request.config
    with learner.evaluating(merged) as model:
        return {
            split.name: evaluate(
                model,
                split,
                task,
                config=config.evaluation,
                generation=config.generation,
                device=resolve_device(config.device),
                route=learner.route,
                present=learner.present_users(),
            )
            for split in _splits(request.split, task)
        }


def _write(
    request: EvaluationRequest, learner: Learner, task: TaskData, owner: int | None
) -> dict[str, Any]:
    config = request.config
    assert request.prompt is not None
    row = {"prompt_ids": torch.tensor(_prompt_ids(request.prompt, task))}
    with learner.evaluating() as model:
        generated = generate_texts(
            model,
            [row],
            task,
            config.generation,
            resolve_device(config.device),
            owners=None if owner is None else [owner],
            route=learner.route,
        )
    print_text(generated.texts[0])
    return {
        "merge": MERGE_WORDS[evaluates_merged(config)],
        "prompt": request.prompt,
        "user": request.user,
        "text": generated.texts[0],
        "tokens_per_second": generated.tokens_per_second,
    }


def _owner(request: EvaluationRequest, task: TaskData) -> int | None:
    """Position of the user whose adapters answer; None where all rows meet the same ones."""
    if not task.groups_users or evaluates_merged(request.config):
        if request.user is not None:
            raise ConfigError(
                f"user={request.user}: adapters are merged, so that everybody gets one answer; "
                "leave user out, or set evaluation.merge=unmerged"
            )
        return None
    if request.user in task.users:
        return task.users.index(request.user)
    problem = (
        "prompt: adapters are each user's own, and it is not said whose answer; add"
        if request.user is None
        else f"user={request.user}: no such user; {nearest_words(request.user, task.users)}write"
    )
    raise ConfigError(f"{problem} user=NAME, of {list_names(task.users)}")


def _prompt_ids(prompt: str, task: TaskData) -> Sequence[int]:
    """Tokens of a text, cut as those of the task's rows are."""
    assert task.tokenizer is not None
    length = task.problem.max_length
    if task.problem.objective is Objective.causal:
        (ids,) = tokenize_prompts([prompt], task.tokenizer)
        ids = end_of(ids, length, task.tokenizer)
        if not ids:
            raise ConfigError("prompt: holds no token; give a text to go on from")
        return ids
    ((row, _),) = tokenize([prompt], task.tokenizer, length)
    return row["input_ids"]


def _splits(name: str, task: TaskData) -> list[Split]:
    if name == "report":
        return [task.report, *task.extra_report]
    if name == "selection":
        return [task.selection]
    if not task.problem.objective.writes:
        return [task.train]
    rows = [_with_prompt(row, task) for row in task.train.rows]
    return [dataclasses.replace(task.train, rows=rows)]


def _with_prompt(row: Example, task: TaskData) -> Example:
    """A training row as a scored one: rows to learn from hold prompt and answer as tokens alone."""
    labels = row["labels"]
    assert task.tokenizer is not None
    is_causal = task.problem.objective is Objective.causal
    prompt = row["input_ids"][labels == IGNORED] if is_causal else row["input_ids"]
    text: Any = task.tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
    return {**row, "prompt_ids": prompt, "reference": str(text).strip()}


def _table(found: dict[str, Evaluation]) -> str:
    names = list(dict.fromkeys(name for e in found.values() for name in e.scores))
    rows = []
    for split, evaluation in found.items():
        for user, scores in {"all": evaluation.scores, **evaluation.by_user}.items():
            values = (f"{scores[name]:.4f}" if name in scores else "-" for name in names)
            rate = evaluation.tokens_per_second if scores is evaluation.scores else None
            rows.append([split, user, *values, f"{rate:,.0f}" if rate else "-"])
    return format_table(["split", "user", *names, "tokens per second"], rows)


def _show(samples: Sequence[dict[str, str]]) -> None:
    for sample in samples:
        print_text("\n" + "\n".join(f"{key + ':':<12}{text}" for key, text in sample.items()))


def _save(run_dir: Path, result: dict[str, Any]) -> Path:
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    # The last part is random: two evaluations may end in the same second.
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
