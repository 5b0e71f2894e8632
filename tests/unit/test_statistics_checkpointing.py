"""Passes with gradients under gradient checkpointing: the same numbers, really checkpointed."""

from __future__ import annotations

import pytest
import torch
from statistics_case import make_stage, tiny_base

from accrete.pipeline import statistics
from accrete.pipeline.statistics import visit_gradients, visit_inputs, visit_row_gradients

MODELS = ("t5", "llama", "opt")
DROPOUT = 0.5
MICRO = 3  # 21 rows in batches of 8: three micro-batches of each


def stage_of(folder, model, checkpointing, **params):
    base = tiny_base(model, DROPOUT)
    settings = {"base": base, "micro": MICRO, "checkpointing": checkpointing, **params}
    return make_stage(folder / f"{model}{checkpointing}", model, **settings)


def blocks_of(stage):
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in stage.adapted.base.modules() if isinstance(m, GradientCheckpointingLayer)]


def counted(stage):
    """Calls of the checkpointing function, and forwards of a layer of every block, as they come."""
    counts = {"checkpoints": 0, "forwards": 0}

    def count(block):
        original = getattr(block, "_gradient_checkpointing_func", None)

        def call(*arguments, **named):
            counts["checkpoints"] += 1
            return original(*arguments, **named)

        if original is not None:
            block._gradient_checkpointing_func = call

    def forward(*_):
        counts["forwards"] += 1

    for block in blocks_of(stage):
        count(block)
        layers = [la.module for la in stage.adapted.layers.values()]
        first = next(part for part in block.modules() if part in layers)
        first.register_forward_pre_hook(forward)
    return counts


def shown(stage):
    """Layer -> (x, g) of every micro-batch."""
    found = {name: [] for name in stage.adapted.layers}
    visit_gradients(stage, lambda la, x, g: found[la.name].append((x.clone(), g.clone())))
    return found


def row_gradients(stage):
    """Parameter -> the gradient of every row."""
    found = {name: [] for name in stage.engine.parameters}
    visit_row_gradients(stage, lambda name, g: found[name].append(g.clone()))
    return found


def differences(got, expected):
    assert got.keys() == expected.keys()
    worst = 0.0
    for name, values in expected.items():
        assert len(got[name]) == len(values) > 0, name
        for a, b in zip(got[name], values, strict=True):
            parts = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            for mine, other in parts:
                size = float(other.norm())
                worst = max(worst, float((mine - other).norm()) / max(size, 1e-6))
    return worst


@pytest.mark.parametrize("model", MODELS)
def test_layers_see_the_same_inputs_and_gradients(tmp_path, model):
    """And dropout stays off, also what a block does by itself: otherwise nothing would agree."""
    plain, again = (stage_of(tmp_path, model, flag) for flag in (False, True))
    counts = counted(again)
    expected = shown(plain)
    got = shown(again)
    micro_batches = 3 * len(range(0, plain.rows.num_rows, 8))
    assert {len(calls) for calls in got.values()} == {micro_batches}
    assert differences(got, expected) < 1e-5
    blocks = len(blocks_of(again))
    assert counts == {
        "checkpoints": blocks * micro_batches,
        "forwards": 2 * blocks * micro_batches,
    }


@pytest.mark.parametrize("model", MODELS)
def test_rows_have_the_same_gradients(tmp_path, model):
    plain, again = (stage_of(tmp_path, model, flag, method="ewc") for flag in (False, True))
    again.engine.module.train()
    counts = counted(again)
    expected, got = row_gradients(plain), row_gradients(again)
    rows = plain.rows.num_rows
    assert {len(calls) for calls in got.values()} == {rows}
    assert differences(got, expected) < 1e-5
    assert counts["checkpoints"] == len(blocks_of(again)) * rows


def test_a_block_in_training_mode_would_drop_out(tmp_path, monkeypatch):
    """Control: the blocks' own mode, without which they are not checkpointed, reaches dropout."""
    expected = shown(stage_of(tmp_path, "opt", False))
    monkeypatch.setattr(statistics, "_in_evaluation", lambda block, checkpoint: checkpoint)
    assert differences(shown(stage_of(tmp_path, "opt", True)), expected) > 0.1


def test_without_checkpointing_nothing_is_checkpointed(tmp_path):
    stage = stage_of(tmp_path, "llama", False)
    counts = counted(stage)
    shown(stage)
    assert counts == {"checkpoints": 0, "forwards": 9 * len(blocks_of(stage))}


def hooks_of(module):
    return [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in module.modules()]


class StopError(Exception):
    pass


def stop(*_):
    raise StopError


@pytest.mark.parametrize("visit", [lambda *_: None, stop])
@pytest.mark.parametrize("go", [visit_gradients, visit_row_gradients, visit_inputs])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tmp_path, go, visit, training):
    """Also when a pass fails, and where parts of the model are in another mode than the whole."""
    stage = stage_of(tmp_path, "llama", True)
    module = stage.engine.module.train(training)
    odd = blocks_of(stage)[0].mlp
    odd.train(not training)
    modes = {name: part.training for name, part in module.named_modules()}
    hooks = hooks_of(module)
    functions = [block._gradient_checkpointing_func for block in blocks_of(stage)]
    if visit is stop:
        with pytest.raises(StopError):
            go(stage, visit)
    else:
        assert go(stage, visit, max_rows=3) == 3
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert [block._gradient_checkpointing_func for block in blocks_of(stage)] == functions
    assert hooks_of(module) == hooks
    assert all(not p._backward_hooks for p in stage.engine.parameters.values())
    assert all(p.grad is None for p in module.parameters())
    assert torch.is_grad_enabled()
