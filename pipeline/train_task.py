"""The only training loop: one stage, from step `start` to its end."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from accrete.pipeline.distributed.comm import sum_over_ranks
from accrete.pipeline.errors import MethodError
from accrete.pipeline.interruption import StopSignal
from accrete.pipeline.records import Event, Recorder
from accrete.pipeline.stage import Stage, row_losses

if TYPE_CHECKING:
    from accrete.pipeline.config.run import TrainConfig
    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.methods.base import Method

MAX_STEP_SUMS = 6
"""Entries of `Method.step_sums` that a step's one vector has room for."""
TERMS = "loss_with_terms"
"""Among a step's sums: the loss with what the method adds to it, for a check alone."""


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) of `steps`: linear warm-up, then the schedule.

    `linear` and `cosine` fall from the peak to zero over the steps after the warm-up.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return peak * (1 - progress)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak


def seed_step(seed: int, stage: int, step: int, rank: int) -> None:
    """Make dropout a function of the position, so that a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def train_task(
    stage: Stage,
    method: Method,
    recorder: Recorder,
    *,
    start: int = 0,
    after_step: Callable[[int, bool], None] | None = None,
    stop: StopSignal | None = None,
) -> None:
    """Train one stage.

    Args:
        stage: The stage; `stage.engine` is ready and holds the factors to start from.
        method: Its hooks run around every step.
        recorder: Gets one `step` event per optimizer step.
        start: Steps already made.
        after_step: Called with the number of steps made, for checkpoints, and whether a rank was
            asked to stop before this step; all ranks get the same answer.
        stop: What this rank was asked.

    Raises:
        MethodError: The loss, with or without the method's terms, or the gradient is no longer
            finite, or the method gives more sums than a step has room for; raised on every rank
            before the weights move.

    Collective: yes.
    """
    config = stage.config.train
    stage.engine.module.train()
    for step in range(start, stage.steps):
        stage.step = step
        began = time.perf_counter()
        seed_step(stage.config.seed, stage.index, step, stage.engine.rank)
        rate = learning_rate(config, step, stage.steps)
        rows = stage.global_batch(step)
        label_tokens = sum(len(row.answer) for row in rows)
        method.before_step(stage)
        asked = stop is not None and stop.received is not None
        sums, stopping = _backward(stage, method, rows, label_tokens, asked)
        _require_finite(sums["loss"], stage, step)
        _require_finite(sums.pop(TERMS), stage, step, what="loss with the method's terms")
        method.after_backward(stage)
        norm = stage.engine.step(rate)
        _require_finite(norm, stage, step, what="norm of the gradient")
        method.after_step(stage)
        recorder.emit(
            Event.STEP,
            stage=stage.index,
            task=stage.name,
            step=step + 1,
            loss=sums.pop("loss"),
            lr=rate,
            tokens=label_tokens + sum(len(row.prompt) for row in rows),
            label_tokens=label_tokens,
            rows=len(rows),
            seconds=time.perf_counter() - began,
            grad_norm=norm,
            **_with_share(sums),
        )
        if after_step is not None:
            after_step(step + 1, stopping)


def _backward(
    stage: Stage, method: Method, rows: list[EncodedRow], label_tokens: int, asked: bool = False
) -> tuple[dict[str, float], bool]:
    """Forward and backward of all micro-batches; the step's sums over ranks, by name.

    With them goes whether any rank was asked to stop: no collective of its own.

    The task loss is the sum over label tokens divided by the step's global count. The engine
    divides by the accumulation count and averages over ranks, hence the factor.
    """
    engine = stage.engine
    factor = engine.world * engine.accumulation / max(1, label_tokens)
    # One vector of fixed length for every method: logging costs the same collective for all.
    totals = torch.zeros(3 + MAX_STEP_SUMS, dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(stage.micro_batches(rows), start=1):
        last = number == engine.accumulation
        logits = stage.logits(batch)
        task_loss = row_losses(logits, batch.labels).sum()
        totals[0] += task_loss.detach()
        loss = task_loss * factor
        for term in method.loss_terms(stage, batch, logits).values():
            loss = loss + term
        totals[1] += loss.detach()
        method.before_backward(stage, last)
        engine.backward(loss, last)
    sums = method.step_sums()
    if len(sums) > MAX_STEP_SUMS:
        raise MethodError(
            f"method {method.config.kind}: step_sums gives {len(sums)} sums ({', '.join(sums)}); "
            f"allowed: at most {MAX_STEP_SUMS}. Leave some out, or write them down once a task "
            "with stage.notes."
        )
    for place, value in enumerate(sums.values(), start=2):
        totals[place] = value
    totals[-1] = asked
    sum_over_ranks(totals, engine.world)
    loss_sum, with_terms, *values, stopping = totals.tolist()
    named = {TERMS: with_terms, **dict(zip(sums, values, strict=False))}
    return {"loss": loss_sum / max(1, label_tokens), **named}, stopping > 0


def _with_share(sums: dict[str, float]) -> dict[str, float]:
    """Replace the two norms by the penalty's share of the gradient.

    The norms are sums over ranks of each rank's own contribution: with one rank the share is exact,
    with more it compares what goes into the reduction, which needs no further traffic.
    """
    penalty, task = sums.pop("penalty_norm", None), sums.pop("task_norm", None)
    if penalty is not None and task is not None:
        sums["penalty_share"] = penalty / (penalty + task) if penalty else 0.0
    return sums


def _require_finite(value: float, stage: Stage, step: int, what: str = "loss") -> None:
    if not math.isfinite(value):
        again = (
            f"in a branch from the last finished stage (`accrete branch RUN --from-stage "
            f"{stage.index - 1} train.learning_rate=...`)"
            if stage.index
            else "in a new run"
        )
        raise MethodError(
            f"The {what} of task {stage.name} (stage {stage.index}) is {value} at step {step + 1}; "
            "the weights were not changed. Lower train.learning_rate (or the method's weight), or "
            f"set train.max_grad_norm=1.0, {again}; `accrete resume` would come to the same again."
        )
