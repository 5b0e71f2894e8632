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
    kept: ClassVar[str] = "nothing; the rows of all tasks must stay"
    cost: ClassVar[str] = (
        "a step of `sequential`, but stage t trains on t + 1 tasks. So T tasks cost about T / 2 "
        "times the work of `sequential`"
    )
    guarantee: ClassVar[str] = (
        "a bound: every stage starts from the untrained model. An epoch is every row of all tasks "
        "so far once, interleaved at random. Each task's own order is read front to back (streams "
        "stay streams). The same for any number of ranks and after a resume"
    )
    deviations: ClassVar[str] = (
        "every stage is trained, not the last one only. So every row of the matrix is that of a "
        "real joint model; otherwise the other rows would be scores of an untrained model. Epochs "
        "are those of the stage's newest task; a limit in steps is per stage and does not grow "
        "with the rows. The mix is not sorted by length"
    )
    fresh_adapter: ClassVar[bool] = False
    restarts: ClassVar[bool] = True

    def wrap_data(self, stage: Stage, rows: TrainRows) -> TrainRows:
        """The rows of all tasks so far, in one random order."""
        if stage.index == 0:
            return rows
        earlier = [stage.rows_of(index) for index in range(stage.index)]
        batch = stage.config.train.global_batch_size
        return MixedRows([*earlier, rows], stage.config.seed, stage.index, batch)
