from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrete.eval import stats
from accrete.eval.stats import (
    bootstrap_matrix,
    holm,
    interval,
    mcnemar_exact,
    metric_intervals,
    paired_bootstrap,
    resample_means,
    sign_flip,
    sign_flip_exact,
)

STEADY = settings(deadline=None, derandomize=True)
"""No time limit for one example: test machines are shared."""


def binomial_tail(n: int, k: int) -> float:
    return sum(math.comb(n, i) for i in range(k + 1)) / 2**n


@STEADY
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    wanted = min(1.0, 2 * binomial_tail(n, min(only_a, only_b))) if n else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(wanted, rel=1e-9)
    assert mcnemar_exact(only_b, only_a) == mcnemar_exact(only_a, only_b)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(-4, 4), max_size=10))
def test_sign_flip_equals_trying_every_sign(differences: list[int]) -> None:
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    wanted = sum(total >= seen for total in sums) / len(sums)
    assert sign_flip_exact(differences) == pytest.approx(wanted, rel=1e-9)


def test_sign_flip_keeps_the_seeds_of_a_row_together() -> None:
    """Five seeds that agree on every row are one observation a row, not five."""
    rows = [1] * 8 + [-1] * 2
    assert sign_flip_exact([5 * d for d in rows]) == pytest.approx(mcnemar_exact(8, 2))
    assert mcnemar_exact(40, 10) < mcnemar_exact(8, 2)


def trying_every_sign(tasks: list[list[float]]) -> float:
    """The p of `sign_flip` from its definition: all signs of all rows, AP worked out for each."""

    def average(signed: list[list[float]]) -> float:
        return abs(sum(sum(rows) / len(rows) for rows in signed) / len(signed))

    seen, hits, total = average(tasks), 0, 0
    for signs in itertools.product((-1, 1), repeat=sum(map(len, tasks))):
        left = iter(signs)
        hits += average([[next(left) * d for d in rows] for rows in tasks]) >= seen - 1e-12
        total += 1
    return hits / total


@pytest.mark.parametrize(
    "tasks",
    [
        [[1.0, 1.0, 1.0, 0.0, 1.0, -1.0], [-1.0, -1.0]],
        [[0.3, 0.25, 0.5, -0.1, 0.7, 0.2, 0.05], [0.4, 0.1]],
        [[0.5, 0.5, 0.5, 0.5, -0.5, 0.25], [0.5, 0.0, 0.5]],
    ],
)
def test_drawn_signs_come_near_all_signs(tasks: list[list[float]]) -> None:
    """Rows that are alike, rows that are not, and both, in tasks of different sizes."""
    differences = [np.array(rows) for rows in tasks]
    wanted = trying_every_sign(tasks)
    tolerance = 4 * math.sqrt(wanted * (1 - wanted) / 20_000)
    assert sign_flip(differences, flips=20_000) == pytest.approx(wanted, abs=tolerance + 1e-4)
    assert sign_flip(differences) == sign_flip(differences)
    assert sign_flip([-d for d in differences]) == sign_flip(differences)


def test_drawn_signs_of_no_difference_and_of_a_sure_one() -> None:
    assert sign_flip([np.zeros(5), np.array([0.25, -0.25])]) == 1.0
    assert sign_flip([np.full(500, 0.3)], flips=999) == pytest.approx(1 / 1000)
    draw = np.random.default_rng(0)
    p_values = [sign_flip([draw.normal(size=60)], flips=199, seed=k) for k in range(200)]
    assert 0.01 < np.mean(np.array(p_values) <= 0.05) < 0.10  # right under the hypothesis


def test_large_and_one_sided_counts() -> None:
    assert mcnemar_exact(30_000, 31_000) == pytest.approx(5.234e-5, rel=1e-3)
    assert mcnemar_exact(500, 0) == 1e-15
    assert sign_flip_exact([]) == sign_flip_exact([0, 0]) == 1.0


@STEADY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_the_definition(p_values: list[float]) -> None:
    m = len(p_values)
    ordered = sorted(p_values)
    adjusted = holm(p_values)
    for p, found in zip(p_values, adjusted, strict=True):
        ranks = [j for j in range(m) if ordered[j] <= p]
        wanted = max(min(1.0, (m - j) * ordered[j]) for j in ranks)
        assert found == pytest.approx(wanted)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_resampled_means_have_the_right_moments_and_dependence() -> None:
    draw = np.random.default_rng(1)
    first = draw.integers(0, 2, 60).astype(float)
    scores = np.stack([first, first, 1 - first])
    means = resample_means(scores, 20_000, np.random.default_rng(0))
    p = first.mean()
    assert means.mean(axis=0) == pytest.approx([p, p, 1 - p], abs=0.002)
    assert means.std(axis=0) == pytest.approx(math.sqrt(p * (1 - p) / 60), rel=0.03)
    np.testing.assert_allclose(means[:, 0], means[:, 1], atol=1e-12)
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1.0, atol=1e-12)


