"""Values out of range and combinations that cannot run."""

import pytest

from cola.config.choices import MergeMode
from cola.config.store import compose_config
from cola.config.validation import SUBSETS, validate
from cola.errors import ConfigError
from tests.configs import changed


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("adapter.rank=0", "a whole number >= 1"),
        ("adapter.alpha=0", "a number > 0"),
        ("adapter.hidden=[]", "at least one width"),
        ("adapter.hidden=[8,0]", "each >= 1"),
        ("trainer.interval=0", "a whole number >= 1"),
        ("trainer.batch_size=0", "a whole number >= 1"),
        ("trainer.epochs=0", "a whole number >= 1"),
        ("trainer.max_steps=0", "a whole number >= 1, or null"),
        ("trainer.log_every=0", "a whole number >= 1"),
        ("trainer.eval_every=-1", "a whole number >= 1, or null"),
        ("checkpoint.every=0", "a whole number >= 1, or null"),
        ("checkpoint.keep=0", "a whole number >= 1"),
        ("evaluation.batch_size=0", "a whole number >= 1"),
        ("offload.workers=0", "a whole number >= 1, or null"),
        ("optimizer.lr=0", "a number > 0, or null"),
        ("optimizer.lr=nan", "a number > 0, or null"),
        ("optimizer.weight_decay=-1", "a number >= 0"),
        ("optimizer.momentum=1", "a number from 0 to below 1"),
        ("optimizer.clip_norm=0", "a number > 0"),
        ("schedule.warmup_ratio=1", "a number from 0 to below 1"),
        ("task.max_length=0", "a whole number >= 1"),
        ("task.max_train_rows=0", "a whole number >= 1, or null"),
        ("task.num_labels=-1", "a whole number >= 0"),
        ("task.image_shape=[1,8]", "channels, height, width"),
        ("seed=-1", "a whole number from 0"),
        ("split_seed=-1", "a whole number from 0"),
        ("users.num=0", "a whole number >= 1, or null"),
        ("users.local_seconds=0", "a number > 0"),
        ("device=gpu", "auto, cpu, cuda or cuda:INDEX"),
        ("device=cuda:one", "auto, cpu, cuda or cuda:INDEX"),
    ],
)
def test_value_out_of_range(override, allowed):
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}=.*: wrong value; allowed: .*{allowed}"):
        validate(changed(override))


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_device_syntax(device):
    validate(changed(f"device={device}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["merge=merged", "adapter=mlp"], r"Proposition 2\); use adapter=lowrank or linear, or me"),
        (["evaluation.merge=merged", "adapter=mlp"], r"Proposition 2.*evaluation.merge=unmerged"),
        (
            ["merge.rounding=stochastic", "model.dtype=bfloat16"],
            r"merge.rounding=stochastic would have no effect",
        ),
        (["merge=merged", "merge.rounding=stochastic"], r"only merged bfloat16 weights are round"),
        (
            ["evaluation.merge=both", "adapter=mlp"],
            r"^evaluation.merge=both with adapter=mlp: .*P",
        ),
        (["method=lora", "evaluation.merge=merged"], r"only adapters of method=cola can be merge"),
        (["method=lora", "evaluation.merge=both"], r"only adapters of method=cola can be merged"),
        (["data_dir=nowhere"], r"data_dir=nowhere: there is no such folder; give one that holds"),
        (["merge=detached", "merge.pristine=base"], r"no effect with merge=detached"),
        (["method=ft", "optimizer.clip=adapter"], r"only method=cola clips each"),
        (["method=lora", "optimizer.clip=adapter"], r"use optimizer.clip=global or none"),
        (["optimizer.name=sgd", "optimizer.momentum=0"], r"Nesterov needs a momentum"),
        (["task=glue", "model=mlp"], r"text needs a text model"),
        (["task=synthetic", "model=cnn"], r"text needs a text model"),
        (["model=tiny-gpt2"], r"images need an image model; choose model=linear, mlp or cnn"),
        (["task=glue", "model=hf"], r"model=hf: model.path is not set; give the id"),
        (["task=glue", "task.subset=mrpcc"], r"no such subset of glue; nearest: mrpc; allowed: co"),
        (["task=glue", "task.subset=null"], r"no such subset of glue; .*allowed: cola, mnli"),
        (["task.subset=mrpc"], r"digits has no subsets"),
    ],
)
def test_combination_that_cannot_run(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


def test_explicit_value_that_a_baseline_cannot_use():
    with pytest.raises(ConfigError, match=r"^merge=merged does not apply to method=ft, which take"):
        compose_config(["method=ft", "merge=merged"])


@pytest.mark.parametrize(
    ("method", "given", "value"),
    [
        ("ft", "adapter", "adapter.kind=lowrank"),
        ("ft", "adapter.rank", "adapter.rank=4"),
        ("ft", "offload", "offload.name=cpu"),
        ("lora", "adapter", "adapter.kind=mlp"),
        ("lora", "adapter.hidden", "adapter.hidden=[8]"),
        ("lora", "merge", "merge.mode=detached"),
        ("lora", "merge.pristine", "merge.pristine=host"),
        ("lora", "offload.workers", "offload.workers=2"),
    ],
)
def test_every_group_a_baseline_cannot_use(method, given, value):
    config = changed(f"method.name={method}", value, "optimizer.clip=none")
    validate(config)  # nobody asked for it: a file's value is simply not used
    with pytest.raises(ConfigError, match=f"^{given}=.* does not apply to method={method}"):
        validate(config, {given, "method", "seed"})


def test_baselines_take_what_says_what_they_do_anyway():
    compose_config(["method=ft", "merge=unmerged", "users=one", "offload=none"])
    config = compose_config(["method=lora", "adapter=lowrank", "adapter.rank=4", "adapter.alpha=2"])
    assert (config.adapter.rank, config.adapter.alpha) == (4, 2.0)


def test_subsets_agree_with_the_task():
    from cola.tasks.glue import SUBSETS as TABLE

    assert set(SUBSETS["glue"]) == set(TABLE)


# Users -------------------------------------------------------------------------------------------

ABC = "users.names=[a, b, c]"
MIXED = "users.kinds=[lowrank-linear]"


def check_users(mode: str, *overrides: str) -> None:
    """Validates values as if each had been given explicitly, over those of the mode's file."""
    given = {override.partition("=")[0] for override in overrides}
    validate(changed(*overrides, base=(f"users={mode}",)), given)


NO_EFFECT = [
    ("one", "users.num=2", "users=joint, alone or collaboration"),
    ("one", "users.column=who", "users=joint, alone or collaboration"),
    ("one", ABC, "users=joint, alone or collaboration"),
    ("one", "users.others=drop", "users=joint, alone or collaboration"),
    ("one", "users.kinds=[lowrank, mlp]", "users=alone or collaboration"),
    *(
        ("joint", override, "users=alone or collaboration")
        for override in (
            "users.kinds=[lowrank, mlp]",
            "users.adapters=[{user: a}]",
            "users.gradient=exact",
            "users.reduce=sum",
            "users.loss=per_user",
            "users.schedule=[{user: a}]",
            "users.local=[a]",
            "users.local_dir=x",
            "users.local_seconds=5",
            "users.local_late=drop",
        )
    ),
    ("alone", "users.gradient=exact", "users=collaboration"),
    ("alone", "users.reduce=sum", "evaluation.merge=both or merged, users=collaboration"),
]


@pytest.mark.parametrize(("mode", "override", "remedy"), NO_EFFECT)
def test_setting_of_users_without_effect(mode, override, remedy):
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key}.* would have no effect with .*; use {remedy}"):
        check_users(mode, override)


