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
    fresh_adapter: ClassVar[bool] = False
    restarts: ClassVar[bool] = True
