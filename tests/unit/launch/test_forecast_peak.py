"""Peaks: of long stacks beside whole traces, of decoding, of the whole model at the start."""

from __future__ import annotations

import gc
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from forecast_case import BATCH, model_plan, settings, task
from rich.console import Console

from accrete.launch.forecast import trace
from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.launch.forecast.methods import MethodCost
from accrete.launch.forecast.run import Forecaster
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import Trace, Tracer
from accrete.launch.forecast.view import forecast_view
from accrete.pipeline.config.run import EvalConfig

BLOCKS, WIDE = 12, 2048
GIB = 2**30


def wide_plan(kind: str, method: str, tied: bool = True, **changes: Any) -> ModelPlan:
    """A long stack whose table of embeddings outweighs many of its blocks."""
    changed = settings(kind, BLOCKS)
    changed.vocab_size, changed.tie_word_embeddings = WIDE, tied
    return replace(model_plan(kind, method, **changes), settings=changed)


def whole_trace(plan: ModelPlan, batch: trace.BatchShape = BATCH) -> Trace:
    tracer = Tracer(plan)
    return tracer._run(batch, tracer._depth)


# -- long stacks --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    ("method", "tied", "checkpointing"),
    [
        ("full", True, False),  # two blocks do not show this one's
        ("full", True, True),
        ("full", False, False),
        ("sequential", True, False),
        ("sequential", True, True),
    ],
)
def test_the_peak_is_that_of_the_whole_stack(
    kind: str, method: str, tied: bool, checkpointing: bool
) -> None:
    plan = wide_plan(kind, method, tied, model={"gradient_checkpointing": checkpointing})
    said, whole = Tracer(plan).trace(BATCH), whole_trace(plan)
    assert said.held == pytest.approx(whole.held, rel=1e-9)
    assert said.backward_flops == pytest.approx(whole.backward_flops, rel=1e-9)
    # Never less; more by what is small beside the model.
    room = trace.UNSETTLED * (whole.activations + plan.whole_bytes)
    assert whole.activations <= said.activations + 1 <= whole.activations + room + 2
    assert said.activations >= said.held


def test_two_blocks_hide_the_peak_of_many() -> None:
    """Control: so wrong is what two and three blocks alone would say."""
    plan = wide_plan("llama", "full")
    tracer = Tracer(plan)
    two, three = (tracer._run(BATCH, (blocks,)) for blocks in (2, 3))
    naive = two + (three + two * -1.0) * (BLOCKS - 2)
    whole = whole_trace(plan)
    assert naive.activations < 0.8 * whole.activations
    assert naive.activations < naive.held


