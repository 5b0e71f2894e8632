"""One LoRA adapter trained through all tasks: the baseline that forgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accrete.pipeline.methods.base import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(MethodConfig):
    """No settings."""

    kind: str = "sequential"


class Sequential(Method):
    """The same factors go on from task to task; only the optimizer starts anew."""

    Config: ClassVar[type[MethodConfig]] = SequentialConfig
    summary: ClassVar[str] = "one LoRA adapter trained through all tasks (SeqLoRA)"
    source: ClassVar[str] = "baseline of Wang et al. 2023 (O-LoRA)"
    kept: ClassVar[str] = "nothing beside the adapter"
    cost: ClassVar[str] = "the measure of all others"
    guarantee: ClassVar[str] = "none: it forgets"
    deviations: ClassVar[str] = "none"
    fresh_adapter: ClassVar[bool] = False
