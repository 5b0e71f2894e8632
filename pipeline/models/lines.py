"""LiNeS: a finished task's update is scaled down in shallow blocks and kept in deep ones."""

from __future__ import annotations

import re

from torch import nn

from accrete.pipeline.models.lora import AdaptedModel, Factors

_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.")


def block_of(base: nn.Module, layer: str) -> tuple[str, int, int] | None:
    """Where a layer stands: its stack's name, its block's number, the stack's blocks.

    Args:
        base: The model without any adapter's names.
        layer: Name of a layer, such as `decoder.block.3.layer.0.SelfAttention.q`.

    Returns:
        Such as `("decoder.block", 3, 24)`; None for a layer outside the blocks.
    """
    match = _BLOCK.match(layer)
    if match is None:
        return None
    blocks = list(base.get_submodule(match["stack"]).children())
    return match["stack"], int(match["number"]), len(blocks)


def depth_scales(adapted: AdaptedModel, shallowest: float) -> dict[str, float]:
    """Layer -> a + (1 - a) l / (n - 1) for block l of the n in its stack, with a = `shallowest`.

    Encoder and decoder have a ramp each. A stack of one block is not scaled; layers outside the
    blocks get a.
    """
    scales: dict[str, float] = {}
    for name in adapted.layers:
        place = block_of(adapted.base, name)
        if place is None:
            scales[name] = shallowest
            continue
        _, number, count = place
        depth = number / (count - 1) if count > 1 else 1.0
        scales[name] = shallowest + (1 - shallowest) * depth
    return scales


def scale_by_depth(adapted: AdaptedModel, factors: Factors, shallowest: float) -> Factors:
    """The factors with every B, and so every delta W, multiplied by its layer's scale.

    Source: Wang et al. 2024 (LiNeS), for one task: alpha = a, beta = 1 - a.
    """
    scales = depth_scales(adapted, shallowest)
    return {name: (a, b * scales[name]) for name, (a, b) in factors.items()}