def test_resampling_by_columns_is_resampling_by_rows() -> None:
    """The same distribution as drawing row numbers, for scores that are not 0 or 1."""
    scores = np.random.default_rng(2).random((2, 25))
    fast = resample_means(scores, 20_000, np.random.default_rng(0))
    picks = np.random.default_rng(3).integers(0, 25, size=(20_000, 25))
    slow = scores[:, picks].mean(axis=-1).T
    np.testing.assert_allclose(fast.mean(axis=0), slow.mean(axis=0), atol=0.003)
    np.testing.assert_allclose(np.cov(fast.T), np.cov(slow.T), atol=3e-4)


def test_many_different_rows_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws in little memory: 2000 draws of each of 10^5 rows would be 3 GB."""
    scores = np.random.default_rng(1).random((2, 1000))
    whole = resample_means(scores, 500, np.random.default_rng(0))
    monkeypatch.setattr(stats, "_BLOCK", 20_000)
    tracemalloc.start()
    parts = resample_means(scores, 500, np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    assert peak < 1e6 < 500 * 1000 * 8


def test_matrix_bootstrap_intervals_hold_the_metrics() -> None:
    draw = np.random.default_rng(0)
    scores = [
        (draw.random((2, 400)) < [[0.9], [0.5]]).astype(float),
        (draw.random((1, 400)) < 0.7).astype(float),
    ]
    a = bootstrap_matrix(scores, resamples=4000)
    assert a.shape == (4000, 2, 2)
    assert np.isnan(a[:, 0, 1]).all()
    found = metric_intervals(a)
    truth = 100 * np.array([[scores[0][0].mean(), 0], [scores[0][1].mean(), scores[1][0].mean()]])
    average = found["average_performance"]
    assert average is not None
    assert average.low < truth[1].mean() < average.high
    assert 4 < average.high - average.low < 9
    transfer = found["backward_transfer"]
    assert transfer is not None
    assert transfer.low < truth[1, 0] - truth[0, 0] < transfer.high < 0


def test_interval_of_undefined_values_is_none() -> None:
    assert interval(np.array([1.0, np.nan])) is None
    assert interval(np.full(50, 100.0)) is None
    one_stage = bootstrap_matrix([np.ones((1, 5))], resamples=50)
    assert metric_intervals(one_stage)["backward_transfer"] is None


def test_paired_bootstrap_sees_a_difference_and_its_absence() -> None:
    draw = np.random.default_rng(0)
    same = [draw.permutation([1.0, -1.0] * 50 + [0.0] * 100) for _ in range(3)]
    none = paired_bootstrap(same)
    assert none.difference == pytest.approx(0.0)
    assert none.interval is not None
    assert none.interval.low < 0 < none.interval.high
    assert none.p_bootstrap is not None
    assert none.p_bootstrap > 0.3
    better = [np.array([1.0] * 30 + [0.0] * 70), np.array([1.0] * 10 + [0.0] * 10)]
    some = paired_bootstrap(better)
    assert some.difference == pytest.approx(100 * (0.3 + 0.5) / 2)  # tasks count alike
    assert some.interval is not None
    assert some.interval.low > 20
    assert some.p_bootstrap is not None
    assert some.p_bootstrap < 0.01


@pytest.mark.parametrize("differences", [[1.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
def test_rows_without_variety_say_nothing_by_resampling(differences: list[float]) -> None:
    """A single row won would be a difference of 100 to 100 points, with p 0.001."""
    found = paired_bootstrap([np.array(differences)])
    assert found.difference == pytest.approx(100 * differences[0])
    assert found.interval is None
    assert found.p_bootstrap is None


def test_paired_bootstrap_is_reproducible_and_antisymmetric() -> None:
    d = [np.random.default_rng(5).integers(-1, 2, 80).astype(float)]
    assert paired_bootstrap(d) == paired_bootstrap(d)
    assert paired_bootstrap([-d[0]]).difference == pytest.approx(-paired_bootstrap(d).difference)
