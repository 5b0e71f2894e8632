"""What all cases share: models, stages of ZeRO, the spine's methods, batch sizes."""

from __future__ import annotations

MODELS = ("t5", "llama")
STAGES = (0, 1, 2, 3)
STRENGTH = 3.0e2
METHODS = {
    "sequential": {"method": "sequential"},
    "ewc_lora": {"method": "ewc_lora", "settings": {"lambda_": STRENGTH}},
}
BATCH = 8
CUT = 2
"""Step of the second task after which a run is cut."""


def micro(world: int, accumulation: int) -> int:
    return BATCH // world // accumulation


def counted(zero: int) -> dict[str, object]:
    """Where traffic is counted: one layer a side, two micro-batches in each of two steps.

    At ZeRO 3, where every module costs, the smaller model.
    """
    model = "llama_short" if zero == 3 else "t5_short"
    return {"model": model, "zero": zero, "micro": 2, "rows": 16}
