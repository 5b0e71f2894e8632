"""A new LoRA adapter per task, the finished ones summed into the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accrete.pipeline.methods.base import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class IncLoraConfig(MethodConfig):
    """No settings."""

    kind: str = "inc_lora"


class IncLora(Method):
    """Finished factors join the past exactly; nothing restrains the new ones."""

    Config: ClassVar[type[MethodConfig]] = IncLoraConfig
    summary: ClassVar[str] = "a new LoRA adapter per task, old ones summed in (IncLoRA)"
    source: ClassVar[str] = "baseline of Wang et al. 2023 (O-LoRA)"
