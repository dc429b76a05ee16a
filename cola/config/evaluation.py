"""What `cola-evaluate` is asked: which run, which of its states, on what, under which settings.

A run is evaluated as it was trained. Only settings that decide how it is looked at may change.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cola.config.identity import CONFIG_FILE, load_config
from cola.config.keys import nearest_words, schema_keys
from cola.config.resume import find_run, merge_given
from cola.config.schema import ExperimentConfig
from cola.config.user_settings import list_names
from cola.errors import ConfigError

OWN_KEYS: Mapping[str, str] = {
    "run": "the run's folder (outputs/NAME/RUN_ID), finished or still running",
    "checkpoint": "best (default), or newest",
    "split": "report (default), selection or train",
    "prompt": "a text to write an answer to, in place of a split",
    "user": "whose adapters answer the prompt, of a run with users=alone or collaboration",
}
_CHOICES = {"checkpoint": ("best", "newest"), "split": ("report", "selection", "train")}
_CHANGEABLE = (
    "generation.",
    "evaluation.merge",
    "evaluation.batch_size",
    "evaluation.num_samples",
    "offload.",
    "device",
    "data_dir",
    "task.max_eval_rows",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """One evaluation of a run.

    Attributes:
        run_dir: the run's folder.
        config: the run's own, with what was changed for the evaluation.
        newest: the newest checkpoint in place of the best one.
        split: `report`, `selection` or `train`.
        prompt: a text to answer in place of scoring a split.
        user: whose adapters answer it; the run's data may still not have that user.
    """

    run_dir: Path
    config: ExperimentConfig
    newest: bool
    split: str
    prompt: str | None
    user: str | None = None


def can_change(key: str) -> bool:
    """Whether an evaluation may set a key otherwise than the run did."""
    return key.startswith(_CHANGEABLE)


def changeable_keys() -> list[str]:
    """All of those keys, in the schema's order."""
    return [key for key in schema_keys() if can_change(key)]


def resolve_request(own: Mapping[str, str]) -> EvaluationRequest:
    """What to evaluate, under the run's own settings.

    Args:
        own: values of `OWN_KEYS`.

    Raises:
        ConfigError: no such run or no such choice.
    """
    if "run" not in own:
        raise ConfigError(f"run: not given; write run=PATH, {OWN_KEYS['run']}")
    for key, allowed in _CHOICES.items():
        value = own.get(key, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{key}={value}: no such choice; {nearest_words(value, allowed)}"
                f"allowed: {', '.join(allowed)}"
            )
    folder = find_run("run", own["run"])
    stored = load_config(folder / CONFIG_FILE)
    if "user" in own:
        _check_user(own, stored)
    # Its own state is loaded, whatever it and its users started from.
    adapter = dataclasses.replace(stored.adapter, init=None)
    visits = [dataclasses.replace(visit, init=None) for visit in stored.users.schedule]
    users = dataclasses.replace(stored.users, schedule=visits)
    return EvaluationRequest(
        run_dir=folder,
        config=dataclasses.replace(stored, adapter=adapter, users=users, resume=None),
        newest=own.get("checkpoint") == "newest",
        split=own.get("split", "report"),
        prompt=own.get("prompt"),
        user=own.get("user"),
    )


def _check_user(own: Mapping[str, str], config: ExperimentConfig) -> None:
    user, users = own["user"], config.users
    if not users.name.owns_adapters:
        raise ConfigError(
            f"user={user}: the run has users={users.name.name}, one set of adapters for everything "
            "that is asked; leave user out"
        )
    if "prompt" not in own:
        raise ConfigError(
            f"user={user}: says whose adapters answer a prompt, and none was given; add "
            "prompt=TEXT, or leave user out: a split is scored user by user"
        )
    if users.names is not None and user not in users.names:
        raise ConfigError(
            f"user={user}: no such user of the run; {nearest_words(user, users.names)}"
            f"allowed: {list_names(users.names)}"
        )


def change_settings(
    request: EvaluationRequest, config: ExperimentConfig, given: Collection[str]
) -> EvaluationRequest:
    """The request under other settings of the kind that may change.

    Args:
        request: under the run's own.
        config: holds the values of what was given.
        given: groups and keys set explicitly.

    Raises:
        ConfigError: a setting that the run was trained with.
    """
    merged, differing = merge_given(request.config, config, given, may_change=can_change)
    if differing:
        raise ConfigError(
            f"run={request.run_dir}: the run was trained with other settings: "
            f"{', '.join(differing)}; only {', '.join(changeable_keys())} can be changed; leave "
            "the others out"
        )
    return dataclasses.replace(request, config=merged)
