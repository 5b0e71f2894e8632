"""What each method adds to a run: state, scratch, passes over rows, forwards, rows.

Sizes that depend on the data (the dimension of a protected space) are given by their bound.
Methods from elsewhere are forecast as `sequential`, and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accrete.launch.forecast.shapes import FP32, ModelPlan, depth
from accrete.pipeline.math.subspace import widened
from accrete.pipeline.methods.registry import METHODS, method_class
from accrete.pipeline.models.past import choose_mode

if TYPE_CHECKING:
    from accrete.launch.forecast.trace import BatchShape, Tracer

EIGEN_OPERATIONS = 9.0
"""Nominal operations for each d^3 of a decomposition."""
TOKEN = 8
"""Bytes of a token id in memory."""


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """Of one stage, on one rank."""

    between_bytes: float = 0.0
    """Kept on the device from task to task (`Method.state_bytes`), at the start of the stage."""
    after_bytes: float = 0.0
    """The same when the stage has ended."""
    host_bytes: float = 0.0
    """Kept in the host's memory."""
    saved_bytes: float = 0.0
    """Of the method's state in the checkpoint that ends the stage."""
    step_bytes: float = 0.0
    """On the device in a training step."""
    pass_bytes: float = 0.0
    """Sums and scratch of the passes at the start and the end of the stage."""
    forward_rows: float = 0.0
    """Rows that run forward in passes."""
    gradient_rows: float = 0.0
    """Rows that run forward and backward in passes."""
    eigen_flops: float = 0.0
    """Decompositions of the passes, nominal fp64 operations of the busiest rank."""
    step_forwards: float = 0.0
    """Forwards without gradients that every micro-batch adds."""
    step_flops: float = 0.0
    """Further arithmetic of a step on a rank."""
    one_by_one: bool = False
    """Gradient passes go row by row."""
    known: bool = True
    """False: a method that this table does not know."""


@dataclass(frozen=True)
class Situation:
    """Where a stage stands, for the costs of its method."""

    plan: ModelPlan
    tracer: Tracer
    world: int
    index: int
    """Number of the stage, from 0."""
    rows: int
    """Training rows of its own task."""
    batch: BatchShape
    """Its largest micro-batch."""
    classes: int
    """Closed answers of all tasks so far; 0: open."""

    @property
    def settings(self) -> Any:
        """The method's configuration."""
        return self.plan.config.method

    @property
    def dense(self) -> float:
        """Bytes of one fp32 number for every entry of the adapted weights."""
        return float(FP32 * sum(layer.rows * layer.columns for layer in self.plan.layers))

    def inputs(self) -> list[int]:
        """d_in of every distinct input of the adapted layers."""
        names = self.tracer.distinct_inputs()
        columns = {layer.name: layer.columns for layer in self.plan.layers}
        return [columns[name] for name in dict.fromkeys(names.values())]

    def capped(self, limit: int | None) -> int:
        """Rows of a pass with a limit."""
        return self.rows if limit is None else min(limit, self.rows)


def method_cost(where: Situation) -> MethodCost:
    """The cost of a stage; see `MethodCost`."""
    kind = _known_kind(where.plan.config.method.kind)
    if kind is None:
        return MethodCost(known=False)
    find = COSTS.get(kind)
    cost = MethodCost() if find is None else find(where)
    return _with_past(where, cost)


def _known_kind(kind: str) -> str | None:
    """The nearest of accrete's own methods that a class is, or derives from."""
    own = {method_class(name): name for name in METHODS}
    for parent in method_class(kind).__mro__:
        if parent in own:
            return own[parent]
    return None


def _with_past(where: Situation, cost: MethodCost) -> MethodCost:
    """Finished tasks' factors: a branch on the device, or W_0 in the host's memory."""
    plan = where.plan
    if plan.method.trains == "weights" or not plan.method.fresh_adapter:
        return cost
    host = cost.host_bytes + where.index * plan.factor_bytes
    mode = choose_mode(plan.config.adapter.past, plan.dtype)
    branch = 0.0
    if mode == "branch":
        branch = float(where.index * plan.factor_bytes)
        if plan.method.merge == "factor_sum":
            branch = min(branch, float(plan.factor_bytes))
    elif where.index:
        host += where.dense * (plan.dtype.itemsize / FP32)
    tokens = where.batch.rows * (where.batch.prompt + where.batch.answer)
    values = branch / FP32
    return MethodCost(
        **{
            **cost.__dict__,
            "between_bytes": cost.between_bytes + branch,
            "after_bytes": cost.after_bytes + branch,
            "step_bytes": cost.step_bytes + branch,
            "host_bytes": host,
            # Forward and the gradient for the input; no gradient for the factors.
            "step_flops": cost.step_flops + 4.0 * tokens * values,
        }
    )


def _ewc(where: Situation) -> MethodCost:
    weights = FP32 * sum(where.plan.trained)
    kept = 2.0 * weights / where.world
    before = kept if where.index else 0.0
    return MethodCost(
        between_bytes=before,
        after_bytes=kept,
        step_bytes=before,
        saved_bytes=2.0 * weights,
        # The sum of squares; the trace of a row has the gradient in the making.
        pass_bytes=weights,
        gradient_rows=where.capped(where.settings.fisher_rows),
        one_by_one=True,
    )


