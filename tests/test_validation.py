"""Values out of range and combinations that cannot run."""

import pytest

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
        (["method=lora", "evaluation.merge=merged"], r"only adapters of method=cola can be merge"),
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
