"""The tests beside a difference of average performance are tests of that difference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from run_folders import write_run

from accrete.eval.compare import compare_runs
from accrete.eval.compare_output import to_text
from accrete.eval.paired import PairedTest


def normal_p(tasks: list[list[float]]) -> float:
    """Two-sided p of AP's difference if the rows' signs are coins, by the normal distribution."""
    mean = sum(sum(rows) / len(rows) for rows in tasks)
    variance = sum(sum(d * d for d in rows) / len(rows) ** 2 for rows in tasks)
    return math.erfc(abs(mean) / math.sqrt(2 * variance))


def one_test(folder: Path, first: list[list[float]], second: list[list[float]]) -> PairedTest:
    """The test of two methods, `m1` and `m2`, with these scores after the last stage."""
    runs = [
        write_run(folder / method, [rows[:1], rows], method=method)
        for method, rows in (("m1", first), ("m2", second))
    ]
    (setting,) = compare_runs(runs).settings
    (test,) = setting.tests
    return test


def test_a_small_task_counts_as_much_as_a_large_one(tmp_path: Path) -> None:
    """m1 has more rows right, m2 the higher average performance."""
    first = [[1.0] * 1500 + [0.0] * 500, [1.0] * 20 + [0.0] * 30]
    second = [[1.0] * 1400 + [0.0] * 600, [1.0] * 40 + [0.0] * 10]
    test = one_test(tmp_path, first, second)
    assert (test.a, test.b) == ("m2", "m1")  # best first
    assert test.difference == pytest.approx((70 + 80) / 2 - (75 + 40) / 2)
    differences = [
        [y - x for x, y in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)
    ]
    assert sum(map(sum, differences)) == -80  # what a test over rows would have judged
    assert not test.exact
    assert test.p_value == test.p_holm == pytest.approx(normal_p(differences), abs=5e-4)
    assert test.p_value < 0.001


def test_rows_that_cancel_in_ap_are_no_evidence(tmp_path: Path) -> None:
    """100 of 2000 rows won and 2 of 40 lost: sure over rows, nothing in average performance."""
    first = [[1.0] * 1500 + [0.0] * 500, [1.0] * 20 + [0.0] * 20]
    second = [[1.0] * 1400 + [0.0] * 600, [1.0] * 22 + [0.0] * 18]
    test = one_test(tmp_path, first, second)
    assert test.difference == pytest.approx(0.0)
    assert test.p_value > 0.9


def test_scores_between_0_and_1_are_tested_as_they_are(tmp_path: Path) -> None:
    """ROUGE-L 0.6 against 0.3 on every row, none of them `correct`."""
    test = one_test(tmp_path, [[0.6] * 40, [0.6] * 40], [[0.3] * 40, [0.3] * 40])
    assert test.difference == pytest.approx(30.0)
    assert not test.exact
    assert test.p_value == pytest.approx(1e-4)  # the smallest of 9999 draws; in truth 2 ** -79


def test_the_same_scores_are_no_difference(tmp_path: Path) -> None:
    test = one_test(tmp_path, [[0.6, 0.2], [0.5, 0.1]], [[0.6, 0.2], [0.5, 0.1]])
    assert (test.difference, test.p_value, test.p_holm) == (0.0, 1.0, 1.0)
    assert (test.interval, test.p_bootstrap) == (None, None)
    (row,) = [
        line
        for line in to_text(compare_runs([tmp_path / "m1", tmp_path / "m2"])).splitlines()
        if "m1 - m2" in line
    ]
    assert row.split()[-5:] == ["+0.0", "-", "1.000", "1.000", "-"]


def test_one_task_of_0_or_1_is_counted_exactly(tmp_path: Path) -> None:
    rows = {"m1": [1.0] * 12 + [0.0] * 8, "m2": [0.0] * 9 + [1.0] * 3 + [0.0] * 7 + [1.0]}
    runs = [
        write_run(tmp_path / method, [[scores]], tasks=("a",), method=method)
        for method, scores in rows.items()
    ]
    comparison = compare_runs(runs)
    ((test,),) = [setting.tests for setting in comparison.settings]
    # 9 rows only m1 has right, 1 only m2: the binomial test by hand.
    assert test.exact
    assert test.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert "p exact" not in to_text(comparison)
