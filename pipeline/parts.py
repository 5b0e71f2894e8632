"""What a run is made of, and the scores it has so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accrete.pipeline.interruption import StopSignal

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.collate import Collator
    from accrete.pipeline.data.handle import TaskHandle
    from accrete.pipeline.data.store import TrainRows
    from accrete.pipeline.distributed.engine import Engine
    from accrete.pipeline.fence import Fence
    from accrete.pipeline.methods.base import Method
    from accrete.pipeline.models.load import ModelFacts
    from accrete.pipeline.models.lora import AdaptedModel
    from accrete.pipeline.models.past import Past
    from accrete.pipeline.records import Recorder
    from accrete.pipeline.run_dir import RunDir
    from accrete.pipeline.scoring import Evaluator


@dataclass
class Scores:
    """The accuracy matrix as far as it is known, in percent."""

    tasks: list[str]
    rows: list[list[float]] = field(default_factory=list)
    """`rows[t][i]`: score of task i after stage t, i <= t."""
    untrained: list[float | None] = field(default_factory=list)
    """Score of task i by the model as it came."""
    before: list[float | None] = field(default_factory=list)
    """Score of task i just before its own stage."""
    counts: list[int] = field(default_factory=list)
    """Rows scored per task."""


@dataclass
class Parts:
    """What a run is made of; `launch` puts it together."""

    config: RunConfig
    run: RunDir
    model_path: str
    tasks: list[TaskHandle]
    open_rows: Callable[[TaskHandle, int], TrainRows]
    adapted: AdaptedModel
    engine: Engine
    past: Past
    method: Method
    facts: ModelFacts
    collator: Collator
    evaluator: Evaluator
    recorder: Recorder
    on_scores: Callable[[Scores], dict[str, Any]]
    """Called on rank 0 after every stage to write matrix and report; returns the matrix."""
    stop: StopSignal = field(default_factory=StopSignal)
    """Whether a signal has asked the run to stop."""
    fence: Fence | None = None
    """The guard against a second writer, where a launcher set one up."""
