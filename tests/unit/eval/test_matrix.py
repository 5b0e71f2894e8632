from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrete.eval.matrix import (
    METRIC_NAMES,
    METRICS,
    AccuracyMatrix,
    forward_transfer,
)
from accrete.pipeline.errors import RunFolderError

STEADY = settings(deadline=None, derandomize=True)
"""No time limit for one example: test machines are shared."""
LOGGED = Path(__file__).resolve().parents[4] / "shared/data/olora_logged_matrices.json"
needs_logs = pytest.mark.skipif(not LOGGED.is_file(), reason="../shared/data is not here")

GOLDEN = {
    "long_olora": (72.17, -0.73, 1.74, 72.86, 67.82),
    "long_icrlora": (58.44, -19.44, 20.38, 76.58, 59.13),
    "long_seqlora": (32.04, -47.96, 48.95, 76.81, 54.90),
    "order1_olora": (78.37, -1.18, 1.18, None, None),
    "order1_icrlora": (68.62, -14.55, 14.55, None, None),
    "order1_seqft": (67.77, -14.50, 14.50, None, None),
}
"""Average performance, BWT, forgetting, plasticity, incremental accuracy as published."""


def logged(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(LOGGED.read_text())[name]
    return content


def as_matrix(content: dict[str, Any]) -> AccuracyMatrix:
    rows = tuple(tuple(row) for row in content["matrix_exact_match"])
    return AccuracyMatrix(tuple(content["tasks"]), rows)


def oracle(rows: list[list[float]]) -> dict[str, float | None]:
    """Each metric by plain loops over the definition."""
    T = len(rows)
    old = range(T - 1)
    average = sum(rows[T - 1]) / T
    learned = sum(rows[i][i] for i in range(T)) / T
    course = 0.0
    for t in range(T):
        course += sum(rows[t][i] for i in range(t + 1)) / (t + 1)
    transfer = drop = None
    if T > 1:
        transfer = sum(rows[T - 1][i] - rows[i][i] for i in old) / (T - 1)
        drop = 0.0
        for i in old:
            best = -math.inf
            for stage in range(i, T - 1):
                best = max(best, rows[stage][i])
            drop += (best - rows[T - 1][i]) / (T - 1)
    return {
        "average_performance": average,
        "backward_transfer": transfer,
        "forgetting": drop,
        "forward_transfer": None,
        "plasticity": learned,
        "incremental_accuracy": course / T,
    }


@st.composite
def triangles(draw: st.DrawFn, smallest: int = 1) -> list[list[float]]:
    size = draw(st.integers(smallest, 6))
    score = st.floats(0, 100, allow_nan=False)
    return [draw(st.lists(score, min_size=t + 1, max_size=t + 1)) for t in range(size)]


def build(rows: list[list[float]]) -> AccuracyMatrix:
    tasks = tuple(f"task{i}" for i in range(len(rows)))
    return AccuracyMatrix(tasks, tuple(tuple(row) for row in rows))


@needs_logs
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_of_real_runs(name: str) -> None:
    content = logged(name)
    metrics = as_matrix(content).metrics()
    names = ("average_performance", "backward_transfer", "forgetting", "plasticity")
    for metric, wanted in zip((*names, "incremental_accuracy"), GOLDEN[name], strict=True):
        if wanted is not None:
            assert metrics[metric] == pytest.approx(wanted, abs=0.005), metric
    assert metrics["average_performance"] == pytest.approx(content["AP"], abs=1e-9)
    assert metrics["backward_transfer"] == pytest.approx(content["BWT"], abs=1e-9)
    assert metrics["forgetting"] == pytest.approx(content["F.Ra"], abs=1e-9)


@needs_logs
def test_an_incomplete_log_gives_only_what_it_can() -> None:
    """This run lost the scores of stage 3, so task 3 has no score of its own stage."""
    metrics = as_matrix(logged("order1_seqlora")).metrics()
    assert metrics["average_performance"] == pytest.approx(62.875)
    for name in ("backward_transfer", "forgetting", "plasticity", "incremental_accuracy"):
        assert metrics[name] is None, name


@needs_logs
def test_micro_average_of_a_real_run() -> None:
    """O-LoRA's own headline for order 6 is the mean over samples, 73.88, not over tasks, 72.17."""
    content = logged("long_olora")
    totals = [stage["predict_samples"] for stage in content["timing"]]
    counts = tuple(np.diff([0, *totals]).tolist())
    matrix = AccuracyMatrix(as_matrix(content).tasks, as_matrix(content).rows, counts=counts)
    assert matrix.variants()["micro_average"] == pytest.approx(73.88, abs=0.01)


def test_by_hand() -> None:
    matrix = AccuracyMatrix(
        ("a", "b", "c"),
        ((90.0,), (70.0, 80.0), (60.0, 85.0, 50.0)),
        untrained=(0.0, 10.0, 20.0),
        before=(None, 30.0, 25.0),
        counts=(100, 200, 100),
    )
    assert matrix.metrics() == pytest.approx(
        {
            "average_performance": 65.0,
            "backward_transfer": (-30 + 5) / 2,
            "forgetting": (30 - 5) / 2,
            "forward_transfer": (20 + 5) / 2,
            "plasticity": 220 / 3,
            "incremental_accuracy": (90 + 75 + 65) / 3,
        }
    )
    assert matrix.variants() == pytest.approx(
        {
            "clipped_backward_transfer": -30 / 3,
            "cell_average": (90 + 70 + 80 + 60 + 85 + 50) / 6,
            "micro_average": (60 * 100 + 85 * 200 + 50 * 100) / 400,
        }
    )


def test_forgetting_takes_the_best_stage_not_the_first() -> None:
    assert build([[50.0], [90.0, 40.0], [60.0, 40.0, 10.0]]).metrics()["forgetting"] == 15.0


def test_one_task_has_no_transfer() -> None:
    matrix = AccuracyMatrix(("only",), ((70.0,),), untrained=(5.0,), before=(5.0,))
    metrics = matrix.metrics()
    assert metrics["average_performance"] == metrics["plasticity"] == 70.0
    for name in ("backward_transfer", "forgetting", "forward_transfer"):
        assert metrics[name] is None
    assert json.loads(json.dumps(matrix.to_json(), allow_nan=False))["metrics"] == metrics


def test_forward_transfer_needs_both_measurements() -> None:
    rows = ((50.0,), (40.0, 60.0))
    both = AccuracyMatrix(("a", "b"), rows, untrained=(None, 10.0), before=(None, 30.0))
    assert both.metrics()["forward_transfer"] == 20.0
    half = AccuracyMatrix(("a", "b"), rows, before=(None, 30.0))
    assert half.metrics()["forward_transfer"] is None
    gap = AccuracyMatrix(("a", "b"), rows, untrained=(0.0, None), before=(None, 30.0))
    assert gap.metrics()["forward_transfer"] is None


@STEADY
@given(triangles())
def test_equals_the_oracle(rows: list[list[float]]) -> None:
    found, wanted = build(rows).metrics(), oracle(rows)
    assert list(found) == list(METRIC_NAMES)
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(value, abs=1e-9)


@STEADY
@given(st.lists(triangles(smallest=3), min_size=1, max_size=3), st.integers(3, 3))
def test_a_stack_of_matrices_gives_each_ones_metrics(
    many: list[list[list[float]]], size: int
) -> None:
    matrices = [build(rows[:size]) for rows in many]
    stack = np.stack([matrix.array() for matrix in matrices])
    for name, metric in METRICS.items():
        wanted = [matrix.metrics()[name] for matrix in matrices]
        np.testing.assert_allclose(metric(stack), np.array(wanted, dtype=float), atol=1e-9)


@STEADY
@given(triangles(smallest=2))
def test_relations_between_metrics(rows: list[list[float]]) -> None:
    metrics = build(rows).metrics()
    drop, transfer = metrics["forgetting"], metrics["backward_transfer"]
    assert drop is not None
    assert transfer is not None
    assert drop >= -transfer - 1e-9
    variant = build(rows).variants()["clipped_backward_transfer"]
    assert variant is not None
    assert variant <= min(0.0, transfer * (len(rows) - 1) / len(rows)) + 1e-9


@STEADY
@given(st.integers(2, 7), st.floats(0, 100))
def test_a_constant_matrix_neither_forgets_nor_gains(size: int, score: float) -> None:
    metrics = build([[score] * (t + 1) for t in range(size)]).metrics()
    assert metrics["backward_transfer"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["forgetting"] == pytest.approx(0.0, abs=1e-9)
    for name in ("average_performance", "plasticity", "incremental_accuracy"):
        assert metrics[name] == pytest.approx(score)


@STEADY
@given(triangles(smallest=2), st.randoms())
def test_a_missing_cell_is_never_guessed(rows: list[list[float]], draw: Any) -> None:
    """Scores of a cell that a metric ignores may be missing; those of any other must not."""
    t = draw.randrange(len(rows))
    i = draw.randrange(t + 1)
    holed: list[list[float | None]] = [list(row) for row in rows]
    holed[t][i] = None
    found = AccuracyMatrix(
        tuple(f"task{k}" for k in range(len(rows))), tuple(tuple(row) for row in holed)
    ).metrics()
    other = [list(row) for row in rows]
    other[t][i] = 100.0 - rows[t][i] if rows[t][i] != 50.0 else 0.0
    for name, value in found.items():
        if value is not None:
            assert value == pytest.approx(oracle(rows)[name])
            assert value == pytest.approx(oracle(other)[name])


@STEADY
@given(triangles())
def test_json_round_trip(rows: list[list[float]]) -> None:
    size = len(rows)
    matrix = AccuracyMatrix(
        tuple(f"task{i}" for i in range(size)),
        tuple(tuple(row) for row in rows),
        untrained=(1.0,) * size,
        before=(None,) + (2.0,) * (size - 1),
        counts=(7,) * size,
    )
    text = json.dumps(matrix.to_json(), allow_nan=False)
    assert AccuracyMatrix.from_json(json.loads(text)) == matrix


def test_json_is_the_contract() -> None:
    content = build([[90.0], [70.0, 80.0]]).to_json()
    assert list(content) == ["tasks", "matrix", "metrics"]
    assert content["matrix"] == [[90.0], [70.0, 80.0]]
    assert set(content["metrics"]) == set(METRIC_NAMES)


def test_an_unfinished_run_is_measured_over_its_finished_stages() -> None:
    whole = build([[90.0], [70.0, 80.0], [60.0, 85.0, 50.0]])
    part = AccuracyMatrix(whole.tasks, whole.rows[:2])
    assert part.metrics() == whole.upto(2).metrics() == build([[90.0], [70.0, 80.0]]).metrics()
    empty = AccuracyMatrix(("a", "b"), ())
    assert set(empty.metrics().values()) == {None}
    assert AccuracyMatrix.from_json(empty.to_json()) == empty


def test_empty_extras_count_as_none() -> None:
    assert AccuracyMatrix(("a",), ((1.0,),), untrained=()).untrained is None


@pytest.mark.parametrize(
    ("tasks", "rows", "said"),
    [
        (("a", "a"), (), "unique"),
        ((), (), "at least one"),
        (("a",), ((1.0, 2.0),), "row 0"),
        (("a",), ((1.0,), (1.0, 2.0)), "2 rows"),
        (("a",), ((101.0,),), "percent"),
        (("a",), ((float("nan"),),), "percent"),
    ],
)
def test_wrong_shapes_are_refused(tasks: Any, rows: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AccuracyMatrix(tasks, rows)


@pytest.mark.parametrize(
    "content",
    [{}, {"tasks": ["a"]}, {"tasks": ["a"], "matrix": [["x"]]}, {"tasks": 3, "matrix": 4}],
)
def test_a_damaged_file_is_a_clear_error(content: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match=r"matrix\.json"):
        AccuracyMatrix.from_json(content)


def test_forward_transfer_of_one_task_is_undefined() -> None:
    assert math.isnan(float(forward_transfer(np.array([1.0]), np.array([0.0]))))
