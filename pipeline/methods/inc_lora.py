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
    kept: ClassVar[str] = "the finished factors, as part of the past"
    cost: ClassVar[str] = (
        "none in fp32, where the past is folded into W. In bf16 one low-rank product whose rank "
        "grows with the tasks"
    )
    guarantee: ClassVar[str] = "none; the merge is exact"
    deviations: ClassVar[str] = "none"
