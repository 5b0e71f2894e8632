"""Memory of a method's passes beside real passes, with and without gradient checkpointing."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forecast_case import model_plan, task

from accrete.launch.forecast import trace
from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.launch.forecast.probe import random_batch
from accrete.launch.forecast.run import Forecaster
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import Tracer
from accrete.pipeline.stage import aligned_logits
from accrete.pipeline.statistics import visit_gradients, visit_inputs, visit_row_gradients

BLOCKS, ROWS = 4, 8
PASSES: dict[str, Any] = {
    "ewc_lora": visit_gradients,
    "keep_lora": visit_gradients,
    "ewc": visit_row_gradients,
    "inf_lora": visit_inputs,
}
TARGETS = {"ewc_lora": "qv", "keep_lora": "all_linear", "ewc": "qv", "inf_lora": "all_linear"}


def plan_of(kind: str, method: str, checkpointing: bool) -> ModelPlan:
    return model_plan(
        kind,
        method,
        blocks=BLOCKS,
        targets=TARGETS[method],
        model={"gradient_checkpointing": checkpointing},
        train={"global_batch_size": ROWS, "micro_batch_size": ROWS},
        # The method's own sums are counted with the method.
        method_settings={"memory": "gradients"} if method == "keep_lora" else {},
    )


def measured(plan: ModelPlan, method: str, prompt: int, answer: int) -> int:
    """Most bytes alive in a real pass over one micro-batch, or over one row after the other."""
    adapted = plan.build("cpu")
    parameters = adapted.parameters(plan.method.trainable("A"), plan.method.trainable("B"))
    for part in adapted.base.modules():
        if hasattr(part, "config"):  # the T5's decoder has one of its own, and keeps a cache by it
            part.config.use_cache = False
    batch, row = (random_batch(plan, count, prompt, answer) for count in (ROWS, 1))
    device = torch.device("cpu")
    stage: Any = SimpleNamespace(
        engine=SimpleNamespace(
            module=adapted.module.train(), device=device, rank=0, world=1, parameters=parameters
        ),
        adapted=adapted,
        facts=SimpleNamespace(seq2seq=plan.seq2seq),
        rows=SimpleNamespace(num_rows=2, steps_per_epoch=1),
        global_batch=lambda step: [0, 1],
        micro_batches=lambda rows: [batch],
        collator=SimpleNamespace(train=lambda rows, size=None: row),
        logits=lambda given, through_engine: aligned_logits(adapted.module, given, plan.seq2seq),
    )
    live = LiveBytes()
    for given in (batch, row):
        live.leave_out(trace._given(adapted.module, given))
    gc.collect()
    with live:
        PASSES[method](stage, lambda *_: None)
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", list(PASSES))
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_pass_holds_what_is_said(kind: str, method: str, checkpointing: bool) -> None:
    plan = plan_of(kind, method, checkpointing)
    forecaster = Forecaster(plan, [task()], 1)
    shape = forecaster.largest(task())
    assert shape.rows == ROWS
    real = measured(plan, method, shape.prompt, shape.answer)
    said = forecaster.running(task(), forecaster.cost(0))
    # The pass's own addition to the embeddings; of single rows gradients are let go of sooner.
    assert real <= 1.1 * said
    assert real >= (0.7 if method == "ewc" else 0.9) * said


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["ewc_lora", "keep_lora", "ewc"])
def test_checkpointed_passes_hold_far_less(kind: str, method: str) -> None:
    """Control: a pass that is not checkpointed would not fit what is said of one that is."""
    plain, again = (measured(plan_of(kind, method, flag), method, 10, 4) for flag in (False, True))
    assert again < 0.5 * plain


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_inputs_wait_where_b_alone_is_trained(kind: str) -> None:
    """Control: of a training step alone too little would be said."""
    plan = plan_of(kind, "keep_lora", False)
    forecaster = Forecaster(plan, [task()], 1)
    step = Tracer(plan).trace(forecaster.largest(task())).activations
    assert forecaster.running(task(), forecaster.cost(0)) > 1.05 * step
    one = Forecaster(plan_of(kind, "ewc_lora", False), [task()], 1)
    assert one._passes is one.tracer
    with_a = Tracer(plan_of(kind, "ewc_lora", False)).trace(one.largest(task())).activations
    assert one.running(task(), one.cost(0)) == with_a


def test_the_peak_of_a_run_has_the_passes_in_it() -> None:
    for method in PASSES:
        forecaster = Forecaster(plan_of("llama", method, True), [task()], 1)
        cost = forecaster.cost(0)
        running = forecaster.running(task(), cost)
        assert running > 0
        for rank in forecaster.memory(0, cost):
            assert rank.peak >= rank.passes > running + cost.pass_bytes
    plain = Forecaster(model_plan("llama", "sequential"), [task()], 1)
    assert plain.running(task(), plain.cost(0)) == 0
    assert {rank.passes for rank in plain.memory(0, plain.cost(0))} == {0}
