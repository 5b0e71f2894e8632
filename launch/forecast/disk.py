"""What a run writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accrete.launch.forecast.methods import MethodCost
from accrete.launch.forecast.shapes import ModelPlan

TOKEN_ON_DISK = 4
"""Bytes of a token id in the prepared rows."""
ROW_ON_DISK = 64
"""Bytes of a row's id and offsets there."""
PREDICTION = 120
"""Bytes of a scored row in predictions.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes on disk when the run ends (`step_checkpoints`: while a task is trained)."""

    adapters: float
    checkpoints: float
    step_checkpoints: float
    predictions: float
    prepared_rows: float
    """In the cache, shared with other runs over the same rows."""

    @property
    def run_folder(self) -> float:
        """Most that the run folder holds at once."""
        return self.adapters + self.checkpoints + self.step_checkpoints + self.predictions


def disk(
    plan: ModelPlan,
    costs: Sequence[MethodCost],
    scored_rows: int,
    prepared_rows: float,
) -> Disk:
    """What a whole sequence leaves.

    Args:
        plan: The model.
        costs: The method's, of every stage.
        scored_rows: Rows scored over all stages.
        prepared_rows: Bytes of the prepared rows.
    """
    trains_weights = plan.method.trains == "weights"
    live = 4.0 * plan.base_parameters if trains_weights else float(plan.factor_bytes)
    checkpoint = plan.config.checkpoint
    step = live + 2 * 4.0 * sum(plan.trained)
    return Disk(
        adapters=0.0 if trains_weights else float(plan.factor_bytes) * len(costs),
        checkpoints=sum(live + cost.saved_bytes for cost in costs),
        # A new one is written before an old one is deleted.
        step_checkpoints=0.0 if checkpoint.every_steps is None else (checkpoint.keep + 1) * step,
        predictions=float(PREDICTION * scored_rows),
        prepared_rows=prepared_rows,
    )


def folder_bytes(path: str) -> float:
    """Bytes of all files below a folder; 0 if it is not there."""
    root = Path(path)
    if not path or not root.is_dir():
        return 0.0
    return float(sum(file.stat().st_size for file in root.rglob("*") if file.is_file()))
