"""Curves that must be one curve: every route computes the same run."""

import functools

import pytest

from tests.runs import DROPOUT, Run, run, small_synthetic

GPT2 = ("task=synthetic", "model=tiny-gpt2")
ROBERTA = ("task=synthetic", "model=tiny-roberta")
LOGGED = ("trainer.max_steps=50", "trainer.log_every=1", "task.max_eval_rows=8")
TOLERANCE = 1e-4
"""float32, largest difference of a loss over 50 steps (the issue's bar)."""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs each configuration once for the whole file."""

    @functools.cache
    def cached(*overrides: str) -> Run:
        with small_synthetic(160):  # to encode and score all rows takes longer than the steps
            return run(tmp_path_factory.mktemp("run"), *LOGGED, *overrides)

    return cached


def assert_one_curve(left: Run, right: Run) -> None:
    assert len(left.losses) == len(right.losses) == 50
    assert max(abs(a - b) for a, b in zip(left.losses, right.losses, strict=True)) <= TOLERANCE
    # A flat curve would agree with anything.
    assert sum(left.losses[-5:]) / 5 < left.losses[0] - 0.1


@pytest.mark.parametrize(
    "model",
    [pytest.param(GPT2, marks=pytest.mark.slow), ROBERTA],
    ids=["tiny-gpt2", "tiny-roberta"],
)
def test_lora_and_lowrank_give_one_curve(train, model):
    assert_one_curve(train(*model, "method=lora"), train(*model, "adapter=lowrank"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [GPT2, ROBERTA],
    ids=["tiny-gpt2", "tiny-roberta"],
)
def test_merged_and_unmerged_give_one_curve(train, model):
    assert_one_curve(train(*model, "merge=merged"), train(*model, "adapter=lowrank"))


@pytest.mark.slow
def test_merged_and_unmerged_linear_adapters_give_one_curve(train):
    assert_one_curve(train(*GPT2, "adapter=linear", "merge=merged"), train(*GPT2, "adapter=linear"))


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["unmerged", "merged"])
def test_offloaded_fits_give_one_curve(train, merge):
    placed = [] if merge == "unmerged" else ["merge=merged"]
    here = train(*GPT2, *(placed or ["adapter=lowrank"]))
    # Two workers on two cores have one thread each.
    assert_one_curve(train(*GPT2, *placed, "offload=cpu", "offload.workers=2"), here)


@pytest.mark.slow
def test_lora_and_lowrank_give_one_curve_with_scale_and_interval(train):
    settings = (*ROBERTA, "adapter.alpha=2", "trainer.interval=3", "adapter.rank=4")
    assert_one_curve(train(*settings, "method=lora"), train(*settings, "adapter=lowrank"))


BRIEF = (*ROBERTA, *DROPOUT, "trainer.max_steps=8", "offload=cpu")


def test_same_seed_gives_the_same_bits(train, tmp_path):
    first, second = train(*BRIEF, "offload.workers=2"), train("offload.workers=2", *BRIEF)
    assert first.folder != second.folder
    assert first.losses == second.losses
    assert first.adapter_bytes == second.adapter_bytes


def test_different_seeds_differ(train):
    one, other = train(*BRIEF, "offload.workers=2"), train(*BRIEF, "offload.workers=2", "seed=1")
    assert one.losses[0] != other.losses[0]
    assert one.adapter_bytes != other.adapter_bytes
