"""What runs are called where many lie side by side."""

import dataclasses

import pytest

from cola.run_labels import MAX_TAG, describe, run_group, run_name
from tests.configs import changed, composed
from tests.runs import run, small_synthetic


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["task=glue", "task.subset=mrpc", "method=lora"], "glue/mrpc roberta-base lora s0"),
        (
            ["task=glue", "task.subset=mrpc", "merge=merged", "adapter=linear", "seed=3"],
            "glue/mrpc roberta-base cola-linear-merged s3",
        ),
        (
            ["task=dolly", "users=alone", "users.kinds=lowrank-mlp"],
            "dolly gpt2 cola-alone-lowrank-mlp-unmerged s0",
        ),
        (["task=digits", "trainer.interval=4"], "digits mlp cola-lowrank-unmerged-I4 s0"),
    ],
)
def test_name_says_task_model_method_and_seed(overrides, name):
    assert run_name(composed(*overrides).config) == name


def test_runs_of_a_table_are_a_group():
    config = composed("task=digits").config
    assert run_group(config) == "digits"
    for given, group in [
        ("table2_lora", "table2"), ("figure4", "figure4"), ("table10", "table10"), ("own", "own")
    ]:  # fmt: skip
        assert run_group(dataclasses.replace(config, experiment_name=given)) == group


def test_only_gradient_learning_has_adapters_and_a_merge_mode():
    labels = describe(composed("task=digits", "method=ft").config)
    assert (labels.adapter, labels.merge, labels.offload) == (None, None, None)
    assert labels.tags == ["model:mlp", "task:digits", "method:ft", "users:one"]


def test_model_of_a_path_is_its_last_part():
    config = changed("model.path=/models/org/minilm", base=["task=digits"])
    assert describe(config).model == "minilm"


def test_tag_fits():
    config = changed(f"model.path={'x' * 100}", base=["task=digits"])
    assert max(map(len, describe(config).tags)) == MAX_TAG


def test_labels_agree_with_the_summary(tmp_path):
    overrides = ("task=synthetic", "method=ft", "trainer.max_steps=1")
    with small_synthetic():
        summary = run(tmp_path, *overrides).summary
    labels = describe(composed(*overrides).config)
    for key in ("model", "task", "method", "adapter", "merge", "users", "offload"):
        assert getattr(labels, key) == summary[key]
