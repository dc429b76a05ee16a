"""Users side by side: nobody's trouble, coming or going is another's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cola.attendance import Visit
from cola.config.choices import MergeMode, Reduction, UserGradient, UserLoss
from cola.errors import MergeError, OffloadError, SiteError
from cola.gradient_learner import GradientLearner
from cola.interfaces import Adaptation
from cola.task_data import Batch
from cola.user_rows import UserRows
from tests import tiny, users
from tests.tolerances import EXACT

OWNERS = [[0, 0, 1, 2], [0, 1, 2, 2], [0, 1, 2], [0, 1, 1, 2], [0, 1, 2], [0, 1, 2]]
KINDS = ("lowrank:1", "lowrank:2", "linear")


def build(
    model: nn.Module, kinds: tuple[str, ...] = KINDS, **settings: object
) -> tuple[GradientLearner, users.Members]:
    adapters = users.filled(model, users.roster(users.settings(*kinds)))
    start = users.members(adapters)
    return users.learner(model, adapters, **{"loss": UserLoss.per_user, **settings}), start  # type: ignore[arg-type]


def poisoned(batch: Batch, user: int, value: float) -> Batch:
    """The batch with all rows of one user spoilt."""
    assert batch.rows is not None
    features = batch.inputs["features"].clone()
    features[dict(batch.rows.slices())[user]] = value
    return replace(batch, inputs={"features": features})


def without_user(stream: list[Batch], user: int) -> list[Batch]:
    return [batch.without(frozenset({user})) for batch in stream]


def expect_equal(
    found: GradientLearner, wanted: GradientLearner, start: users.Members, who: list[int]
) -> None:
    """Weights of some users, relative to the distance moved."""
    for user in who:
        mine, other = found.export(f"user{user}"), wanted.export(f"user{user}")
        for site, own in start.items():
            moved = tiny.flat(other[site]) - tiny.flat(own[user])
            error = tiny.flat(mine[site]) - tiny.flat(other[site])
            assert moved.norm() > 0
            assert error.norm() <= EXACT * moved.norm()


@pytest.mark.parametrize(
    ("value", "num_workers"), [(math.nan, 0), (math.nan, 2), (math.inf, 0), (1e100, 2)]
)
@pytest.mark.parametrize("kinds", [KINDS, ("mlp", "mlp", "mlp")], ids=["linear kinds", "mlp"])
def test_poisoned_rows_reach_nobody_else(
    value: float, num_workers: int, kinds: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.net()
    stream = users.batches(base, OWNERS)
    spoilt = [poisoned(b, 1, value) if i == 2 else b for i, b in enumerate(stream)]
    found, start = build(base, kinds, num_workers=num_workers)
    tiny.train(found, spoilt)
    found.state_dict()
    found.close()
    if not math.isfinite(value):
        assert found.present_users() == {0, 2}
        assert "user user1 is stopped: the hidden gradient of site" in caplog.text
    wanted, _ = build(tiny.net(), kinds)
    tiny.train(wanted, without_user(stream, 1))
    expect_equal(found, wanted, start, [0, 2])


@pytest.mark.parametrize("gradient", list(UserGradient), ids=lambda one: one.name)
def test_poisoned_rows_leave_a_merged_model_finite(gradient: UserGradient) -> None:
    base = tiny.net()
    stream = users.batches(base, OWNERS)
    found, _ = build(base, mode=MergeMode.merged, gradient=gradient, loss=UserLoss.batch)
    losses = tiny.train(
        found, [poisoned(b, 1, torch.nan) if i == 2 else b for i, b in enumerate(stream)]
    )
    assert found.present_users() == {0, 2}
    assert torch.tensor(losses).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in base.parameters())
    found.close()


def test_a_run_ends_when_its_last_user_is_stopped() -> None:
    base = tiny.net()
    stream = users.batches(base, [[0, 0], [0, 0]])
    found, _ = build(base, ("lowrank",))
    found.record(poisoned(stream[0], 0, torch.nan), Adaptation(number=1, learning_rate=0.1))
    found.update(Adaptation(number=1, learning_rate=0.1))
    with pytest.raises(
        OffloadError, match=r"no user is left at step 2 \(user0: the hidden gradient"
    ):
        found.record(stream[1], None)
    found.close()


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_who_comes_and_goes_changes_nothing_for_others(interval: int, num_workers: int) -> None:
    stream = users.batches(tiny.net(), OWNERS)
    base = tiny.net()
    found, start = build(base, visits=[Visit(user=1, join=2, leave=5)], num_workers=num_workers)
    tiny.train(found, stream, interval=interval)
    wanted, _ = build(tiny.net())
    tiny.train(wanted, without_user(stream, 1), interval=interval)
    expect_equal(found, wanted, start, [0, 2])
    assert found.present_users() == {0, 2}
    found.close()


def test_a_visitor_learns_from_its_own_steps_alone() -> None:
    stream = users.batches(tiny.net(), OWNERS)
    found, start = build(tiny.net(), visits=[Visit(user=1, join=2, leave=5)])
    tiny.train(found, stream)
    nobody = without_user(stream, 1)
    wanted, _ = build(tiny.net())
    tiny.train(wanted, [nobody[0], *stream[1:4], *nobody[4:]])
    expect_equal(found, wanted, start, [1])
    found.close()


def test_a_user_goes_on_elsewhere_with_what_it_left_with() -> None:
    stream = users.batches(tiny.net(), OWNERS)
    kept = {}
    base = tiny.net()
    first = users.filled(base, users.roster(users.settings(*KINDS)))
    start = users.members(first)
    leaving = users.learner(base, first, loss=UserLoss.per_user, visits=[Visit(user=1, leave=4)])
    assert leaving._attendance is not None
    leaving._attendance._keep = lambda user, state: kept.update({user: state})
    tiny.train(leaving, stream)
    again, _ = build(tiny.net(), visits=[Visit(user=1, join=4, state=kept["user1"])])
    tiny.train(again, stream)
    wanted, _ = build(tiny.net())
    tiny.train(wanted, stream)
    expect_equal(again, wanted, start, [0, 1, 2])


def test_a_user_that_leaves_within_an_interval_does_not_step() -> None:
    found, start = build(tiny.net(), visits=[Visit(user=1, leave=2)])
    tiny.train(found, users.batches(tiny.net(), OWNERS[:2]), interval=2)
    for site, adapter in found.export("user1").items():
        assert torch.equal(tiny.flat(adapter), tiny.flat(start[site][1]))
    assert not torch.equal(tiny.flat(found.export("user0")["query"]), tiny.flat(start["query"][0]))
    found.close()


def test_a_user_that_left_counts_no_more_in_a_merge() -> None:
    base = tiny.net()
    found, _ = build(
        base, mode=MergeMode.merged, visits=[Visit(user=0, leave=2), Visit(user=2, leave=2)]
    )
    stream = users.batches(base, OWNERS)
    tiny.adapt(found, stream[0], 1)
    tiny.adapt(found, stream[1], 2)
    own = found.export("user1")["query"]
    with found.evaluating() as model:
        merged = model.get_submodule("query").get_parameter("weight")
        pristine = tiny.net().get_submodule("query").get_parameter("weight")
        torch.testing.assert_close(merged, pristine + 0.7 * own.delta_weight())
    found.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("mode", [MergeMode.unmerged, MergeMode.merged], ids=lambda m: m.name)
def test_a_restored_run_goes_on_with_the_same_bits(mode: MergeMode, num_workers: int) -> None:
    stream = users.batches(tiny.net(), OWNERS)
    visits = [Visit(user=1, join=2, leave=5)]
    whole, _ = build(tiny.net(), mode=mode, visits=visits, num_workers=num_workers)
    half, _ = build(tiny.net(), mode=mode, visits=visits, num_workers=num_workers)
    rates = [Adaptation(number=1 + i // 2, learning_rate=0.05) for i in range(6)]
    for i, batch in enumerate(stream):
        closing = rates[i] if i % 2 else None
        whole.record(batch, closing)
        if closing:
            whole.update(closing)
        if i < 3:
            half.record(batch, closing)
            if closing:
                half.update(closing)
    state = half.state_dict()  # inside an interval
    restored, _ = build(tiny.net(), mode=mode, visits=visits, num_workers=num_workers)
    restored.load_state_dict(state)
    for i, batch in enumerate(stream[3:], start=3):
        closing = rates[i] if i % 2 else None
        restored.record(batch, closing)
        if closing:
            restored.update(closing)
    for name in users.found_names(whole):
        mine, wanted = restored.export(name), whole.export(name)
        assert all(torch.equal(tiny.flat(mine[site]), tiny.flat(wanted[site])) for site in wanted)
    assert restored.present_users() == whole.present_users()
    for learner in (whole, half, restored):
        learner.close()


def test_a_batch_without_anybody_is_a_step_without_a_fit() -> None:
    base = tiny.net()
    found, _ = build(base, visits=[Visit(user=user, join=2) for user in range(3)])
    stream = users.batches(base, OWNERS[:2])
    assert tiny.train(found, stream)[0] == 0.0
    assert found.present_users() == {0, 1, 2}
    found.close()


def test_merged_and_unmerged_evaluation_on_demand() -> None:
    base = tiny.net()
    found, _ = build(base)
    batch = users.batches(base, [[0, 1, 1, 2]])[0]
    with found.evaluating(merged=True) as model, torch.no_grad():
        merged = model(**batch.inputs).logits.clone()
    with found.evaluating() as model, torch.no_grad():
        found.route(batch.rows)
        unmerged = model(**batch.inputs).logits.clone()
    mean = tiny.net()
    with torch.no_grad():
        for site in tiny.specs(mean):
            weight, bias = (mean.get_submodule(site).get_parameter(n) for n in ("weight", "bias"))
            own = [found.export(f"user{user}")[site] for user in range(3)]
            delta = sum(0.7 / 3 * adapter.delta_weight() for adapter in own)
            weight += delta.T if site == "twist" else delta
            bias += 0.7 / 3 * own[2].delta_bias()
        torch.testing.assert_close(merged, mean(**batch.inputs).logits)
    assert not torch.allclose(merged, unmerged)
    found.close()


def test_mlp_users_are_named_when_they_should_merge() -> None:
    found, _ = build(tiny.net(), ("lowrank", "mlp", "mlp"))
    with pytest.raises(MergeError, match="users user1, user2 have mlp adapters"):
        found.evaluating(merged=True).__enter__()
    found.close()


class Mixing(tiny.TinyNet):
    """A site that does not see the rows of the batch."""

    def forward(self, features: torch.Tensor) -> tiny.Output:
        self.head(features.new_ones(1, 4))
        return super().forward(features)


def test_a_site_that_mixes_rows_is_named() -> None:
    base = tiny.net(Mixing)
    found, _ = build(base)
    with pytest.raises(SiteError, match="site 'head' works on 1 rows and the batch has 4 rows"):
        found.record(users.batches(base, OWNERS)[0], None)
    found.close()


def test_users_in_generation_are_told_apart_by_beam() -> None:
    """A row that becomes several, next to one another, keeps its owner."""
    base = tiny.net()
    found, _ = build(base)
    batch = users.batches(base, [[0, 1, 1, 2]])[0]
    with found.evaluating() as model, torch.no_grad():
        found.route(batch.rows)
        once = model(**batch.inputs).logits
        beams = model(features=batch.inputs["features"].repeat_interleave(3, dim=0)).logits
    torch.testing.assert_close(beams, once.repeat_interleave(3, dim=0))
    found.close()


def test_order_of_users_does_not_matter() -> None:
    """The same users in another order of positions end with the same weights."""
    base = tiny.net()
    stream = users.batches(base, OWNERS)
    found, start = build(base)
    tiny.train(found, stream)
    order = [2, 0, 1]
    settings = [users.settings(*KINDS)[user] for user in order]
    other = users.filled(tiny.net(), users.roster(settings, Reduction.mean))
    for site, adapter in other.items():
        for place, user in enumerate(order):
            stack, own = adapter.stack_of(place)
            stack.load_member(own, dict(start[site][user].state_dict()))
    swapped = []
    for batch in stream:
        owners = [order.index(int(user)) for user in users.owners_of(batch)]
        index = torch.tensor(owners).argsort(stable=True)
        swapped.append(
            replace(
                batch,
                inputs={"features": batch.inputs["features"][index]},
                labels=batch.labels[index],
                rows=UserRows.of(sorted(owners)),
            )
        )
    moved = users.learner(tiny.net(), other, loss=UserLoss.per_user)
    tiny.train(moved, swapped)
    expect_equal(moved, found, start, [0, 1, 2])