@pytest.mark.parametrize(
    ("mode", "overrides"),
    [
        ("joint", ["users.num=2", "users.column=who", "users.others=drop"]),
        ("joint", [ABC, "users.num=3", "evaluation.merge=both"]),
        ("alone", ["merge.mode=detached", "users.loss=per_user"]),
        ("alone", ["users.reduce=sum", "evaluation.merge=both"]),
        ("alone", [ABC, "users.kinds=[lowrank, mlp, linear]"]),
        ("alone", ["users.kinds=[lowrank, mlp]", "users.adapters=[{user: a, kind: linear}]"]),
        ("alone", ["users.adapters=[{user: a, kind: mlp, hidden: [4]}, {user: b, rank: 2}]"]),
        ("alone", ["users.schedule=[{user: a, leave: 5}, {user: a, join: 5}, {user: b}]"]),
        ("collaboration", ["users.gradient=exact", "users.reduce=sum", MIXED]),
        ("collaboration", ["users.loss=per_user", "evaluation.merge=unmerged"]),
        ("collaboration", ["users.local=[a]", "users.local_seconds=5", "users.local_late=drop"]),
        # The run's kind is nobody's here.
        ("collaboration", ["adapter.kind=mlp", "users.names=[a]",
                           "users.adapters=[{user: a, kind: linear}]"]),
    ],
)  # fmt: skip
def test_users_that_can_run(mode, overrides):
    check_users(mode, *overrides)


