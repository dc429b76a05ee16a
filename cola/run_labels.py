"""What a run is called where many lie side by side: its name, group, kind and tags.

Runs of one table of the paper form a group, the rows of the table are its kinds, so that a
project's default view (grouped by both) shows rows, with their seeds and tasks inside.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cola.config.choices import MethodName, UsersMode
from cola.config.schema import ExperimentConfig

MAX_TAG = 64
"""Characters of a tag that Weights & Biases takes."""


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """A run in words; None where its method has no such choice.

    Attributes:
        model: name, or the last part of the path where one is given.
        task: with its subset.
        method: the row of a table: method, users, adapter kinds, merge mode and interval, as far
            as they tell.
        adapter: kinds, in the users' order.
        merge: mode.
        users: mode.
        offload: where adapters are fitted.
    """

    model: str
    task: str
    method: str
    adapter: str | None
    merge: str | None
    users: str
    offload: str | None

    @property
    def tags(self) -> list[str]:
        """`task:glue/mrpc` and so on: what a list of runs is filtered by."""
        facts = {key: value for key, value in asdict(self).items() if value is not None}
        return [f"{key}:{value}"[:MAX_TAG] for key, value in facts.items()]


def describe(config: ExperimentConfig) -> RunLabels:
    """The labels of a run."""
    task, model, users = config.task, config.model, config.users
    gradient = config.method.name is MethodName.cola
    kinds = "-".join(dict.fromkeys(users.kinds or [config.adapter.kind.name]))
    parts = [config.method.name.name]
    if users.name is not UsersMode.one:
        parts.append(users.name.name)
    if gradient:
        parts += [kinds, config.merge.mode.name]
    if config.trainer.interval > 1:
        parts.append(f"I{config.trainer.interval}")
    return RunLabels(
        model=Path(model.path).name if model.path else model.name,
        task=f"{task.name}/{task.subset}" if task.subset else task.name,
        method="-".join(parts),
        adapter=kinds if gradient else None,
        merge=config.merge.mode.name if gradient else None,
        users=users.name.name,
        offload=config.offload.name.name if gradient else None,
    )


def run_name(config: ExperimentConfig) -> str:
    """`glue/mrpc roberta-base cola-lowrank-merged s0`."""
    labels = describe(config)
    return f"{labels.task} {labels.model} {labels.method} s{config.seed}"


def run_group(config: ExperimentConfig) -> str:
    """The table or figure of the paper, else the experiment's name, else the task's."""
    name = config.experiment_name or config.task.name
    family = re.match(r"(table|figure)\d+", name)
    return family.group() if family else name
