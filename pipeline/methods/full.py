"""Full fine-tuning: all weights are trained through all tasks, nothing is remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from accrete.pipeline.methods.base import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """No settings."""

    kind: str = "full"


class Full(Method):
    """The model's own weights, in fp32, without an adapter; only the optimizer starts anew."""

    Config: ClassVar[type[MethodConfig]] = FullConfig
    summary: ClassVar[str] = "all weights trained through all tasks, no adapter (SeqFT)"
    source: ClassVar[str] = "baseline of Wang et al. 2023 (O-LoRA)"
    kept: ClassVar[str] = (
        "nothing beside the weights. On disk each finished stage keeps every weight in its "
        "checkpoint, 4 bytes each"
    )
    cost: ClassVar[str] = (
        "gradients and AdamW moments of all weights. 16 bytes per weight in all, sharded as ZeRO "
        "does; no collective beyond the engine's own. A task's ends: none"
    )
    guarantee: ClassVar[str] = (
        "none against forgetting. Equal to a plain AdamW loop to 1e-5. The same numbers at every "
        "ZeRO stage, also with every weight partitioned"
    )
    deviations: ClassVar[str] = (
        "weights are kept in fp32 and, with `model.dtype: bf16`, cast for their products. What is "
        "cast stays until the backward (2 bytes a weight; not at ZeRO 3). A weight shared by "
        "several modules counts once"
    )
    trains: ClassVar[Literal["factors", "weights"]] = "weights"
    fresh_adapter: ClassVar[bool] = False