def _ewc_lora(where: Situation) -> MethodCost:
    settings, plan = where.settings, where.plan
    if settings.penalty == "none":
        return MethodCost()
    rank = plan.config.adapter.rank
    if settings.penalty == "separate":
        whole = float(plan.factor_bytes)
        kept = whole / where.world
    elif settings.fisher == "rank1":
        whole = float(FP32 * sum(la.rows + la.columns for la in plan.layers))
        kept = float(FP32 * sum(la.rows / where.world + la.columns for la in plan.layers))
    else:
        whole, kept = where.dense, where.dense / where.world
    late = settings.fisher_at == "pretrained"
    before = kept if where.index or late else 0.0
    largest = FP32 * max((la.rows * la.columns for la in plan.layers), default=0)
    measured = where.index == 0 if late else True
    active = where.index > 0 and settings.lambda_ > 0
    return MethodCost(
        between_bytes=before,
        after_bytes=kept,
        # Its part of the gradient of every factor, and what passed through the hooks.
        step_bytes=before + (3.0 * plan.factor_bytes if active else 0.0),
        saved_bytes=whole,
        pass_bytes=(whole + 2 * largest) if measured else 0.0,
        gradient_rows=float(where.capped(settings.fisher_rows)) if measured else 0.0,
        step_flops=6.0 * rank * where.dense / FP32 / where.world if active else 0.0,
    )


def _o_lora(where: Situation) -> MethodCost:
    rank = where.plan.config.adapter.rank
    one = float(FP32 * rank * sum(layer.columns for layer in where.plan.layers)) / where.world
    active = where.index > 0
    return MethodCost(
        between_bytes=where.index * one,
        after_bytes=(where.index + 1) * one,
        step_bytes=where.index * one + (4.0 * where.plan.factor_bytes if active else 0.0),
        step_flops=4.0 * rank * where.index * one / FP32,
    )


def _inf_lora(where: Situation) -> MethodCost:
    sizes = where.inputs()
    bound = FP32 * sum(size * size / 2 for size in sizes) / where.world
    before = bound if where.index else 0.0
    return MethodCost(
        between_bytes=before,
        after_bytes=bound,
        saved_bytes=bound * where.world,
        step_bytes=before,
        pass_bytes=_covariances(sizes),
        eigen_flops=2.0 * _eigen(where, sizes),
        forward_rows=2.0 * where.capped(where.settings.rows),
    )


def _gpm(where: Situation) -> MethodCost:
    sizes = where.inputs()
    bound = float(FP32 * sum(size * size for size in sizes))
    before = bound if where.index else 0.0
    active = where.index > 0 and where.settings.project == "update"
    largest = FP32 * max((la.rows * la.columns for la in where.plan.layers), default=0)
    flops = sum(4.0 * la.rows * la.columns * la.columns for la in where.plan.layers)
    return MethodCost(
        between_bytes=before,
        after_bytes=bound,
        saved_bytes=bound,
        step_bytes=before + (where.dense + 2.0 * largest if active else 0.0),
        pass_bytes=_covariances(sizes),
        eigen_flops=_eigen(where, sizes),
        forward_rows=float(where.capped(where.settings.rows)),
        step_flops=flops if where.index else 0.0,
    )


def _keep_lora(where: Situation) -> MethodCost:
    settings = where.settings
    sizes = where.inputs()
    features = settings.memory == "features"
    columns = sizes if features else [layer.columns for layer in where.plan.layers]
    memory = FP32 * sum(size * size for size in columns) / where.world if settings.eps_f else 0.0
    principal = (
        FP32 * sum(la.columns * min(la.rows, la.columns) for la in where.plan.layers) / where.world
        if settings.eps_w
        else 0.0
    )
    ends = features and settings.eps_f > 0
    again = not features and settings.eps_f > 0
    rows = float(where.capped(settings.gradient_rows))
    shorter = [min(la.rows, la.columns) for la in where.plan.layers]
    # Every gradient; before the first task every pretrained weight, too; and the memory's growth.
    starts = 2.0 if settings.eps_w and not where.index else 1.0
    grows = _eigen(where, columns) if settings.eps_f else 0.0
    return MethodCost(
        host_bytes=principal + (memory if where.index else 0.0),
        saved_bytes=memory * where.world,
        pass_bytes=max(where.dense + _widest(columns), _covariances(sizes) if ends else 0.0),
        eigen_flops=starts * _eigen(where, shorter) + grows,
        gradient_rows=rows * (2.0 if again else 1.0),
        forward_rows=float(where.capped(settings.feature_rows)) if ends else 0.0,
    )


