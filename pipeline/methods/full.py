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
    trains: ClassVar[Literal["factors", "weights"]] = "weights"
    fresh_adapter: ClassVar[bool] = False