def test_settled_stacks_are_not_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    run = Tracer._run

    def counted(tracer: Tracer, shape: Any, blocks: tuple[int, ...]) -> Trace:
        seen.append(blocks)
        return run(tracer, shape, blocks)

    monkeypatch.setattr(Tracer, "_run", counted)
    Tracer(model_plan("llama", blocks=BLOCKS)).trace(BATCH)
    assert seen == [(2,), (3,)]
    seen.clear()
    tracer = Tracer(wide_plan("llama", "full"))
    tracer.trace(BATCH)
    tracer.trace(replace(BATCH, prompt=9))
    assert seen == [(2,), (3,), (BLOCKS,), (BLOCKS,)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_pass_of_many_blocks_holds_no_less_than_waits(kind: str) -> None:
    long = replace(task(), longest_prompt=60, longest_answer=6)
    forecaster = Forecaster(wide_plan(kind, "ewc"), [long], 1)
    row = replace(forecaster.largest(long), rows=1)
    whole = whole_trace(forecaster.plan, row)
    said = forecaster.running(long, forecaster.cost(0))
    room = trace.UNSETTLED * (whole.activations + forecaster.plan.whole_bytes)
    assert max(whole.held, whole.activations) <= said + 1 <= whole.activations + room + 2


# -- decoding -----------------------------------------------------------------------------------


def decoding_peak(plan: ModelPlan, rows: int, prompt: int, new: int) -> int:
    """Most bytes alive while rows are decoded, all to the limit."""
    adapted = plan.build("cpu")
    ids = torch.randint(2, 60, (rows, prompt))
    mask = torch.ones_like(ids)
    mask[: rows // 2, :3] = 0
    live = LiveBytes()
    live.leave_out([*adapted.module.parameters(), *adapted.module.buffers(), ids, mask])
    gc.collect()
    options = {"min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    with torch.no_grad(), live:
        adapted.module.eval().generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, use_cache=True, **options
        )
    return live.peak


@pytest.mark.parametrize(
    ("kind", "blocks", "prompt", "new", "misses"),
    [
        ("t5", 8, 40, 20, False),
        ("llama", 8, 40, 4, False),
        ("llama", 8, 20, 20, False),
        ("llama", 16, 10, 40, True),
    ],
)
def test_decoding_keeps_keys_and_values(
    kind: str, blocks: int, prompt: int, new: int, misses: bool
) -> None:
    rows = 16
    plan = model_plan(kind, blocks=blocks)
    if kind == "t5":
        plan.settings.num_decoder_layers = blocks  # generate() makes caches for as many
    scored = EvalConfig(decode_misses=misses, batch_tokens=rows * (prompt + 3 + new))
    plan = replace(plan, config=replace(plan.config, eval=scored))
    long = {"prompt": prompt, "padded_prompt": prompt, "longest_prompt": prompt}
    one = replace(task(scored=700), **long, decoded=not misses, most_new_tokens=new)
    rank = Forecaster(plan, [one], 1).memory(0, MethodCost())[0]
    said = rank.scoring - rank.weights - rank.moments
    real = decoding_peak(plan, rows, prompt, new)
    assert real <= 1.1 * said
    if not misses:  # where the forward pass over the answers may be the peak
        assert real >= 0.85 * said


# -- the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sequential", "full"])
def test_the_model_is_whole_before_it_is_cut(method: str) -> None:
    plan = wide_plan("llama", method, model={"dtype": "bf16"} if method == "sequential" else {})
    module = plan.build("cpu").module
    whole = sum(p.numel() * p.element_size() for p in module.parameters())
    assert plan.whole_bytes == whole
    for rank in Forecaster(plan, [task()], 4).memory(0, MethodCost()):
        assert rank.start == whole
        assert rank.peak >= whole
    one = Forecaster(plan, [task()], 1).memory(0, MethodCost())
    assert [rank.start for rank in one] == [whole] * 4


def large_forecast(method: str, procs: int, nodes: int = 1) -> Any:
    """Of a model whose parts are small on many ranks, in GiB."""
    changed = settings("llama", 2)
    changed.vocab_size, changed.hidden_size, changed.intermediate_size = 128_000, 4096, 14_336
    changed.num_hidden_layers, changed.tie_word_embeddings = 60, False
    plan = model_plan("llama", method, engine={"zero_stage": 3, "bucket_elements": 1_000_000})
    plan = replace(plan, settings=changed, device="cuda")
    forecaster = Forecaster(plan, [task()], procs * nodes, procs)
    return plan, forecaster.forecast(None)


def text_of(found: Any, fits: float | None = None) -> list[str]:
    printed = io.StringIO()
    Console(file=printed, width=200).print(forecast_view(found.to_json(), fits))
    return printed.getvalue().splitlines()


def line_of(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.strip().startswith(start))


def test_a_model_that_cannot_start_does_not_fit() -> None:
    plan, found = large_forecast("sequential", 8, nodes=2)
    whole = plan.whole_bytes / GIB
    assert 20 < whole < 80
    last = found.peaks[3]
    assert last.peak == last.start == plan.whole_bytes
    most = max(last.step, last.passes, last.scoring) / GIB
    fits = (most + whole) / 2
    assert most + 1 < fits < whole
    lines = text_of(found, fits)
    assert line_of(lines, "fits into").split()[-4:] == ["no"] * 4
    assert line_of(lines, "peak at the start").split()[-1] == f"{whole:.1f}"
    assert found.load_bytes == 8 * plan.whole_bytes, "of a node, whatever the nodes"
    said = line_of(lines, "host memory of a node")
    assert f"at least {8 * whole:.0f} GiB" in said


def test_the_start_is_left_out_where_it_is_not_the_peak() -> None:
    found = Forecaster(model_plan("llama"), [task()], 2).forecast(None)
    lines = text_of(found)
    assert all(peak.start < peak.peak for peak in found.peaks)
    assert not any("at the start" in line for line in lines)


def test_room_is_left_for_the_context_of_a_gpu() -> None:
    _, found = large_forecast("sequential", 1)
    peak = found.peaks[2].peak / GIB
    for fits, answer in ((peak + 0.3, "no"), (peak + 0.9, "yes")):
        assert line_of(text_of(found, fits), "fits into").split()[-2] == answer
