"""Bytes on one rank at ZeRO 0 to 3: what stays, what a step adds, and the highest moment.

The rules are those of the DeepSpeed version in constraints.txt with accrete's settings (fp32
factors or weights, torch's AdamW, no overlap, contiguous gradients); tests compare them with real
engines, to the byte where DeepSpeed is exact. P is the bytes of the trained parameters, N the
ranks. A GPU's own context (0.3 to 0.8 GiB) comes on top and is not PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass

from accrete.launch.forecast.methods import MethodCost
from accrete.launch.forecast.shapes import FP32, ModelPlan
from accrete.launch.forecast.trace import Trace

STAGES = (0, 1, 2, 3)
WHOLE_BELOW = 100_000
"""ZeRO 3 keeps parameters of at most so many elements whole (DeepSpeed's default)."""
MOST_LIVE = 1_000_000_000
"""ZeRO 3 keeps so many gathered elements from the forward for the backward (default)."""
PREFETCH = 50_000_000
"""ZeRO 3 gathers so many elements ahead (default)."""
REDUCED_AT_ONCE = 500_000_000
"""ZeRO 0 reduces so many elements at once, in a copy (default)."""
ALIGNMENT = 2
"""ZeRO 1 and 2 fill the flat parameters up to a multiple of this times the ranks."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the busiest rank, and the highest sum of what is there at the same time."""

    zero_stage: int
    weights: float
    """Parameters, and from ZeRO 1 on the master copy of this rank's part of the trained ones."""
    gradients: float
    """Gradients when the backward ends."""
    moments: float
    """AdamW's two."""
    activations: float
    """Of the largest micro-batch, at the end of its forward and in the making of gradients."""
    method: float
    """What the method (and the past's branch) holds on the device in a training step."""
    buffers: float
    """Reduction buckets, gathered parameters at ZeRO 3, the optimizer's scratch."""
    passes: float
    """Peak in the method's own passes at the start or the end of a task."""
    scoring: float
    """Peak while tasks are scored."""
    step: float
    """Peak in a training step."""
    start: float
    """Peak when the engine takes the model over: whole, at ZeRO 3 too, which cuts it there."""
    peak: float
    """Highest moment: of the start, of a training step, of a pass, of scoring."""


def rank_memory(
    plan: ModelPlan,
    stage: int | None,
    world: int,
    accumulation: int,
    trace: Trace,
    cost: MethodCost,
    running: float,
    device: str,
) -> RankMemory:
    """The memory of one rank.

    Args:
        plan: The model.
        stage: ZeRO stage; None: the plain engine.
        world: Ranks.
        accumulation: Micro-batches per step.
        trace: Of the largest micro-batch, with `scoring` of the largest scoring batch.
        cost: The method's, at this task.
        running: Bytes alive in a micro-batch of the method's passes.
        device: `cpu` or `cuda`: their AdamW kernels need different scratch.
    """
    adam = plan.config.train.optimizer == "adamw"
    scratch = 2 if device == "cpu" else 1
    if not adam:
        scratch = 0
    held = _Held(plan, stage, world, accumulation, scratch)
    moments = 2 * held.part if adam else 0.0
    method = cost.step_bytes
    always = held.static + moments + method
    # The backward holds the activations at its beginning and the gradients at its end. The bucket
    # comes with the first gradient, when what the output head needed is free again.
    bucket = held.bucket if stage in (1, 2) else 0.0
    begun = max(trace.activations, trace.held + bucket) + held.gathered + held.earlier_gradients
    step = max(begun, held.backward, held.update)
    passes = held.static + moments + cost.between_bytes + cost.pass_bytes
    if cost.pass_bytes:
        passes += running + held.gathered
    scoring = held.static + moments + cost.between_bytes + trace.scoring + held.gathered
    start = float(plan.whole_bytes)
    return RankMemory(
        zero_stage=0 if stage is None else stage,
        weights=held.weights,
        gradients=held.gradients,
        moments=moments,
        activations=trace.activations,
        method=method,
        buffers=max(0.0, step - trace.activations - held.gradients) + held.static - held.weights,
        passes=passes if cost.pass_bytes else 0.0,
        scoring=scoring,
        step=always + step,
        start=start,
        peak=max(start, always + step, passes, scoring),
    )


class _Held:
    """What the engine holds, in bytes."""

    def __init__(
        self, plan: ModelPlan, stage: int | None, world: int, accumulation: int, scratch: int
    ) -> None:
        elements = sum(plan.trained)
        trained = FP32 * elements
        frozen = sum(count * size for count, size in plan.frozen)
        bucket = FP32 * plan.config.engine.bucket_elements
        largest = FP32 * max(plan.trained, default=0)
        self.bucket = float(bucket)
        self.gathered = 0.0
        """ZeRO 3: frozen and trained parameters that are whole during a step."""
        many = accumulation > 1
        if stage is None or stage == 0:
            self.weights = self.static = float(frozen + trained)
            self.part = self.gradients = float(trained)
            copy = min(trained, FP32 * REDUCED_AT_ONCE) if stage == 0 else 0
            self.earlier_gradients = float(trained) if many else 0.0
            self.backward = float(trained + copy)
            each = trained if scratch == 1 else 2 * largest
            self.update = float(trained + (each if scratch else 0))
            return
        if stage == 3:
            self._shard(plan, world, bucket, scratch)
            return
        unit = ALIGNMENT * world
        flat = FP32 * (-(-elements // unit) * unit)
        self.part = flat / world
        self.weights = self.static = frozen + flat + self.part
        self.gradients = self.part if stage == 2 else float(trained)
        self.earlier_gradients = self.gradients if many else 0.0
        end = self.gradients + self.part if stage == 1 or many else self.gradients
        self.backward = end + bucket + (2 * largest if FP32 * elements > bucket else largest)
        self.update = self.part * (1 + max(1, scratch))

    def _shard(self, plan: ModelPlan, world: int, bucket: int, scratch: int) -> None:
        """ZeRO 3: every parameter is cut in N, small ones stay whole beside their part."""
        trained_part = FP32 * sum(-(-count // world) for count in plan.trained)
        sizes = [(count, FP32) for count in plan.trained] + plan.frozen
        parts = sum(-(-count // world) * size for count, size in sizes)
        small = sum(count * size for count, size in sizes if count <= WHOLE_BELOW)
        large = [(count, size) for count, size in sizes if count > WHOLE_BELOW]
        self.part = float(trained_part)
        self.weights = parts + (small if world > 1 else 0.0) + trained_part
        self.gradients = float(trained_part)
        self.static = self.weights + self.gradients + bucket
        if world > 1:
            whole = sum(count for count, _ in large)
            size = sum(count * size for count, size in large) / max(1, whole)
            self.gathered = size * (min(whole, MOST_LIVE) + min(whole, PREFETCH))
        self.earlier_gradients = 0.0
        self.backward = 0.0
        self.update = self.part * (1 + max(1, scratch))
