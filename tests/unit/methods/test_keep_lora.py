"""KeepLoRA's frozen A and its guarantee, on whole runs of the toy models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from keep_lora_runs import (
    EPS,
    MODELS,
    RANK,
    TASKS,
    Watched,
    cached,
    gradients,
    make,
    model_after,
    principal,
    protected,
    rows_of,
    span,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.engine import OptimizerSettings
from accrete.pipeline.distributed.plain import PlainEngine
from accrete.pipeline.math.row_space import residual_rows
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import AdaptedModel, initial_factors
from accrete.pipeline.stage import row_losses
from accrete.pipeline.stage_runner import StageRunner

MEMORIES = [{**EPS, "memory": memory} for memory in ("features", "gradients")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return cached(tmp_path_factory)


# -- A --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", range(TASKS))
@pytest.mark.parametrize("settings", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_a_is_the_svd_of_the_residual_gradient(runs, model, settings, task):
    run = runs(model, settings=settings)
    for name, gradient in gradients(run, model, task, rows_of(run, task)).items():
        projector = protected(run, model, task, name)
        _, _, right = np.linalg.svd(gradient - gradient @ projector)
        a, b = run.started[task][name]
        cosines = np.abs((a.double().numpy() * right[:RANK]).sum(1))
        np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
        assert not b.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_rows": 6},
        {"gradient_tokens": "mean"},
        {"eps_w": 0.0},
        {"eps_w": 0.0, "eps_f": 0.0},
    ],
)
def test_options_of_the_gradient(tmp_path, settings):
    run = Watched(tmp_path, "llama", settings={**EPS, **settings}, tasks=2)
    for task in (0, 1):
        rows = rows_of(run, task)
        rows = toys.spread(rows, settings.get("gradient_rows", len(rows)))
        mean = settings.get("gradient_tokens") == "mean"
        for name, gradient in gradients(run, "llama", task, rows, mean).items():
            projector = np.zeros((32, 32))
            if settings.get("eps_w") != 0.0:
                projector = protected(run, "llama", task, name)
            elif settings.get("eps_f") != 0.0 and task:
                projector = span(run.before[task][run.key(name)].T)
            _, _, right = np.linalg.svd(gradient - gradient @ projector)
            a = run.started[task][name][0].double().numpy()
            np.testing.assert_allclose(np.abs((a * right[:RANK]).sum(1)), 1.0, atol=1e-5)
    if settings.get("eps_f") == 0.0:
        assert run.after == [{}, {}]


@pytest.mark.parametrize("settings", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_a_has_orthonormal_rows_outside_m_and_is_never_trained(runs, model, settings):
    run = runs(model, settings=settings)
    for task in range(TASKS):
        for name, (a, _) in run.started[task].items():
            wide = a.double().numpy()
            np.testing.assert_allclose(wide @ wide.T, np.eye(RANK), atol=1e-5)
            assert np.abs(wide @ protected(run, model, task, name)).max() < 1e-5
            assert torch.equal(run.factors[task][name][0], a)
            assert run.factors[task][name][1].any()


# -- the guarantee --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keep_lora", "inc_lora"])
@pytest.mark.parametrize("settings", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_updates_leave_m_alone_after_adamw_with_weight_decay(runs, model, settings, kind):
    """Control: the plain adapter, on the same spaces, does not."""
    run = runs(model, settings=settings)
    other = run if kind == "keep_lora" else runs(model, method=kind, settings={})
    assert other.parts.config.train.optimizer == "adamw"
    assert other.parts.config.train.weight_decay > 0
    for task in range(TASKS):
        for name in run.parts.adapted.layers:
            projector = protected(run, model, task, name)
            delta = other.delta(task, name)
            left = np.linalg.norm(delta @ projector) / np.linalg.norm(delta)
            assert (left < 1e-5) if kind == "keep_lora" else (left > 0.1), (task, name)


@pytest.mark.parametrize("settings", MEMORIES)
@pytest.mark.parametrize("model", MODELS)
def test_outputs_on_protected_inputs_do_not_change(runs, model, settings):
    """What a layer says to directions kept from task 0 is the same two tasks later."""
    run = runs(model, settings=settings)
    _, first = model_after(run, model, 1)
    _, last = model_after(run, model, TASKS)
    for name in first:
        memory = run.after[0][run.key(name)]
        weights = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        for columns in (memory, torch.tensor(principal(model, name).T, dtype=torch.float32)):
            x = columns @ weights[: columns.shape[1]]
            old, new = first[name].weight @ x, last[name].weight @ x
            assert float((new - old).norm() / old.norm()) < 1e-5
        moved = last[name].weight - first[name].weight
        assert float(moved.norm() / first[name].weight.norm()) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_not_changed_when_a_task_starts(tmp_path, model):
    """B is zero, whatever A holds."""
    parts = make(tmp_path, model)
    runner = StageRunner(parts)
    parts.method.on_sequence_start(runner._stage(0))
    runner._learn(0, None)
    stage = runner._stage(1)
    batch = parts.collator.train(stage.rows.all[:4])
    before = stage.logits(batch).detach()
    stage.write_factors(initial_factors(parts.adapted, 3, 1))
    parts.method.on_task_start(stage)
    assert torch.equal(stage.logits(batch).detach(), before)


@pytest.mark.parametrize("model", MODELS)
def test_one_sgd_step_is_projected_gradient_descent(model):
    """s B A = -eta s^2 G A^T A after a step of the engine, in fp64."""
    base = toys.base_model(model).double()
    adapted = AdaptedModel(base, AdapterConfig(rank=RANK, alpha=10.0))
    rows = toys.ToyRows(0, 8, 8)
    batch = toys.Collator(model == "t5", 0, 0 if model == "t5" else None, 1).train(rows.all)
    scale, eta = 2.0, 0.1

    adapted.module.double()
    engine = PlainEngine(
        adapted.module,
        adapted.parameters(a=False),
        OptimizerSettings(optimizer="sgd", weight_decay=0.0),
        accumulation=1,
        device=torch.device("cpu"),
    )

    def loss():
        keep = batch.labels.shape[1]
        logits = engine.forward(**batch.inputs).logits[:, -keep:]
        return row_losses(logits, batch.labels).sum()

    chosen, expected = {}, {}
    weights = {name: layer.weight for name, layer in adapted.layers.items()}
    for name in weights:
        adapted.layers[name].module.lora_B["default"].weight.data.zero_()
        weights[name].requires_grad_(True)
    dense = torch.autograd.grad(loss(), weights.values())
    for (name, weight), gradient in zip(weights.items(), dense, strict=True):
        weight.requires_grad_(False)
        a = chosen[name] = residual_rows(gradient, None, RANK)[0].double()
        expected[name] = -eta * scale**2 * gradient @ a.T @ a
        adapted.layers[name].module.lora_A["default"].weight.data = a
    engine.backward(loss(), last=True)
    engine.step(eta)
    for name, a in chosen.items():
        moved = scale * engine.value(adapted.layers[name].b) @ a
        assert float((moved - expected[name]).norm() / expected[name].norm()) <= 1e-10