def test_reduction_of_a_stored_run_is_no_mistake():
    # It was given to a run that merged when it was evaluated; now it is evaluated unmerged.
    validate(changed("users.reduce=sum", base=("users=alone",)))


@pytest.mark.parametrize(
    ("mode", "overrides", "message"),
    [
        # Who.
        ("joint", ["users.names=[a, b, a]"], r"two users of one name 'a'; name every user once"),
        ("joint", ["users.names=['', b]"], r"'' cannot be a user's name"),
        ("joint", ["users.names=[]"], r"users\.names=\[\]: names no user"),
        ("alone", ["users.num=4", ABC], r"users\.num=4 with 3 users in users\.names; leave"),
        # Modes.
        ("alone", ["merge.mode=merged"], r"^merge=merged with users=alone: .* never merged in tra"),
        (
            "collaboration",
            ["merge.mode=unmerged"],
            r"^merge=unmerged with users=collaboration: .*",
        ),
        ("collaboration", ["merge.mode=detached"], r"use merge=merged, or users=alone"),
        ("alone", ["adapter.init=x"], r"adapter\.init=x with users=alone: .*users\.schedule=\[{u"),
        (
            "collaboration",
            ["users.gradient=exact", "users.loss=per_user"],
            r"exact with users\.loss=per_user: the exact gradient is that of one loss over all",
        ),
        (
            "collaboration",
            ["users.gradient=exact", "users.local=[a]"],
            r"exact with users\.local: a user's own process would need the rows of all users",
        ),
        # Kinds.
        (
            "alone",
            ["users.kinds=[lowrank, lnear]"],
            r"no kind 'lnear'; nearest: linear; allowed: ",
        ),
        ("alone", ["users.kinds=[mlp]"], r"users\.kinds=\[mlp\]: .* write adapter=KIND"),
        ("alone", ["users.kinds=[mlp-mlp]"], r"at least two different ones"),
        ("alone", ["users.kinds=[]"], r"at least two different ones"),
        ("alone", ["users.num=2", "users.kinds=[mlp, linear, mlp]"], r"gives 3 kinds to 2 users"),
        ("alone", [ABC, "users.kinds=[mlp-linear-mlp-linear]"], r"gives 4 kinds to 3 users"),
        (
            "alone",
            ["adapter.kind=mlp", MIXED],
            r"^adapter\.kind=mlp would have no effect with users\.kinds=\[lowrank-linear\], which",
        ),
        # Kinds that cannot be merged.
        (
            "collaboration",
            [ABC, "users.kinds=[lowrank, mlp]"],
            r"^merge=merged with mlp adapters of c: .*Proposition 2\); give them lowrank or linear",
        ),
        (
            "alone",
            ["evaluation.merge=both", "users.kinds=[lowrank, mlp]"],
            r"both with mlp adapters of users\.kinds=\[lowrank,mlp\]: .*evaluation\.merge=unmer",
        ),
        (
            "alone",
            ["evaluation.merge=merged", "users.adapters=[{user: x, kind: mlp}]"],
            r"^evaluation\.merge=merged with mlp adapters of x:",
        ),
        ("collaboration", ["adapter.kind=mlp"], r"^merge=merged with mlp adapters of adapter=mlp:"),
        # Single users.
        ("alone", ["users.adapters=[{user: a}, {user: a}]"], r"two entries of user 'a'; write one"),
        ("alone", ["users.adapters=[{user: a, rank: 0}]"], r"rank=0 of user 'a': .*number >= 1"),
        ("alone", ["users.adapters=[{user: a, alpha: 0}]"], r"alpha=0.0 of user 'a': .*number > 0"),
        ("alone", ["users.adapters=[{user: a, lr: -1}]"], r"lr=-1.0 of user 'a': .*a number > 0"),
        (
            "alone",
            ["users.adapters=[{user: a, kind: mlp, hidden: [0]}]"],
            r"hidden=\[0\] of user 'a': wrong value; allowed: at least one width",
        ),
        ("alone", ["users.adapters=[{user: a, hidden: [5]}]"], r"hidden of user 'a' would have no"),
        (
            "alone",
            ["users.adapters=[{user: a, kind: linear, rank: 5}]"],
            r"rank of user 'a' would have no effect with its linear adapters; .* kind: lowrank$",
        ),
        (
            "alone",
            [ABC, "users.kinds=[lowrank, mlp]", "users.adapters=[{user: c, rank: 2}]"],
            r"rank of user 'c' would have no effect with its mlp adapters",
        ),
        (
            "alone",
            [ABC, "users.adapters=[{user: aa}]"],
            r"adapters: no user 'aa'; nearest: a; all",
        ),
        (
            "alone",
            [
                "optimizer.name=adamw",
                "users.adapters=[{user: a, optimizer: sgd}]",
                "optimizer.momentum=0",
            ],
            r"Nesterov needs a momentum",
        ),
        # Visits.
        ("alone", ["users.schedule=[{user: a, join: 0}]"], r"join=0 of user 'a': steps count from"),
        ("alone", ["users.schedule=[{user: a, join: 4, leave: 4}]"], r"joins at step 4 and leaves"),
        (
            "alone",
            ["users.schedule=[{user: a, join: 5}, {user: b}, {user: a, leave: 6}]"],
            r"user 'a' joins at step 5, but is there from step 1 until step 6; let one visit end",
        ),
        (
            "alone",
            ["users.schedule=[{user: a}, {user: a, join: 9}]"],
            r"joins at step 9, but is there from step 1 on;",
        ),
        (
            "alone",
            ["users.schedule=[{user: a, init: no/such}]"],
            r"init=no/such of user 'a': ",
        ),
        ("alone", [ABC, "users.schedule=[{user: x}]"], r"users\.schedule: no user 'x'"),
        # Processes of their own.
        ("alone", ["users.local=[a, a]"], r"users\.local names 'a' twice"),
        ("alone", [ABC, "users.local=[x]"], r"users\.local: no user 'x'"),
        ("alone", ["users.local_dir=x"], r"local_dir would have no effect without users\.local"),
        ("alone", ["users.local_seconds=5"], r"local_seconds would have no effect without users"),
        ("alone", ["users.local_late=drop"], r"local_late would have no effect without users\.loc"),
        (
            "alone",
            ["users.local=[a]", "users.adapters=[{user: a, lr: 1}]"],
            r"lr of user 'a' would have no effect: the user's own process",
        ),
        (
            "alone",
            ["users.local=[a]", "users.adapters=[{user: a, optimizer: adamw}]"],
            r"optimizer of user 'a' would have no effect",
        ),
    ],
)
def test_users_that_cannot_run(mode, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_users(mode, *overrides)


def test_dry_run_needs_no_folder_of_a_user():
    check_users("alone", "users.schedule=[{user: a, init: no/such}]", "dry_run=true")


def test_merge_mode_follows_users_and_the_command_line_wins():
    assert compose_config(["users=collaboration"]).merge.mode is MergeMode.merged
    with pytest.raises(ConfigError, match=r"^merge=unmerged with users=collaboration"):
        compose_config(["users=collaboration", "merge=unmerged"])
