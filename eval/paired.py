"""Paired tests between methods on the same rows after the last stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from accrete.eval.run_record import PredictedRow, RunRecord
from accrete.eval.stats import Interval, holm, paired_bootstrap, sign_flip, sign_flip_exact


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Two lines on the same rows after the last stage."""

    a: str
    b: str
    seeds: list[int | None]
    """The seeds that both have."""
    difference: float
    """Average performance of `a` minus that of `b`, in points, over those seeds."""
    interval: Interval | None
    """None, as `p_bootstrap`, where the rows are too few or too much alike to resample."""
    p_value: float
    """Two-sided p that the differences of the rows are symmetric around 0, by their signs."""
    exact: bool
    """Whether `p_value` counts all signs (McNemar's test for one seed) or draws them."""
    p_bootstrap: float | None
    p_holm: float
    """`p_value` after Holm's correction over all pairs of the setting."""


def paired_tests(
    groups: Sequence[Sequence[RunRecord]],
    labels: Sequence[str],
    tasks: Sequence[str],
    notes: list[str],
) -> list[PairedTest]:
    """Test every pair of groups (the seeds of one method each) on the rows of the last stage.

    Args:
        groups: Finished runs, all scored on the same rows.
        labels: A name for each group.
        tasks: The sequence.
        notes: Takes what could not be tested, and why.
    """
    found: list[dict[str, Any]] = []
    rows = [_rows_by_seed(group) for group in groups]
    if not any(row for by_seed in rows for row in by_seed.values()):
        notes.append("No paired tests: the runs hold no predictions of their last stage.")
        return []
    for (a, rows_a), (b, rows_b) in combinations(zip(labels, rows, strict=True), 2):
        seeds = [seed for seed in rows_a if seed in rows_b]
        if not seeds:
            notes.append(f"No test of {a} against {b}: they have no seed in common.")
            continue
        found.append({"a": a, "b": b, "seeds": seeds, **_paired(rows_a, rows_b, seeds, tasks)})
    corrected = holm([test["p_value"] for test in found])
    return [PairedTest(**test, p_holm=p) for test, p in zip(found, corrected, strict=True)]


_RowsBySeed = dict[int | None, dict[str, dict[str, PredictedRow]]]


def _rows_by_seed(records: Sequence[RunRecord]) -> _RowsBySeed:
    found: _RowsBySeed = {}
    for record in records:
        stage = record.predictions(len(record.tasks) - 1)
        found.setdefault(
            record.seed, {task: {row.id: row for row in rows} for task, rows in stage.items()}
        )
    return found


def _paired(
    a: _RowsBySeed, b: _RowsBySeed, seeds: Sequence[int | None], tasks: Sequence[str]
) -> dict[str, Any]:
    """Row by row differences of the scores, over seeds, and the tests on them."""
    sums = []
    for task in tasks:
        ids = list(a[seeds[0]][task])
        pairs = [[(a[s][task][i].score, b[s][task][i].score) for s in seeds] for i in ids]
        sums.append(np.array([sum(x - y for x, y in row) for row in pairs]))
    differences = [total / len(seeds) for total in sums]
    paired = paired_bootstrap(differences)
    exact = _countable(a, seeds, tasks) and _countable(b, seeds, tasks)
    return {
        "difference": paired.difference,
        "interval": paired.interval,
        "p_bootstrap": paired.p_bootstrap,
        "p_value": sign_flip_exact(np.concatenate(sums)) if exact else sign_flip(differences),
        "exact": exact,
    }


def _countable(runs: _RowsBySeed, seeds: Sequence[int | None], tasks: Sequence[str]) -> bool:
    """Whether AP is the share of rows that are right: scores 0 or 1, all tasks of one size.

    Only then is a test on the number of right rows a test on AP.
    """
    scored = [runs[seed][task].values() for seed in seeds for task in tasks]
    return len({len(rows) for rows in scored}) == 1 and all(
        row.score in (0.0, 1.0) for rows in scored for row in rows
    )
