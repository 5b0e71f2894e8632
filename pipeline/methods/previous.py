"""The model as it was when the task began, which LwF and SR2-LoRA hold the new one to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from accrete.pipeline.models.lora import ADAPTER
from accrete.pipeline.statistics import evaluating

if TYPE_CHECKING:
    from accrete.pipeline.stage import Stage


@contextmanager
def previous_model(stage: Stage) -> Iterator[None]:
    """Inside the context the model has no live adapter; no dropout and no gradients either.

    The live branch is scaled by 0. It still runs: at ZeRO 3 every forward gathers the same
    parameters in the same order, which DeepSpeed's prefetching relies on; and peft's own switch
    changes which factors require gradients.
    """
    layers = list(stage.adapted.layers.values())
    with evaluating(stage.engine.module), stage.engine.aside(), torch.no_grad():
        for layer in layers:
            layer.module.scaling[ADAPTER] = 0.0
        try:
            yield
        finally:
            for layer in layers:
                layer.module.scaling[ADAPTER] = layer.scale
