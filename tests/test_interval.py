"""Intervals: I batches as one, their reduction, and the schedule that counts adaptations."""

import copy
import dataclasses

import pytest
import torch

from cola.adaptation_data import IntervalWeights
from cola.config.choices import AdapterKind, MergeMode, Objective, Reduction, ScheduleName
from cola.config.schema import ScheduleConfig, TrainerConfig
from cola.horizon import Horizon
from cola.interfaces import Adaptation
from cola.objectives import task_loss
from cola.optimizers import LearningRateSchedule
from cola.oracle import attach_trainable
from cola.task_data import Batch
from tests import tiny
from tests.tolerances import EXACT

SGD = tiny.optimizer("sgd")


def groups(stream: list[Batch], interval: int) -> list[list[Batch]]:
    return [stream[start : start + interval] for start in range(0, len(stream), interval)]


@pytest.mark.parametrize("num_batches", [6, 7, 8])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_mean_interval_equals_one_large_batch(
    offload: str, mode: MergeMode, num_batches: int
) -> None:
    base = tiny.net()
    start = tiny.filled_adapters(base, AdapterKind.lowrank)
    stream = tiny.batches(base, num_batches)
    assert len({batch.num_terms for batch in stream[:3]}) == 3, "equal sizes would hide the weights"
    large = [tiny.joined(group) for group in groups(stream, 3)]
    oracle = tiny.oracle_learner(copy.deepcopy(base), start, optimizer_config=SGD)
    tiny.train(oracle, large)
    learner = tiny.gradient_learner(base, start, mode=mode, optimizer_config=SGD, offload=offload)
    tiny.train(learner, stream, interval=3)
    assert tiny.distance(learner.export(), oracle.export(), start) <= EXACT
    learner.close()


@pytest.mark.parametrize("method", ["gradient learning", "autograd"])
def test_sum_interval_adds_the_gradients_of_mean_losses(method: str) -> None:
    base = tiny.net()
    start = tiny.filled_adapters(base, AdapterKind.lowrank)
    stream = tiny.batches(base, 5)
    own = copy.deepcopy(start)
    model = copy.deepcopy(base)
    parameters, _ = attach_trainable(model, own, scale=tiny.SCALE)
    plain = dataclasses.replace(SGD, weight_decay=0.0, momentum=0.0, nesterov=False)
    for number, group in enumerate(groups(stream, 2), start=1):
        losses = [
            task_loss(Objective.classification, model(**batch.inputs).logits, batch)
            for batch in group
        ]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter.sub_(0.05 / number * gradient)
    build = tiny.oracle_learner if method == "autograd" else tiny.gradient_learner
    learner = build(base, start, optimizer_config=plain, reduction=Reduction.sum)
    tiny.train(learner, stream, interval=2)
    assert tiny.distance(learner.export(), own, start) <= EXACT
    learner.close()


def test_interval_of_one_batch_is_free_of_rounding() -> None:
    weights = IntervalWeights(Reduction.mean)
    assert weights.add(7) == 1.0
    assert weights.scale() == 1.0


@pytest.mark.parametrize("terms", [[3, 5, 4], [0, 5, 4], [3, 0, 4], [3, 5, 0], [0, 0, 4], [2, 1]])
def test_mean_weights_are_shares_of_the_scored_terms(terms: list[int]) -> None:
    weights = IntervalWeights(Reduction.mean)
    factors = [weights.add(num) for num in terms]
    shares = [factor * weights.scale() for factor in factors]
    assert shares == pytest.approx([num / sum(terms) for num in terms], rel=EXACT)


def test_mean_weights_of_an_interval_without_scored_terms_are_finite() -> None:
    weights = IntervalWeights(Reduction.mean)
    assert [weights.add(0), weights.add(0), weights.scale()] == [0.0, 0.0, 1.0]


def test_sum_weights_are_ones() -> None:
    weights = IntervalWeights(Reduction.sum)
    assert [weights.add(num) for num in (3, 5, 0)] == [1.0, 1.0, 1.0]
    assert weights.scale() == 1.0


def test_reset_starts_the_next_interval_afresh() -> None:
    weights = IntervalWeights(Reduction.mean)
    weights.add(2)
    weights.add(6)
    weights.reset()
    assert weights.add(5) == 1.0
    assert weights.scale() == 1.0


@pytest.mark.parametrize("reduction", list(Reduction), ids=lambda reduction: reduction.name)
def test_weights_continue_from_a_state_inside_an_interval(reduction: Reduction) -> None:
    weights, other = IntervalWeights(reduction), IntervalWeights(reduction)
    weights.add(3)
    other.load_state_dict(weights.state_dict())
    assert other.add(5) == weights.add(5)
    assert other.scale() == weights.scale()


def rates(name: ScheduleName, *, horizon: int, warmup_ratio: float = 0.0) -> list[float]:
    config = ScheduleConfig(name=name, warmup_ratio=warmup_ratio)
    schedule = LearningRateSchedule(config, peak=2.0, horizon=horizon)
    return [schedule.rate(index) for index in range(horizon)]


def test_horizon_counts_adaptations_with_the_tail() -> None:
    config = TrainerConfig(epochs=5, interval=4)
    horizon = Horizon.of(config, steps_per_epoch=2)
    assert (horizon.steps, horizon.adaptations) == (10, 3)
    assert [step for step in range(1, 11) if horizon.closes_interval(step)] == [4, 8, 10]


def test_linear_rate_falls_over_adaptations_to_one_step_above_zero() -> None:
    assert rates(ScheduleName.linear, horizon=4) == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_cosine_rate_halves_in_the_middle() -> None:
    found = rates(ScheduleName.cosine, horizon=4)
    assert found == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])


def test_constant_rate_stays() -> None:
    assert rates(ScheduleName.constant, horizon=3) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", list(ScheduleName), ids=lambda name: name.name)
def test_warm_up_rises_to_the_full_rate_and_never_starts_at_zero(name: ScheduleName) -> None:
    found = rates(name, horizon=20, warmup_ratio=0.15)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert min(found) > 0


@pytest.mark.parametrize("name", list(ScheduleName), ids=lambda name: name.name)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 30])
def test_no_adaptation_has_rate_zero(horizon: int, warmup_ratio: float, name: ScheduleName) -> None:
    found = rates(name, horizon=horizon, warmup_ratio=warmup_ratio)
    assert all(0 < rate <= 2.0 for rate in found)


def test_rate_is_set_at_every_step_of_the_optimizer() -> None:
    base = tiny.net()
    start = tiny.filled_adapters(base, AdapterKind.linear)
    plain = dataclasses.replace(SGD, weight_decay=0.0, momentum=0.0, nesterov=False)
    (batch,) = tiny.batches(base, 1)
    moved = []
    for rate in (0.01, 0.02):
        learner = tiny.gradient_learner(base, start, optimizer_config=plain)
        adaptation = Adaptation(number=1, learning_rate=rate)
        learner.record(batch, adaptation)
        learner.update(adaptation)
        moved.append(tiny.flat(learner.export()["head"]) - tiny.flat(start["head"]))
        learner.close()
    torch.testing.assert_close(moved[1], 2 * moved[0])
