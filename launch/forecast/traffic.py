"""What the collectives of a training step carry."""

from __future__ import annotations

from dataclasses import dataclass

from accrete.launch.forecast.memory import ALIGNMENT, MOST_LIVE, WHOLE_BELOW
from accrete.launch.forecast.shapes import FP32, ModelPlan


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Bytes of the tensors that go into collectives in one optimizer step, whole."""

    reduced: float
    """Gradients that are summed over ranks."""
    gathered: float
    """Parameters that are put together from their parts."""

    def wire(self, world: int) -> float:
        """Bytes that a rank sends, by the ring algorithm."""
        share = (world - 1) / world
        return 2.0 * share * self.reduced + share * self.gathered


def step_traffic(plan: ModelPlan, stage: int | None, world: int, accumulation: int) -> StepTraffic:
    """Of one optimizer step of any method: none of accrete's adds a byte that counts.

    ZeRO 1 and 2 sum whole buckets and put the updated parameters together again. ZeRO 2 and 3
    reduce after every micro-batch; ZeRO 3 gathers parameters for each forward, and for the backward
    those that do not stay.
    """
    if world == 1 or stage is None:
        return StepTraffic(reduced=0.0, gathered=0.0)
    elements = sum(plan.trained)
    if stage == 0:
        return StepTraffic(reduced=float(FP32 * elements), gathered=0.0)
    if stage < 3:
        unit = ALIGNMENT * world
        flat = FP32 * (-(-elements // unit) * unit)
        rounds = accumulation if stage == 2 else 1
        return StepTraffic(reduced=float(FP32 * elements * rounds), gathered=float(flat))
    large = _gathered(plan)
    whole = sum(count for count, _ in large)
    once = float(sum(count * size for count, size in large))
    again = once * max(0.0, 1.0 - MOST_LIVE / whole) if whole else 0.0
    small = FP32 * sum(count for count in plan.trained if count <= WHOLE_BELOW)
    return StepTraffic(
        # A reduce-scatter: half of an all-reduce on the wire.
        reduced=float(FP32 * elements * accumulation) / 2.0,
        gathered=accumulation * (once + again) + float(small),
    )


def gathered_bytes(plan: ModelPlan, stage: int | None, world: int) -> float:
    """Bytes that a rank receives for a forward without gradients: at ZeRO 3 the model's."""
    if world == 1 or stage != 3:
        return 0.0
    whole = sum(count * size for count, size in _gathered(plan))
    return whole * (world - 1) / world


def _gathered(plan: ModelPlan) -> list[tuple[int, int]]:
    """(elements, bytes of each) of the parameters that ZeRO 3 holds in shards."""
    sizes = [(count, FP32) for count in plan.trained] + plan.frozen
    return [(count, size) for count, size in sizes if count > WHOLE_BELOW]
