"""Scoring batches and what padding costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from accrete.pipeline.data.batches import padding_ratio, score_batches
from accrete.pipeline.data.order import epoch_order


def test_scoring_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 500).tolist()
    batches = score_batches(lengths, 1024)
    assert sorted(i for b in batches for i in b) == list(range(500))
    assert all(len(b) * max(lengths[i] for i in b) <= 1024 for b in batches)
    order = [i for b in batches for i in b]
    assert order == sorted(range(500), key=lambda i: (lengths[i], i))
    assert batches == score_batches(list(lengths), 1024)


def test_no_batch_could_take_another_row() -> None:
    lengths = np.random.default_rng(2).integers(1, 300, 500).tolist()
    batches = score_batches(lengths, 1024)
    for batch, after in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[after[0]] > 1024


def test_a_row_over_the_budget_stands_alone() -> None:
    assert score_batches([5, 2000, 3], 10) == [[2, 0], [1]]
    assert score_batches([], 10) == []


def test_padding_ratio_by_hand() -> None:
    assert padding_ratio([1, 3, 2, 2], [[0, 1], [2, 3]]) == pytest.approx((6 + 4) / 8)
    assert padding_ratio([], []) == 1.0


def test_windows_and_budget_save_padding() -> None:
    """Long-tailed lengths, as texts have them: each way of batching beats the one before."""
    lengths = np.random.default_rng(3).lognormal(5, 0.7, 6400).astype(int) + 8

    def ratio(window: int) -> float:
        order = epoch_order(lengths, 0, 0, 0, 32, window).tolist()
        return padding_ratio(lengths.tolist(), [order[i : i + 32] for i in range(0, 6400, 32)])

    budget = padding_ratio(lengths.tolist(), score_batches(lengths.tolist(), 8192))
    assert ratio(1) > 2
    assert 1.0 < budget < ratio(50) < 1.2
