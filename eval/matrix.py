"""The accuracy matrix and the metrics of continual learning, each with one meaning.

Notation: `a[t, i]` is the score in percent on task i after training task t, both from 0; T is the
number of stages finished so far; `b[i]` is the score on task i of the untrained model. The metrics
are functions of an array `[..., T, T]`, so that a bootstrap runs the very same formulas over many
resampled matrices; a cell that was not scored is NaN, and a metric that needs it is NaN (null in
JSON), never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accrete.pipeline.errors import RunFolderError

Array = NDArray[np.float64]


def average_performance(a: Array) -> Array:
    """AP = (1/T) sum_i a[T-1, i], the macro average after the last stage. Also: Last, ACC, OP."""
    return _mean(a[..., -1, :])


def backward_transfer(a: Array) -> Array:
    """BWT = 1/(T-1) sum_{i<T-1} (a[T-1, i] - a[i, i]); negative means forgetting; T >= 2."""
    return _mean(_changes(a))


def forgetting(a: Array) -> Array:
    """F = 1/(T-1) sum_{i<T-1} (max_{i<=l<T-1} a[l, i] - a[T-1, i]); T >= 2.

    The maximum runs over the stages before the last one, so F is negative if the last stage made
    old tasks better than they ever were. F >= -BWT always.
    """
    old = range(a.shape[-1] - 1)
    return _mean(_stack(a, [np.max(a[..., i:-1, i], axis=-1) - a[..., -1, i] for i in old]))


def plasticity(a: Array) -> Array:
    """(1/T) sum_i a[i, i]: how well each task is learned when its turn comes."""
    return _mean(np.diagonal(a, axis1=-2, axis2=-1))


def incremental_accuracy(a: Array) -> Array:
    """(1/T) sum_t (1/(t+1)) sum_{i<=t} a[t, i]: AP averaged over the stages."""
    return _mean(_stack(a, [_mean(a[..., t, : t + 1]) for t in range(a.shape[-1])]))


def clipped_backward_transfer(a: Array) -> Array:
    """(1/T) sum_i min(0, a[T-1, i] - a[i, i]). Source: TreeLoRA, which prints it without sign.

    It drops every gain on an old task and divides by T, so it is not comparable with BWT.
    """
    losses = np.minimum(0.0, _changes(a))
    return np.asarray(np.sum(losses, axis=-1) / a.shape[-1], dtype=np.float64)


def cell_average(a: Array) -> Array:
    """Mean of all T(T+1)/2 scored cells (TreeLoRA's "All Average"); weights late stages more."""
    t, i = np.tril_indices(a.shape[-1])
    return _mean(a[..., t, i])


def forward_transfer(before: Array, untrained: Array) -> Array:
    """FWT = 1/(T-1) sum_{i>0} (a[i-1, i] - b[i]): zero-shot gain from the tasks before; T >= 2.

    Args:
        before: `[..., T]`, score of each task just before its own stage, a[i-1, i].
        untrained: `[..., T]`, b[i].
    """
    if before.shape[-1] < 2:
        return np.full(before.shape[:-1], np.nan)
    return _mean(before[..., 1:] - untrained[..., 1:])


METRICS: dict[str, Callable[[Array], Array]] = {
    "average_performance": average_performance,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
    "plasticity": plasticity,
    "incremental_accuracy": incremental_accuracy,
}
"""The metrics of the matrix alone, by their name in matrix.json; `forward_transfer` needs more."""

VARIANTS: dict[str, Callable[[Array], Array]] = {
    "clipped_backward_transfer": clipped_backward_transfer,
    "cell_average": cell_average,
}
"""Other people's definitions, only for comparison with their tables."""

METRIC_NAMES = (
    "average_performance",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "plasticity",
    "incremental_accuracy",
)


@dataclass(frozen=True)
class AccuracyMatrix:
    """Scores in percent of a sequence of tasks, finished or under way.

    Raises:
        ValueError: The shapes do not fit, or a score is outside 0 to 100.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    """`rows[t][i]` for i <= t, None where not scored; fewer rows in an unfinished run."""
    untrained: tuple[float | None, ...] | None = None
    """`b[i]` of every task, if it was measured."""
    before: tuple[float | None, ...] | None = None
    """Score of every task just before its own stage, if it was measured."""
    counts: tuple[int, ...] | None = None
    """Rows that each task is scored on."""

    def __post_init__(self) -> None:
        if len(set(self.tasks)) != len(self.tasks) or not self.tasks:
            raise ValueError(f"tasks must be at least one and unique, not {list(self.tasks)}")
        if len(self.rows) > len(self.tasks):
            raise ValueError(f"{len(self.rows)} rows for {len(self.tasks)} tasks")
        for t, row in enumerate(self.rows):
            if len(row) != t + 1:
                raise ValueError(
                    f"row {t} must hold {t + 1} scores (tasks 0 to {t}), has {len(row)}"
                )
        for name in ("untrained", "before", "counts"):
            values = getattr(self, name)
            if values is not None and not values:
                object.__setattr__(self, name, None)  # an empty one says as much as none
            elif values is not None and len(values) != len(self.tasks):
                raise ValueError(f"{name} has {len(values)} values for {len(self.tasks)} tasks")
        for score in [s for r in (*self.rows, self.untrained or (), self.before or ()) for s in r]:
            if score is not None and not 0.0 <= score <= 100.0:
                raise ValueError(f"a score must lie between 0 and 100 percent, not {score}")

    def upto(self, num_stages: int) -> AccuracyMatrix:
        """The matrix as it stood after the first `num_stages` stages, on their tasks."""
        if not 1 <= num_stages <= len(self.rows):
            raise ValueError(f"num_stages must be 1 to {len(self.rows)}, not {num_stages}")
        cut = slice(num_stages)
        return AccuracyMatrix(
            self.tasks[cut],
            self.rows[cut],
            self.untrained[cut] if self.untrained else None,
            self.before[cut] if self.before else None,
            self.counts[cut] if self.counts else None,
        )

    def array(self) -> Array:
        """`[T, T]` over the finished stages; NaN where nothing was scored."""
        a = np.full((len(self.rows), len(self.rows)), np.nan)
        for t, row in enumerate(self.rows):
            a[t, : t + 1] = _floats(row)
        return a

    def metrics(self) -> dict[str, float | None]:
        """The six metrics over the stages finished so far; None where undefined or not measured."""
        found: dict[str, float | None] = dict.fromkeys(METRIC_NAMES)
        if not self.rows:
            return found
        a = self.array()
        found.update({name: _number(metric(a)) for name, metric in METRICS.items()})
        if self.before is not None and self.untrained is not None:
            seen = slice(len(self.rows))
            transfer = forward_transfer(_floats(self.before[seen]), _floats(self.untrained[seen]))
            found["forward_transfer"] = _number(transfer)
        return found

    def variants(self) -> dict[str, float | None]:
        """Other people's definitions: `VARIANTS`, and `micro_average` where counts are known."""
        if not self.rows:
            return dict.fromkeys((*VARIANTS, "micro_average"))
        a = self.array()
        found = {name: _number(metric(a)) for name, metric in VARIANTS.items()}
        found["micro_average"] = self._micro_average()
        return found

    def _micro_average(self) -> float | None:
        """Mean over rows, not tasks, after the last stage: sum_i n[i] a[T-1, i] / sum_i n[i]."""
        if self.counts is None:
            return None
        weights = np.array(self.counts[: len(self.rows)], dtype=np.float64)
        return _number(np.sum(_floats(self.rows[-1]) * weights) / np.sum(weights))

    def to_json(self) -> dict[str, Any]:
        """The content of `matrix.json`; numbers and null only."""
        content: dict[str, Any] = {
            "tasks": list(self.tasks),
            "matrix": [list(row) for row in self.rows],
            "metrics": self.metrics(),
        }
        for name in ("untrained", "before", "counts"):
            values = getattr(self, name)
            if values is not None:
                content[name] = list(values)
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AccuracyMatrix:
        """Inverse of `to_json`; the metrics are worked out anew from the scores.

        Raises:
            RunFolderError: The content is not that of a matrix.json.
        """
        try:
            return cls(
                tuple(str(task) for task in content["tasks"]),
                tuple(_scores(row) for row in content["matrix"]),
                _scores(content["untrained"]) if content.get("untrained") else None,
                _scores(content["before"]) if content.get("before") else None,
                tuple(int(n) for n in content["counts"]) if content.get("counts") else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(
                f"matrix.json: {type(error).__name__}: {error}. It must hold `tasks` (names) and "
                "`matrix` (row t: the scores in percent of tasks 0 to t, null where not scored)."
            ) from error


def _changes(a: Array) -> Array:
    """a[T-1, i] - a[i, i] of every task but the last, on a last axis."""
    return _stack(a, [a[..., -1, i] - a[..., i, i] for i in range(a.shape[-1] - 1)])


def _stack(a: Array, values: Sequence[Array]) -> Array:
    """`values` on a last axis; one NaN if there are none, so that their mean is undefined."""
    return np.stack(list(values) or [np.full(a.shape[:-2], np.nan)], axis=-1)


def _mean(values: Array) -> Array:
    return np.asarray(np.mean(values, axis=-1), dtype=np.float64)


def _floats(scores: Sequence[float | None]) -> Array:
    return np.array([math.nan if s is None else s for s in scores], dtype=np.float64)


def _scores(values: Sequence[Any]) -> tuple[float | None, ...]:
    return tuple(None if value is None else float(value) for value in values)


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
