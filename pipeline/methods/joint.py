"""Joint training on all tasks so far: the upper bound that continual learning is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from accrete.pipeline.data.mix import MixedRows
from accrete.pipeline.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from accrete.pipeline.data.store import TrainRows
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class JointConfig(MethodConfig):
    """No settings."""

    kind: str = "joint"


class Joint(Method):
    """At every stage a new adapter, trained from the untrained model on the rows of all tasks so
    far.

    Row t of the matrix is then the joint model of tasks 0 to t, which is what a learner at stage t
    could have had; T tasks cost about T/2 times the work of `sequential`. No stage is left out, as
    its scores would be those of an untrained model. An epoch is one pass over all rows so far; a
    limit in steps (`train.max_steps`) is one per stage and does not grow with them.
    """

    Config: ClassVar[type[MethodConfig]] = JointConfig
    summary: ClassVar[str] = "one LoRA adapter trained anew on all tasks so far (upper bound)"
    source: ClassVar[str] = "multi-task learning (MTL) of the continual-learning literature"
    fresh_adapter: ClassVar[bool] = False
    restarts: ClassVar[bool] = True

    def wrap_data(self, stage: Stage, rows: TrainRows) -> TrainRows:
        """The rows of all tasks so far, in one random order."""
        if stage.index == 0:
            return rows
        earlier = [stage.rows_of(index) for index in range(stage.index)]
        batch = stage.config.train.global_batch_size
        return MixedRows([*earlier, rows], stage.config.seed, stage.index, batch)
