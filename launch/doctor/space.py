"""About how many bytes a run will write: what `accrete plan` forecasts, without reading a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig

FLOOR = 2**28
"""Events, the report, and what rows longer or more than assumed would add."""
ROWS = (10_000, 1_000, 16)
"""Rows of every task, to train on and to score, and tokens of an answer."""


def bytes_needed(config: RunConfig, model: Path | None) -> int | None:
    """Bytes that the run folder will take, about; None if the model's configuration is not there.

    Args:
        config: The recipe.
        model: Folder of the base model.
    """
    if model is None:
        return None
    try:
        from accrete.launch.forecast.recipe import Assumed, assumed_tasks
        from accrete.launch.forecast.run import Forecaster
        from accrete.launch.forecast.shapes import ModelPlan
    except ImportError:  # a library is missing, and the lines on versions say so
        return None
    from accrete.pipeline.errors import ModelError

    try:
        plan = ModelPlan.of(config, str(model), "cpu")
    except ModelError:
        return None
    tasks = assumed_tasks(config, Assumed(*ROWS))
    # What lies on disk is whole, for any number of ranks.
    return FLOOR + math.ceil(Forecaster(plan, tasks, world=1).disk().run_folder)
