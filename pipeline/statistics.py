"""A pass over a task's rows that shows every adapted layer's input and output gradient.

Nothing here touches a parameter's gradient: the frozen base never needs one, and the trainable
factors' are not computed, so the pass works the same at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accrete.pipeline.models.lora import AdaptedLayer
from accrete.pipeline.stage import Stage, row_losses

Visit = Callable[[AdaptedLayer, torch.Tensor, torch.Tensor], None]
"""(layer, x [b, T, d_in], g [b, T, d_out]); g is the gradient of each row's own loss."""


def visit_gradients(
    stage: Stage,
    visit: Visit,
    *,
    token_mean: bool = False,
    max_rows: int | None = None,
    after_batch: Callable[[int], None] | None = None,
) -> int:
    """Run the task's rows forward and backward once, in evaluation mode.

    Args:
        stage: The stage; its weights are not changed.
        visit: Called for every adapted layer and micro-batch, after that layer's backward.
        token_mean: Each row's loss is the mean instead of the sum over its label tokens.
        max_rows: Use only the first so many rows of the first epoch's order.
        after_batch: Called after each global batch with its number of rows.

    Returns:
        The number of rows visited, over all ranks.

    Collective: at ZeRO 3; every rank runs the same number of batches.
    """
    total = stage.rows.num_rows if max_rows is None else min(max_rows, stage.rows.num_rows)
    seen, step = 0, 0
    module = stage.engine.module
    was_training = module.training
    module.eval()
    with _watched(stage, visit) as leaf:
        while seen < total:
            rows = stage.global_batch(step)[: total - seen]
            for batch in stage.micro_batches(rows):
                losses = row_losses(stage.logits(batch, through_engine=False), batch.labels)
                if token_mean:
                    losses = losses / (batch.labels != -100).sum(1).clamp(min=1)
                # Differentiating by this one leaf runs the whole graph, so that every layer's
                # hook fires, and leaves `.grad` of all parameters (and DeepSpeed's hooks) alone.
                torch.autograd.grad(losses.sum(), leaf)
            seen, step = seen + len(rows), step + 1
            if after_batch is not None:
                after_batch(len(rows))
    module.train(was_training)
    return total


def _vocabulary(stage: Stage) -> int:
    return int(stage.adapted.base.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


@contextmanager
def _watched(stage: Stage, visit: Visit) -> Iterator[torch.Tensor]:
    """Hooks on the embeddings and on every adapted layer, for the time of a pass."""
    leaf = torch.zeros(1, device=stage.engine.device, requires_grad=True)

    def root(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + leaf.to(output.dtype)

    def watch(layer: AdaptedLayer) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            # The gradient hook sits on the output tensor and fires once per micro-batch; the
            # forward hook itself fires twice under gradient checkpointing.
            inputs = arguments[0].detach()
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: visit(layer, inputs, gradient.detach())
                )

        return hook

    # Encoder and decoder may hold embedding modules of their own over one shared weight.
    handles = [
        module.register_forward_hook(root)
        for module in stage.adapted.base.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= _vocabulary(stage)
    ]
    for layer in stage.adapted.layers.values():
        handles.append(layer.module.register_forward_hook(watch(layer)))
    try:
        yield leaf
    finally:
        for handle in handles:
            handle.remove()
