"""SR2-LoRA: cached spectra, batches and ranks, what it leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))


from sr2_case import MODELS, SCALE, move, second_stage, term_of, trained

from accrete.pipeline.errors import ConfigError, MethodError
from accrete.pipeline.methods import sr2_lora
from accrete.pipeline.methods.previous import previous_model
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.models.lora import ADAPTER
from accrete.pipeline.records import Recorder
from accrete.pipeline.train_task import train_task


@pytest.mark.parametrize("past", ["fold", "branch"])
@pytest.mark.parametrize("kind", MODELS)
def test_cached_equals_recomputed(kind, past, tmp_path):
    """In every step of two epochs whose orders differ, with live factors that have moved."""
    method, stage = second_stage(tmp_path, kind, shuffled=True, micro=3, past=past)
    method.on_task_start(stage)
    move(stage)
    first = [row.index for row in stage.global_batch(0)]
    assert first != [row.index for row in stage.global_batch(3)]
    for step in range(6):
        rows = stage.global_batch(step)
        place = 0
        for batch in stage.micro_batches(rows):
            mine = rows[place : place + batch.real_rows]
            place += batch.real_rows
            again = method._again(stage, batch)
            torch.testing.assert_close(method.cache.of(mine), again, rtol=1e-5, atol=1e-5)
    # Control: the live model has other spectra.
    rows = stage.global_batch(0)
    batch = stage.collator.train(rows)
    stage.logits(batch)
    assert float((method._spectra(batch) - method.cache.of(rows)).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_whole_runs_with_and_without_a_cache(kind, tmp_path):
    losses = []
    for cache in ("always", "never"):
        _, events, _ = trained(tmp_path / cache, kind=kind, settings={"mu": 20.0, "cache": cache})
        steps = [event for event in events if event["event"] == "step"]
        losses.append([step[key] for step in steps for key in ("loss", "penalty") if key in step])
        noted = [event for event in events if event["event"] == "consolidated"]
        assert ["cache_bytes" in event for event in noted] == [False, cache == "always"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-9)


def forwards(stage, work):
    """Forwards of the model during `work`."""
    calls = []
    handle = stage.adapted.base.register_forward_hook(lambda *_: calls.append(1))
    work()
    handle.remove()
    return len(calls)


def test_one_pass_per_task_and_one_forward_per_step(tmp_path):
    method, stage = second_stage(tmp_path, shuffled=True)
    assert forwards(stage, lambda: method.on_task_start(stage)) == 3
    assert forwards(stage, lambda: term_of(method, stage)) == 1
    method, stage = second_stage(tmp_path / "never", settings={"cache": "never"})
    assert forwards(stage, lambda: method.on_task_start(stage)) == 0
    assert forwards(stage, lambda: term_of(method, stage)) == 2


def test_a_short_task_caches_only_what_it_sees(tmp_path):
    method, stage = second_stage(tmp_path, shuffled=True, train={"max_steps": 2})
    assert forwards(stage, lambda: method.on_task_start(stage)) == 2
    # 16 rows of 2 blocks in fp32, and two whole numbers of 8 bytes to find each row.
    assert stage.notes["cache_bytes"] == method.cache.bytes == 16 * (2 * 4 + 16)
    move(stage)
    for step in range(2):
        batch = next(iter(stage.micro_batches(stage.global_batch(step))))
        again = method._again(stage, batch)
        torch.testing.assert_close(
            method.cache.of(stage.global_batch(step)), again, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("limit", "cached"), [(21 * 2 * 4, True), (21 * 2 * 4 - 1, False)])
def test_auto_gives_up_where_spectra_are_too_large(limit, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(sr2_lora, "CACHE_BYTES", limit)
    for setting, expected in (("auto", cached), ("always", True), ("never", False)):
        method, stage = second_stage(tmp_path / setting, settings={"cache": setting})
        method.on_task_start(stage)
        assert (method.cache is not None) == expected


def test_dropout_does_not_touch_the_old_spectra(tmp_path):
    """The previous model is looked at in evaluation mode: one constant per row either way."""
    method, stage = second_stage(tmp_path, "t5", settings={"cache": "always"})
    method.on_task_start(stage)
    exact = method.cache.of(stage.rows.all)
    for module in stage.engine.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    stage.engine.module.train()
    method.on_task_start(stage)
    assert torch.equal(method.cache.of(stage.rows.all), exact)
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    rows = stage.global_batch(0)
    torch.testing.assert_close(method._again(stage, batch), exact[: len(rows)])
    assert all(module.training for module in stage.engine.module.modules())
    # Control: in training the live spectra do vary.
    stage.logits(batch)
    assert float((method._spectra(batch) - exact[: len(rows)]).detach().abs().max()) > 1e-3


def test_the_adapter_is_back_after_a_second_forward(tmp_path):
    method, stage = second_stage(tmp_path, settings={"cache": "never"})
    method.on_task_start(stage)
    move(stage)
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    before = stage.logits(batch)
    method._again(stage, batch)
    assert torch.equal(stage.logits(batch), before)
    with pytest.raises(RuntimeError, match="lost"), previous_model(stage):
        raise RuntimeError("lost")
    scales = {layer.module.scaling[ADAPTER] for layer in stage.adapted.layers.values()}
    assert scales == {SCALE}


# -- weights of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["always", "never"])
@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_do_not_matter(kind, cache, tmp_path):
    """Also in the last step, of 5 rows, where some micro-batches hold padding rows alone."""
    results = {}
    for micro in (8, 3, 2, 1):
        method, stage = second_stage(
            tmp_path / str(micro), kind, micro=micro, settings={"cache": cache}
        )
        method.on_task_start(stage)
        move(stage)
        results[micro] = [term_of(method, stage, step) for step in (0, 2)]
        assert len(stage.global_batch(2)) == 5
    for micro in (3, 2, 1):
        for (value, grad), (expected, slope) in zip(results[micro], results[8], strict=True):
            # Both start from a first task trained with other micro-batches.
            assert value == pytest.approx(expected, rel=1e-4)
            assert float((grad - slope).norm() / slope.norm()) < 1e-4


def test_ranks_share_a_step(tmp_path):
    """The mean over three ranks of what each adds is what one process adds."""
    method, stage = second_stage(tmp_path)
    method.on_task_start(stage)
    move(stage)
    for step in (0, 2):
        expected, slope = term_of(method, stage, step)
        parts = []
        for rank in range(3):
            stage.engine.rank, stage.engine.world = rank, 3
            parts.append(term_of(method, stage, step))
            sums = method.step_sums()["penalty"]
            assert float(sums) == pytest.approx(parts[-1][0] / 3, rel=1e-5)
        stage.engine.rank, stage.engine.world = 0, 1
        assert sum(p[0] for p in parts) / 3 == pytest.approx(expected, rel=1e-5)
        mean = torch.stack([p[1] for p in parts]).mean(0)
        assert float((mean - slope).norm() / slope.norm()) < 1e-5


def test_event_says_what_was_added(tmp_path):
    _, events, _ = trained(tmp_path, micro=3, settings={"mu": 20.0})
    steps = [event for event in events if event["event"] == "step" and event["stage"] == 1]
    assert [step["penalty"] > 1e-5 for step in steps] == [False, True, True]
    assert not any("penalty" in e for e in events if e["event"] == "step" and e["stage"] == 0)


# -- edges ----------------------------------------------------------------------------------------


def test_nothing_is_carried_or_left_behind(tmp_path):
    method, stage = second_stage(tmp_path)

    def hooks():
        return sum(len(module._forward_hooks) for module in stage.adapted.base.modules())

    before = hooks()
    method.on_task_start(stage)
    method.on_task_start(stage)  # as on resume
    assert hooks() == before + 2
    first = method.cache.of(stage.rows.all)
    method.on_task_start(stage)
    assert torch.equal(method.cache.of(stage.rows.all), first)
    method.on_task_end(stage)
    assert hooks() == before
    assert method.cache is None
    assert method.state_dict() == {}
    assert method.state_bytes() == 0


def test_a_loss_that_is_not_finite_is_reported_as_such(tmp_path):
    """Not as a decomposition that failed, and with the weights as they were."""
    method, stage = second_stage(tmp_path)
    method.on_task_start(stage)
    name = next(iter(stage.adapted.layers.values())).b
    stage.engine.parameters[name].data.fill_(float("nan"))
    with pytest.raises(MethodError, match="The loss of task two"):
        train_task(stage, method, Recorder(None))


def test_faithful_has_no_weight():
    with pytest.raises(ConfigError, match=r"method.mu=0.5 with method.faithful=true"):
        sr2_lora.Sr2Lora(sr2_lora.Sr2LoraConfig(mu=0.5, faithful=True))


def test_it_has_a_name():
    assert method_class("sr2_lora") is sr2_lora.Sr2Lora
