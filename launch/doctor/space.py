"""About how many bytes a run will write, from the weights that lie in the cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig

FLOOR = 2**28
"""Events, predictions, the report."""
FACTOR_PART = 0.02
"""LoRA factors and what a method keeps for them, as a part of all weights: rank 8 on queries and
values takes 0.3 % of T5-large, and a method's own statistics a few times that."""
FP32 = 4


def bytes_needed(config: RunConfig, model: Path | None) -> int | None:
    """Bytes that the run folder will take, about; None if the weights are not there to count.

    Args:
        config: The recipe.
        model: Folder of the base model.
    """
    from accrete.pipeline.methods.registry import method_class

    parameters = None if model is None else count_parameters(model)
    if parameters is None:
        return None
    whole = method_class(config.method.kind)(config.method).trains == "weights"
    trained = parameters * FP32 * (1 if whole else FACTOR_PART)
    # A step checkpoint holds weights and two moments; one more exists while it is written.
    steps = config.checkpoint.keep + 1 if config.checkpoint.every_steps else 0
    stages = len(config.tasks)
    return FLOOR + math.ceil(trained * (3 * steps + 2 * stages))


def count_parameters(model: Path) -> int | None:
    """Numbers in a folder's safetensors files; None if there are none."""
    from safetensors import SafetensorError, safe_open

    files = sorted(model.glob("*.safetensors"))
    total = 0
    try:
        for file in files:
            with safe_open(file, framework="np") as content:
                for name in sorted(content.keys()):
                    total += math.prod(content.get_slice(name).get_shape())
    except (OSError, SafetensorError):
        return None
    return total or None