def _lora_subtraction(where: Situation) -> MethodCost:
    settings = where.settings
    triplet = (settings.triplet > 0 or settings.ncm) and where.classes > 0
    width = max(layer.columns for layer in where.plan.layers)
    prototypes = float(FP32 * where.classes * width) if triplet else 0.0
    # Prototypes are one pass; counting what lies nearest to them, another.
    rows = where.rows * (1 + settings.ncm) if triplet else 0
    if not where.index:
        return MethodCost(after_bytes=prototypes, saved_bytes=prototypes, forward_rows=float(rows))
    sizes = where.inputs()
    bases = FP32 * sum(size * size / 2 for size in sizes)
    outputs = [la.rows for la in where.plan.layers] if settings.b_mode == "output_cov" else []
    count = 2.0 * where.plan.config.adapter.rank * len(where.plan.layers) / max(1, len(sizes))
    return MethodCost(
        between_bytes=prototypes,
        after_bytes=prototypes,
        saved_bytes=prototypes,
        step_bytes=bases + prototypes,
        pass_bytes=_covariances(sizes) + bases,
        eigen_flops=_eigen(where, sizes + outputs),
        forward_rows=float(where.capped(settings.feature_rows) + rows),
        step_flops=sum(4.0 * count * size * size / 2 for size in sizes),
    )


def _sr2_lora(where: Situation) -> MethodCost:
    from accrete.pipeline.methods.sr2_lora import CACHE_BYTES

    settings = where.settings
    if not where.index or settings.mu == 0:
        return MethodCost()
    size = float(FP32 * where.rows * sum(depth(where.plan.settings)))
    how = settings.cache
    if how == "always" or (how == "auto" and size <= CACHE_BYTES):
        return MethodCost(step_bytes=size, forward_rows=float(where.rows))
    return MethodCost(step_forwards=1.0)


def _lwf(where: Situation) -> MethodCost:
    if not where.index or where.settings.weight == 0:
        return MethodCost()
    logits = FP32 * where.batch.rows * where.batch.answer * where.plan.vocabulary
    # The old model's logits and both distributions wait for the backward.
    return MethodCost(step_bytes=3.0 * logits, step_forwards=1.0)


def _replay(where: Situation) -> MethodCost:
    row = TOKEN * (where.batch.prompt + where.batch.answer)
    before, after = (
        float(row * kept_rows(where.settings, [where.rows] * count))
        for count in (where.index, where.index + 1)
    )
    return MethodCost(host_bytes=before, saved_bytes=after)


COSTS: dict[str, Callable[[Situation], MethodCost]] = {
    "ewc": _ewc,
    "ewc_lora": _ewc_lora,
    "gpm": _gpm,
    "inf_lora": _inf_lora,
    "keep_lora": _keep_lora,
    "keep_lora_pp": _keep_lora,
    "lora_subtraction": _lora_subtraction,
    "lwf": _lwf,
    "o_lora": _o_lora,
    "replay": _replay,
    "sr2_lora": _sr2_lora,
}
"""Methods without an entry add nothing."""


def _covariances(sizes: Sequence[int]) -> float:
    """All inputs' second moments in fp32, and the scratch of one decomposition."""
    return float(FP32 * sum(size * size for size in sizes)) + _widest(sizes)


def _widest(sizes: Sequence[int]) -> float:
    """Scratch of the largest decomposition: the matrix, its vectors and a copy."""
    widest = max(sizes, default=0)
    return 4.0 * widest * widest * _precision(widest)


def _eigen(where: Situation, sizes: Sequence[int]) -> float:
    """Operations of the decompositions of matrices of these sizes, shared out among the ranks.

    All eigenvectors of a symmetric matrix take about 9 d^3 operations; one of fp32 counts half, as
    it takes half the time.
    """
    each = [EIGEN_OPERATIONS * d**3 * (_precision(d) / 8) for d in sizes]
    return max(sum(each) / where.world, max(each, default=0.0))


def _precision(size: int) -> int:
    """Bytes of a number in a decomposition."""
    return widened(torch.empty(size, 0, device="meta")).element_size()


def kept_rows(settings: Any, finished: Sequence[int]) -> int:
    """Rows that replay keeps of finished tasks with so many training rows."""
    if settings.memory == "reservoir":
        return min(int(settings.rows), sum(finished))
    if settings.fraction is not None:
        return sum(math.ceil(settings.fraction * rows) for rows in finished)
    return sum(min(settings.rows, rows) for rows in finished)


def epoch_rows(kind: str, settings: Any, rows: Sequence[int], index: int, batch: int) -> int:
    """Rows of one epoch of stage `index`: its task's, and earlier tasks' where a method adds them.

    Args:
        kind: The method.
        settings: Its configuration.
        rows: Training rows of all tasks.
        index: The stage.
        batch: Rows of a global batch.
    """
    own = rows[index]
    known = _known_kind(kind)
    if known == "joint":
        return sum(rows[: index + 1])
    if known != "replay" or not index:
        return own
    kept = kept_rows(settings, rows[:index])
    if settings.share is None:
        return own + kept
    replayed = int(min(max(round(settings.share * batch), 1), batch - 1))
    steps = -(-own // (batch - replayed))
    return own + steps * replayed
