"""The forecast beside real models, sums by hand, and controls that shows what would be wrong."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from forecast_case import BATCH, HEADS, INNER, VOCAB, WIDTH, model_plan, settings, task

from accrete.launch.forecast import shapes, trace
from accrete.launch.forecast.disk import disk
from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.launch.forecast.methods import (
    MethodCost,
)
from accrete.launch.forecast.rows import assume_rows
from accrete.launch.forecast.run import Forecaster
from accrete.launch.forecast.shapes import ModelPlan, with_depth
from accrete.launch.forecast.speed import (
    AssumedSpeed,
    CalibratedSpeed,
    MeasuredPoint,
    Timing,
    find_gpu,
)
from accrete.launch.forecast.trace import BatchShape, Tracer
from accrete.launch.forecast.traffic import step_traffic
from accrete.pipeline.errors import ConfigError, ModelError
from accrete.pipeline.stage import aligned_logits, row_losses

# -- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["sequential", "inf_lora", "full", "gpm"])
@pytest.mark.parametrize("targets", ["qv", "all_linear"])
def test_parameters_are_those_of_a_real_model(kind: str, method: str, targets: str) -> None:
    plan = model_plan(kind, method, targets=targets)
    real = plan.build("cpu")
    trained = [p for p in real.module.parameters() if p.requires_grad]
    assert sorted(plan.trained) == sorted(p.numel() for p in trained)
    every = sum(p.numel() for p in real.module.parameters())
    assert sum(plan.trained) + sum(count for count, _ in plan.frozen) == every
    factors = 0
    if plan.method.trains == "factors":
        factors = sum(p.numel() for p in real.carried().values())
    assert plan.factor_bytes == 4 * factors
    assert plan.base_parameters == every - factors
    assert all(p.device.type == "meta" for p in plan.adapted.module.parameters())


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("google-t5/t5-base", 222_903_552),
        ("google-t5/t5-large", 737_668_096),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
    ],
)
def test_published_sizes(path: str, parameters: int) -> None:
    plan = replace(model_plan("t5"), settings=shapes.read_settings(path))
    assert plan.base_parameters == parameters


def test_a_model_without_a_configuration_at_hand(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match=r"a folder that holds one"):
        shapes.read_settings(str(tmp_path))


# -- live bytes -------------------------------------------------------------------------------


def test_live_bytes_counts_what_lives() -> None:
    old = torch.zeros(1000)
    live = LiveBytes()
    live.leave_out([old])
    with live:
        a = torch.zeros(256)  # 1024 bytes
        view = a.view(16, 16)
        old.view(10, 100)
        torch.zeros(4096, device="meta")
        assert (live.now, live.peak) == (1024, 1024)
        b = view + 1
        assert live.now == 2048
        del a, b
        assert live.now == 1024, "the view keeps its storage"
        del view
        assert (live.now, live.peak) == (0, 2048)
        live.reset_peak()
        assert live.peak == 0


# -- the trace --------------------------------------------------------------------------------


def measured(plan: ModelPlan, batch: BatchShape) -> tuple[int, int]:
    """Bytes at the end of the forward and at the peak, of a real model on a ragged batch."""
    from accrete.launch.forecast.probe import random_batch

    adapted = plan.build("cpu")
    adapted.module.train()
    for parameter in adapted.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(trace._drop)
    rows = random_batch(plan, batch.rows, batch.prompt, batch.answer)
    live = LiveBytes()
    live.leave_out(trace._given(adapted.module, rows))
    gc.collect()
    with live:
        loss = row_losses(aligned_logits(adapted.module, rows, plan.seq2seq), rows.labels).sum()
        held = live.now
        loss.backward()
    return held, live.peak


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["sequential", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_batch(kind: str, method: str, checkpointing: bool) -> None:
    plan = model_plan(kind, method, model={"gradient_checkpointing": checkpointing})
    held, peak = measured(plan, BATCH)
    said = Tracer(plan).trace(BATCH)
    # Small masks and lists of positions apart.
    assert said.held == pytest.approx(held, rel=0.02)
    assert said.activations == pytest.approx(peak, rel=0.05)


def test_checkpointing_holds_less_and_computes_more() -> None:
    plain, again = (
        Tracer(model_plan("llama", blocks=6, model={"gradient_checkpointing": flag})).trace(BATCH)
        for flag in (False, True)
    )
    assert again.held < 0.5 * plain.held
    # The blocks run again; the head does not.
    assert 0.8 < (again.backward_flops - plain.backward_flops) / plain.forward_flops < 1.0


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("method", ["sequential", "full"])
def test_a_long_stack_is_continued_exactly(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = model_plan(kind, method, blocks=6)
    short = Tracer(plan).trace(BATCH)
    monkeypatch.setattr(trace, "SHORT", 100)
    whole = Tracer(plan).trace(BATCH)
    for name, value in whole.__dict__.items():
        # The peak of a toy may come at another moment with fewer blocks.
        exact = 1e-2 if name == "activations" else 1e-9
        assert getattr(short, name) == pytest.approx(value, rel=exact), name


def test_arithmetic_by_hand() -> None:
    plan = model_plan("llama", "full")
    said = Tracer(plan).trace(BATCH)
    tokens = BATCH.rows * (BATCH.prompt + BATCH.answer - 1)
    key = WIDTH // HEADS * 2
    block = 2 * WIDTH * WIDTH + 2 * WIDTH * key + 3 * WIDTH * INNER
    width = BATCH.prompt + BATCH.answer - 1
    attention = 2 * 2 * BATCH.rows * width * width * WIDTH
    head = 2 * BATCH.rows * BATCH.answer * WIDTH * VOCAB
    forward = 2 * (2 * tokens * block + attention) + head
    # The rotary angles are a tiny product of their own.
    assert said.forward_flops == pytest.approx(forward, rel=0.01)
    # Gradients of inputs and of weights: twice the forward (attention: 2.5 times).
    assert said.backward_flops == pytest.approx(2 * forward + attention, rel=0.03)
    frozen = Tracer(model_plan("llama")).trace(BATCH)
    assert frozen.backward_flops < 0.7 * said.backward_flops


def test_layers_that_read_one_tensor_share_an_input() -> None:
    names = Tracer(model_plan("llama", targets="all_linear")).distinct_inputs()
    by_input: dict[str, set[str]] = {}
    for layer, first in names.items():
        by_input.setdefault(first, set()).add(layer.rsplit(".", 1)[-1])
    assert sorted(map(sorted, by_input.values())) == sorted(
        2 * [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]]
    )
    # All cross-attention values of a T5 read the encoder's output.
    crossed = Tracer(model_plan("t5")).distinct_inputs()
    assert len({first for name, first in crossed.items() if "EncDecAttention.v" in name}) == 1


# -- traffic, disk, seconds -------------------------------------------------------------------


def test_traffic_by_hand() -> None:
    plan = model_plan("llama")
    factors = 4 * sum(plan.trained)
    assert step_traffic(plan, 0, 2, 1).wire(2) == factors
    assert step_traffic(plan, 2, 2, 1).wire(2) == 1.5 * factors
    assert step_traffic(plan, 2, 4, 1).wire(4) == pytest.approx((1.5 + 0.75) * factors)
    assert step_traffic(plan, 2, 1, 1).wire(1) == 0
    # Every micro-batch is reduced at ZeRO 2, the last one alone at ZeRO 1.
    assert step_traffic(plan, 2, 2, 3).reduced == 3 * step_traffic(plan, 1, 2, 3).reduced


def test_disk_by_hand() -> None:
    plan = model_plan("llama")
    costs = [MethodCost(saved_bytes=1000.0), MethodCost(saved_bytes=1000.0)]
    factors = plan.factor_bytes
    found = disk(plan, costs, scored_rows=10, prepared_rows=5.0)
    assert found.adapters == 2 * factors
    assert found.checkpoints == 2 * (factors + 1000)
    assert found.step_checkpoints == 3 * 3 * factors
    weights = model_plan("llama", "full")
    assert disk(weights, costs, 10, 5.0).adapters == 0
    assert disk(weights, costs, 10, 5.0).checkpoints == 2 * (4 * weights.base_parameters + 1000)


def test_stages_steps_and_seconds() -> None:
    plan = model_plan("llama", "lwf", train={"global_batch_size": 8, "micro_batch_size": 2})
    tasks = [task("a"), task("b", train=40), task("c")]
    forecaster = Forecaster(plan, tasks, 2)
    assert (forecaster.accumulation, forecaster.rows) == (2, 2)
    speed = AssumedSpeed("a test", 1e9)
    found = forecaster.forecast(speed)
    assert [stage.steps for stage in found.stages] == [3, 5, 3]
    assert [stage.scored_rows for stage in found.stages] == [7, 14, 21]
    one = forecaster.tracer.trace(forecaster.typical(tasks[0]))
    both = 2 * (one.forward_flops + one.backward_flops) / 1e9
    first, second, third = found.stages
    assert first.step_seconds == pytest.approx(both)
    # The old model's forward, from the second task on; its branch adds a little.
    assert second.step_seconds == pytest.approx(both + 2 * one.forward_flops / 1e9, rel=0.01)
    assert third.scoring_seconds == pytest.approx(3 * first.scoring_seconds)
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))
    content = found.to_json(price=2.0)
    json.dumps(content)
    assert content["price"] == pytest.approx(found.seconds / 3600 * 2 * 2.0)
    unknown = forecaster.forecast(None)
    assert unknown.seconds is None
    assert "price" not in unknown.to_json(price=2.0)


def test_calibrated_seconds_lie_between_what_was_measured() -> None:
    small, large = Timing(0.1, 0.3, 0.4, 0.01), Timing(0.3, 0.9, 1.0, 0.01)
    speed = CalibratedSpeed("x", (MeasuredPoint(100.0, small), MeasuredPoint(300.0, large)))

    def at(flops: float) -> Timing:
        return speed.timing(trace.Trace(flops / 2, flops / 2, 0, 0, 0, 0, 0), 0.0)

    assert at(100.0) == small
    assert at(200.0).micro == pytest.approx(0.6)
    assert at(400.0).micro == pytest.approx(1.2)
    assert at(10.0) == small, "kernels take their time to start"
    assert at(300.0).step(accumulation=3) == pytest.approx(2 * 0.9 + 1.0 + 0.01)
    alone = CalibratedSpeed("x", (MeasuredPoint(100.0, small),))
    assert alone.timing(trace.Trace(100, 100, 0, 0, 0, 0, 0), 0.0).micro == pytest.approx(0.6)


def test_a_kernel_takes_time_to_start() -> None:
    tiny = trace.Trace(10.0, 20.0, 0, 0, 0, 100.0, 200.0)
    gpu = AssumedSpeed("x", 1e12, kernel_seconds=1e-5)
    assert gpu.timing(tiny, 0.0).micro == pytest.approx(300 * 1e-5)
    cpu = AssumedSpeed("x", 1e3, kernel_seconds=1e-5, overlaps=False)
    assert cpu.timing(tiny, 0.0).micro == pytest.approx(30e-3 + 3e-3)
    wired = AssumedSpeed("x", 1e12, link=1e6)
    assert wired.timing(tiny, 5e5).last == pytest.approx(0.5)


def test_unknown_gpus_are_named() -> None:
    assert find_gpu("H100").bf16 == 989e12
    with pytest.raises(ConfigError, match=r"Known: .*a100-80"):
        find_gpu("tpu")


def test_assumed_rows_respect_the_recipe() -> None:
    config = model_plan("t5").config
    config = replace(config, data=replace(config.data, max_train_examples=30))
    rows = assume_rows(config, train=100, scored=50, answer=6)
    assert [(r.name, r.train, r.scored, r.longest_prompt) for r in rows] == [
        (name, 30, 50, 512) for name in ("a", "b", "c")
    ]


def test_fewer_blocks_of_every_stack() -> None:
    changed = with_depth(settings("t5"), (1, 2))
    assert (changed.num_layers, changed.num_decoder_layers) == (1, 2)
    original = settings("llama", 4)
    assert with_depth(original, (2,)).num_hidden_layers == 2
    assert original.num_hidden_layers == 4
