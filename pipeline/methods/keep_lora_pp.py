"""KeepLoRA++: KeepLoRA with a branch that is weak in shallow layers and whole in deep ones.

Layer i of the n adapted ones in a stack is multiplied by s_i = g + (1 - g) i / (n - 1), in the
forward and so in the merged delta: a fixed scale, neither a schedule nor a mask. With AdamW the
change of W per step is linear in s_i, with SGD quadratic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from accrete.pipeline.methods.base import MethodConfig
from accrete.pipeline.methods.keep_lora import KeepLora, KeepLoraConfig

_BLOCK = re.compile(r"(?P<stack>.+?)\.(?P<number>\d+)\.")


@dataclass(frozen=True, kw_only=True)
class KeepLoraPpConfig(KeepLoraConfig):
    """Settings of KeepLoRA++."""

    kind: str = "keep_lora_pp"
    first_scale: Annotated[float, Field(gt=0, le=1)] = 0.2
    """g: scale of a stack's first adapted layer; the last has 1. 1 makes this KeepLoRA."""
    ramp: Literal["per_stack", "joined"] = "per_stack"
    """Encoder and decoder have a ramp each, or share one from the encoder's first to the decoder's
    last layer. Models with one stack: no difference."""


class KeepLoraPp(KeepLora):
    """Scaled from shallow to deep."""

    Config: ClassVar[type[MethodConfig]] = KeepLoraPpConfig
    summary: ClassVar[str] = "KeepLoRA with updates scaled from shallow to deep layers (KeepLoRA++)"
    source: ClassVar[str] = (
        "KeepLoRA++, the extension of Luo et al. 2026 (KeepLoRA) by layer scaling"
    )
    guarantee: ClassVar[str] = (
        "that of `keep_lora`: A M = 0. The branch of the i-th of n adapted blocks of a stack is "
        "multiplied by g + (1 - g) i / (n - 1), in the forward and in the merged delta alike. It "
        "stands in the saved adapters as peft's `alpha_pattern`, so `PeftModel.from_pretrained` "
        "gives the same logits; an exported adapter of all tasks has it inside B"
    )
    deviations: ClassVar[str] = (
        "B starts at zero, memory from features, a ramp per stack. The former two as in the "
        "reference; the encoder-decoder form is this project's. Layers outside of blocks keep "
        "scale 1. With AdamW a step of W is linear in the scale, with SGD quadratic"
    )

    def __init__(self, config: KeepLoraPpConfig) -> None:
        super().__init__(config)
        self._first = config.first_scale
        self._joined = config.ramp == "joined"

    def layer_scales(self, layers: list[str]) -> dict[str, float]:
        """The ramp over the adapted blocks; layers outside of blocks keep their scale.

        Source: the reference's code, with n the number of adapted layers; s = 1 if n is 1.
        """
        places: dict[str, tuple[str, int]] = {}
        for name in layers:
            match = _BLOCK.match(name)
            if match is not None:
                places[name] = (match["stack"], int(match["number"]))
        stacks: dict[str, list[tuple[str, int]]] = {}
        for place in dict.fromkeys(places.values()):
            stacks.setdefault("" if self._joined else place[0], []).append(place)
        ramps = {place: s for blocks in stacks.values() for place, s in self._ramp(blocks)}
        return {name: ramps[place] for name, place in places.items()}

    def _ramp(self, blocks: list[tuple[str, int]]) -> list[tuple[tuple[str, int], float]]:
        last = len(blocks) - 1
        depth = [i / last if last else 1.0 for i in range(len(blocks))]
        return [
            (block, self._first + (1 - self._first) * share)
            for block, share in zip(blocks, depth, strict=True)
        ]
