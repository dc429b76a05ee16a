"""Paired statistics: against scipy, by the coverage of intervals, and what they refuse."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from cola.errors import DataError
from cola.report.difference import (
    Difference,
    Verdict,
    over_seeds,
    over_tasks_like_these,
    over_these_tasks,
)
from cola.report.paired import compare, paired_rows, paired_table

FIRST = {
    "rte": [0.548, 0.556, 0.541],
    "sst2": [0.858, 0.861, 0.853, 0.855],
    "mrpc": [0.766, 0.779, 0.771],
}
SECOND = {
    "rte": [0.551, 0.549, 0.545],
    "sst2": [0.855, 0.855, 0.851, 0.857],
    "mrpc": [0.760, 0.764, 0.768],
}


def scores(by_task):
    return {(task, seed): v for task, own in by_task.items() for seed, v in enumerate(own)}


def differences(task):
    return [a - b for a, b in zip(FIRST[task], SECOND[task], strict=True)]


@pytest.fixture
def compared():
    return compare(scores(FIRST), scores(SECOND))


# Against scipy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_of_a_task_is_that_of_the_paired_t_test(compared, confidence):
    for task, found in compared.by_task.items():
        known = ttest_rel(FIRST[task], SECOND[task]).confidence_interval(confidence)
        assert found.interval(confidence) == pytest.approx((known.low, known.high))


def test_equivalence_is_the_worse_of_two_one_sided_tests(compared):
    margin = 0.01
    for task, found in compared.by_task.items():
        own = differences(task)
        above = ttest_1samp(own, -margin, alternative="greater").pvalue
        below = ttest_1samp(own, margin, alternative="less").pvalue
        assert found.equivalence_p(margin) == pytest.approx(max(above, below))


def test_equivalence_is_a_90_percent_interval_inside_the_margin(compared):
    found = compared.by_task["mrpc"]
    low, high = found.interval(0.9)
    margin = max(-low, high)
    assert found.equivalence_p(margin) == pytest.approx(0.05)


def test_fixed_tasks_are_welch_for_two_of_them():
    one, two = differences("rte"), differences("sst2")
    found = over_these_tasks([over_seeds(one), over_seeds(two)])
    # The mean of two is half the difference of one and the other's negative.
    known = ttest_ind(one, [-d for d in two], equal_var=False).confidence_interval()
    assert found.interval() == pytest.approx((known.low / 2, known.high / 2))
    assert found.num == 7


def test_new_tasks_are_the_t_test_over_the_means_of_tasks(compared):
    means = [np.mean(differences(task)) for task in FIRST]
    known = ttest_1samp(means, 0).confidence_interval()
    assert compared.tasks_like_these.interval() == pytest.approx((known.low, known.high))


def test_both_means_over_tasks_weigh_every_task_alike(compared):
    mean = np.mean([np.mean(differences(task)) for task in FIRST])
    assert compared.these_tasks.mean == pytest.approx(mean)
    assert compared.tasks_like_these.mean == pytest.approx(mean)


# Coverage ----------------------------------------------------------------------------------------

TRUTH, REPEATS = 0.3, 1000


def simulated(task_spread):
    """Differences of five tasks, three seeds each; seeds of the first task scatter the most."""
    generator = np.random.default_rng(0)
    for _ in range(REPEATS):
        own = TRUTH + task_spread * generator.standard_normal(5)
        noise = np.array([3.0, 1.0, 1.0, 0.5, 0.1])[:, None] * generator.standard_normal((5, 3))
        yield own, [over_seeds(list(row)) for row in own[:, None] + noise]


def covers(found, truth):
    low, high = found.interval()
    return low <= truth <= high


def test_intervals_hold_the_truth_as_often_as_they_say():
    by_task = these = like_these = 0
    for own, tasks in simulated(task_spread=2.0):
        by_task += covers(tasks[0], own[0])
        these += covers(over_these_tasks(tasks), own.mean())
        like_these += covers(over_tasks_like_these(tasks), TRUTH)
    # Three standard errors of 1,000 repeats are 2 points.
    assert 0.93 <= by_task / REPEATS <= 0.97
    assert 0.93 <= these / REPEATS <= 0.98
    assert 0.93 <= like_these / REPEATS <= 0.98


def test_interval_of_these_tasks_does_not_hold_for_new_ones():
    held = sum(covers(over_these_tasks(tasks), TRUTH) for _, tasks in simulated(task_spread=5.0))
    assert held / REPEATS < 0.8


def test_on_par_is_seldom_said_of_methods_a_margin_apart():
    wrong = sum(
        over_tasks_like_these(tasks).verdict(margin=TRUTH) is Verdict.on_par
        for _, tasks in simulated(task_spread=0.1)
    )
    assert wrong / REPEATS <= 0.07


# Verdicts and their table ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [
        (0.001, 0.001, Verdict.on_par),
        (0.005, 0.0001, Verdict.on_par),  # certainly not zero, certainly below the margin
        (0.03, 0.005, Verdict.higher),
        (-0.03, 0.005, Verdict.lower),
        (0.001, 0.05, Verdict.undecided),
        (0.0, 0.0, Verdict.on_par),
        (0.02, 0.0, Verdict.higher),
    ],
)
def test_verdict(mean, error, verdict):
    found = Difference(mean=mean, standard_error=error, degrees_of_freedom=4, num=5)
    assert found.verdict(margin=0.01) is verdict


def test_equal_scores_are_on_par_everywhere():
    same = compare(scores(FIRST), scores(FIRST))
    for found in [*same.by_task.values(), same.these_tasks, same.tasks_like_these]:
        assert found.interval() == (0.0, 0.0)
        assert found.verdict(margin=0.01) is Verdict.on_par


def test_single_task_has_no_line_over_tasks():
    only = compare(scores({"rte": FIRST["rte"]}), scores({"rte": SECOND["rte"]}))
    assert (only.these_tasks, only.tasks_like_these) == (None, None)
    assert [row[0] for row in paired_rows(only, margin=0.01)[1]] == ["rte"]


def test_table_names_methods_margin_and_unit(compared):
    text = paired_table(compared, "ColA low-rank", "LoRA", margin=0.01)
    assert text.startswith("**ColA low-rank minus LoRA**")
    assert "of 1 points\nor more" in text
    assert "below 0.05" in text
    header, rows = paired_rows(compared, margin=0.01)
    assert header == ["task", "n", "difference, points", "95 % interval", "p, beyond 1", "verdict"]
    assert [row[:2] for row in rows] == [
        ["rte", "3"], ["sst2", "4"], ["mrpc", "3"], ["these tasks", "10"], ["tasks like these", "3"]
    ]  # fmt: skip
    assert rows[2][2:] == ["+0.80", "[-0.75, +2.35]", "0.317", "undecided"]


# Refusals ----------------------------------------------------------------------------------------


def test_missing_pairs_are_named():
    second = scores(SECOND)
    del second["rte", 1]
    with pytest.raises(DataError, match=r"without a partner: rte seed 1 \(first only\); run the"):
        compare(scores(FIRST), second)
    with pytest.raises(DataError, match=r"rte seed 1 \(second only\)"):
        compare(second, scores(FIRST))


def test_many_missing_pairs_are_counted():
    with pytest.raises(DataError, match=r"rte seed 2 \(first only\) and 4 more"):
        compare(scores(FIRST), {})


def test_nothing_to_compare_is_refused():
    with pytest.raises(DataError, match="no scores to compare"):
        compare({}, {})


def test_single_seed_is_refused():
    pairs = scores({"rte": [0.5], "sst2": [0.8, 0.9]})
    with pytest.raises(DataError, match=r"a single seed of rte: .* at least 2 seeds"):
        compare(pairs, pairs)


def test_score_that_is_no_number_is_refused():
    broken = scores(SECOND) | {("mrpc", 2): float("nan")}
    with pytest.raises(DataError, match="no finite number: mrpc seed 2"):
        compare(scores(FIRST), broken)


@pytest.mark.parametrize("margin", [0.0, -0.01, float("nan")])
def test_margin_must_be_positive(compared, margin):
    with pytest.raises(ValueError, match=r"margin=.*: give a positive one"):
        compared.these_tasks.equivalence_p(margin)
