"""Per-task training: what each task would reach alone, the reference for intransigence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accrete.pipeline.methods.base import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class PerTaskConfig(MethodConfig):
    """No settings."""

    kind: str = "per_task"


class PerTask(Method):
    """At every stage a new adapter, trained from the untrained model on that task alone.

    The matrix holds the scores of one model at a time, so a[t, i] with i < t is the newest task's
    adapter on an older task. Papers score every task with its own adapter: their figure is the mean
    of the diagonal, `plasticity`. It minus another run's plasticity is that run's intransigence.
    """

    Config: ClassVar[type[MethodConfig]] = PerTaskConfig
    summary: ClassVar[str] = "a LoRA adapter for each task alone (read `plasticity`: its diagonal)"
    source: ClassVar[str] = "per-task fine-tuning (PerTaskFT) of the continual-learning literature"
    kept: ClassVar[str] = "nothing. Each stage's adapter lies in its folder, as always"
    cost: ClassVar[str] = "that of `sequential`"
    guarantee: ClassVar[str] = (
        "a bound: every stage equals a first stage on that task alone. To the bit, with the same "
        "initial factors"
    )
    deviations: ClassVar[str] = (
        "the matrix holds one model at a time. Papers score every task with its own adapter. Here "
        "a[t, i] with i < t is the newest adapter on an older task, and their figure is the mean "
        "of the diagonal: `plasticity`. `accrete compare` says so and prints the intransigence of "
        "the other runs: plasticity of `per_task` minus their own"
    )
    fresh_adapter: ClassVar[bool] = False
    restarts: ClassVar[bool] = True
