"""Statistics on scored rows: bootstrap intervals, paired tests, correction for several tests.

Rows are what is resampled; seeds and orders are not. An interval therefore says how far a number
would move on other rows of the same tasks, not how far it would move with another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accrete.eval.matrix import METRICS, Array

RESAMPLES = 2000
FLIPS = 9999
"""Draws of `sign_flip`: its p can be as small as 1e-4, so that Holm's correction leaves some."""
_BLOCK = 4_000_000
"""Numbers drawn at a time: all at once would fill the memory where many rows differ."""
_NEGLIGIBLE = 1e-18
_SMALLEST_P = 1e-15


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % percentile interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Difference of two methods on the same rows, in percent points, and what speaks for it."""

    difference: float
    interval: Interval | None
    p_bootstrap: float | None
    """Both None where every draw gives the same difference: see `interval`."""


def resample_means(scores: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Means of `scores` [S, n] over rows drawn with replacement: [resamples, S].

    The S series are resampled together, so their dependence is kept. Rows with the same S values
    are interchangeable, so it is enough to draw how often each distinct column occurs: exact, and
    fast for right/wrong scores.
    """
    columns, counts = np.unique(scores, axis=1, return_counts=True)
    total = scores.shape[1]
    means = np.empty((resamples, scores.shape[0]))
    step = max(1, _BLOCK // counts.size)
    for start in range(0, resamples, step):
        block = means[start : start + step]
        draws = rng.multinomial(total, counts / total, size=len(block))
        block[:] = draws @ columns.T / total
    return means


def bootstrap_matrix(
    scores: Sequence[Array], *, resamples: int = RESAMPLES, seed: int = 0
) -> Array:
    """Resampled accuracy matrices `[resamples, T, T]` in percent, NaN above the diagonal.

    Args:
        scores: For each task i the row scores `[T - i, n_i]`, 0 to 1, after stages i to T-1.
        resamples: Number of resampled matrices.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    num_stages = len(scores)
    a = np.full((resamples, num_stages, num_stages), np.nan)
    for i, task_scores in enumerate(scores):
        a[:, i:, i] = 100.0 * resample_means(task_scores, resamples, rng)
    return a


def metric_intervals(resampled: Array) -> dict[str, Interval | None]:
    """The interval of every metric of the matrix over resampled matrices `[B, T, T]`."""
    return {name: interval(metric(resampled)) for name, metric in METRICS.items()}


def interval(values: Array) -> Interval | None:
    """The middle 95 % of `values`; None if one is undefined or they are all the same.

    Where every row is right, or every row wrong, resampling repeats it: an interval without width
    would claim a certainty that a few rows do not give.
    """
    if values.size == 0 or not np.all(np.isfinite(values)):
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    if low == high:
        return None
    return Interval(low=float(low), high=float(high))


def paired_bootstrap(
    differences: Sequence[Array], *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """Difference of average performance on the same rows, by a bootstrap stratified by task.

    Args:
        differences: For each task, score of method A minus score of method B for each row, -1 to 1.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        The mean over tasks in percent points, its interval, and a two-sided p: twice the smaller
        share of resampled differences on either side of 0, never below 2 / (resamples + 1).
    """
    rng = np.random.default_rng(seed)
    means = [resample_means(d[None, :], resamples, rng)[:, 0] for d in differences]
    values = 100.0 * np.mean(np.stack(means), axis=0)
    observed = 100.0 * float(np.mean([np.mean(d) for d in differences]))
    tail = 1 + min(int(np.sum(values <= 0)), int(np.sum(values >= 0)))
    spread = interval(values)
    return PairedDifference(
        difference=observed,
        interval=spread,
        p_bootstrap=None if spread is None else min(1.0, 2 * tail / (resamples + 1)),
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: `only_a` rows only A has right, `only_b` only B."""
    return sign_flip_exact(np.array([1] * only_a + [-1] * only_b, dtype=np.int64))


def sign_flip_exact(differences: ArrayLike) -> float:
    """Two-sided p that row differences (integers) are symmetric around 0, worked out exactly.

    A row's difference is the number of seeds at which A has it right minus the same for B. Under
    the hypothesis its sign is a fair coin; p is the chance of a sum at least as far from 0 as the
    observed one. For one seed this is McNemar's exact test; for several it keeps a row's seeds
    together, where pooling them as if they were independent would overstate the evidence.
    Smaller values than 1e-15 are given as 1e-15.
    """
    values = np.asarray(differences, dtype=np.int64)
    values = values[values != 0]
    if values.size == 0:
        return 1.0
    distribution = np.ones(1)
    sizes, counts = np.unique(np.abs(values), return_counts=True)
    for size, count in zip(sizes, counts, strict=True):
        # The sum of `count` signed steps is symmetric, so the array stays centred on 0.
        distribution = np.convolve(distribution, _spread(_fair_coin(int(count)), 2 * int(size)))
        distribution = _trim(distribution)
    # An array of length 2k+1 covers the sums -k to k.
    centre = (distribution.size - 1) / 2
    distance = np.abs(np.arange(distribution.size) - centre)
    p = np.sum(distribution[distance >= abs(int(values.sum()))])
    return float(np.clip(p, _SMALLEST_P, 1.0))


def sign_flip(differences: Sequence[Array], *, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p that row differences are symmetric around 0, by a randomisation test on AP.

    Every draw gives each row's difference a random sign and takes the mean over tasks of the tasks'
    means, so a row of a small task weighs more, as it does in average performance; p is the share
    of draws at least as far from 0 as what was observed, which counts as a draw itself.

    Args:
        differences: For each task, score of method A minus score of method B for each row.
        flips: Number of draws.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    weighted = np.concatenate([d / len(d) for d in differences])
    sizes, counts = np.unique(np.abs(weighted[weighted != 0]), return_counts=True)
    drawn = _repeated(sizes, counts, flips, rng) + _single(sizes[counts == 1], flips, rng)
    # A draw that is the observed one must count as such, whatever the order of its sums.
    threshold = abs(float(weighted.sum())) - 1e-9 * float(np.abs(weighted).sum())
    return (1 + int(np.sum(np.abs(drawn) >= threshold))) / (flips + 1)


def _repeated(
    sizes: Array, counts: NDArray[np.int64], flips: int, rng: np.random.Generator
) -> Array:
    """Sums of sizes that several rows have: it is enough to draw how many of them are positive."""
    many = counts > 1
    heads = rng.binomial(counts[many], 0.5, size=(flips, int(many.sum())))
    return np.asarray((2 * heads - counts[many]) @ sizes[many], dtype=np.float64)


def _single(sizes: Array, flips: int, rng: np.random.Generator) -> Array:
    """Sums of sizes that one row has."""
    sums = np.empty(flips)
    step = max(1, _BLOCK // max(1, sizes.size))
    for start in range(0, flips, step):
        block = sums[start : start + step]
        bits = np.frombuffer(rng.bytes(-(-block.size * sizes.size // 8)), dtype=np.uint8)
        heads = np.unpackbits(bits, count=block.size * sizes.size)
        block[:] = 2.0 * (heads.reshape(block.size, sizes.size) @ sizes) - sizes.sum()
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p values in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _fair_coin(n: int) -> NDArray[np.float64]:
    """Probability of 0 to n heads in n throws, in log space so that it holds for any n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_p = log_factorial[n] - log_factorial - log_factorial[::-1] - n * np.log(2.0)
    return _trim(np.exp(log_p))


def _spread(values: NDArray[np.float64], step: int) -> NDArray[np.float64]:
    spread = np.zeros((values.size - 1) * step + 1)
    spread[::step] = values
    return spread


def _trim(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cut equal negligible tails off both ends; whole, 10^5 rows would convolve for minutes."""
    kept = np.flatnonzero(values > _NEGLIGIBLE)
    edge = min(int(kept[0]), values.size - 1 - int(kept[-1]))
    return values[edge : values.size - edge]
