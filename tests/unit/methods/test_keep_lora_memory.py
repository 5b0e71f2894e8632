"""What KeepLoRA keeps of finished tasks: what it spans, how it is stored, when it fills up."""

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
    features,
    gradients,
    leading,
    make,
    rows_of,
    span,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods.keep_lora import KeepLora, KeepLoraConfig, layer_owners
from accrete.pipeline.stage_runner import StageRunner


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return cached(tmp_path_factory)


# -- the memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_memory_is_grown_from_the_features_of_the_final_model(runs, model):
    run = runs(model)
    for task in range(TASKS):
        seen = features(run, model, task + 1, rows_of(run, task))
        for name, basis in run.after[task].items():
            x, old = seen[name], run.before[task].get(name)
            count = 0 if old is None else old.shape[1]
            inside = np.zeros((32, 32)) if old is None else span(old.T)
            outside = x - x @ inside
            _, values, right = np.linalg.svd(outside, full_matrices=False)
            held = (x**2).sum() - (values**2).sum() + np.concatenate([[0], np.cumsum(values**2)])
            added = int(np.argmax(held >= EPS["eps_f"] * (x**2).sum()))
            assert basis.shape[1] == count + added
            expected = inside + right[:added].T @ right[:added]
            wide = basis.double().numpy()
            np.testing.assert_allclose(wide @ wide.T, expected, atol=1e-4)


@pytest.mark.parametrize("memory", ["features", "gradients"])
@pytest.mark.parametrize("model", MODELS)
def test_memory_grows_only_and_stays_orthonormal(runs, model, memory):
    run = runs(model, settings={**EPS, "memory": memory})
    readers = set(run.method._inputs.values() if memory == "features" else run.method._inputs)
    grown = 0
    for task in range(TASKS):
        assert set(run.after[task]) == readers
        for name, basis in run.after[task].items():
            old = run.before[task].get(name, basis[:, :0])
            assert old.shape[1] <= basis.shape[1] <= 32
            assert torch.equal(basis[:, : old.shape[1]], old)
            gram = basis.double().T @ basis.double()
            assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-5
            grown += basis.shape[1] > old.shape[1] > 0
        share = max(b.shape[1] / 32 for b in run.after[task].values())
        assert run.notes[task]["memory_share"] == pytest.approx(share)
    assert grown > 0


@pytest.mark.parametrize("model", MODELS)
def test_gradient_memory_is_grown_from_gradients(runs, model):
    run = runs(model, settings={**EPS, "memory": "gradients"})
    found = gradients(run, model, 1, rows_of(run, 0))
    for name, basis in run.after[0].items():
        expected = leading(found[name], EPS["eps_f"])
        assert basis.shape[1] == len(expected)
        wide = basis.double().numpy()
        np.testing.assert_allclose(wide @ wide.T, expected.T @ expected, atol=1e-3)


def test_gradients_span_no_more_than_the_inputs(tmp_path):
    """So their memory protects a part of what the features' memory does."""
    run = Watched(
        tmp_path, "llama", settings={**EPS, "eps_f": 1.0, "feature_rows": 1}, tasks=1, rows=3
    )
    row = rows_of(run, 0)[1:2]  # the one in the middle
    for name, gradient in gradients(run, "llama", 1, row).items():
        inside = span(run.after[0][run.key(name)].T)
        assert np.trace(inside) < 31
        assert np.linalg.norm(gradient - gradient @ inside) < 1e-5 * np.linalg.norm(gradient)


# -- no room --------------------------------------------------------------------------------------


def test_rows_without_room_are_zero_and_said(tmp_path):
    run = Watched(tmp_path, "llama", settings={"eps_w": 0.9, "eps_f": 0.97})
    empty = []
    for task in range(TASKS):
        zero = 0
        for name, (a, b) in run.factors[task].items():
            hosted = int(a.any(1).sum())
            free = 32 - round(float(np.trace(span_at(run, task, name))))
            assert hosted == min(RANK, free)
            assert bool(a[:hosted].any(1).all())
            assert not a[hosted:].any()
            assert not b[:, hosted:].any()  # nothing drives them
            zero += RANK - hosted
        empty.append(zero)
        assert run.notes[task]["empty_rows"] == zero
        said = run.warnings_before_training(task)
        assert len(said) == (zero > 0)
        if zero:
            assert f": {zero} of {RANK * len(run.factors[task])} rows of A are zero" in said[0]
            assert "Lower method.eps_w" in said[0]
    assert empty[0] < empty[-1]


def test_a_task_that_can_learn_nothing_is_said_before_it_trains(tmp_path):
    run = Watched(tmp_path, "llama", settings={"eps_w": 0.6, "eps_f": 1.0}, tasks=2)
    assert "nothing can be learned of this task" in run.warnings_before_training(1)[0]
    assert not any(b.any() for _, b in run.factors[1].values())


def test_layers_that_do_not_run_are_not_said_to_lack_room(tmp_path):
    run = Watched(tmp_path, "llama_idle", tasks=1)
    assert any("idle" in name for name in run.factors[0])
    assert not run.warnings_before_training(0)
    assert run.notes[0]["empty_rows"] == 0


def test_a_weight_of_zeros_has_no_direction_to_keep(tmp_path, monkeypatch):
    """Blocks that are put into a finished model start so."""
    base = toys.base_model("llama")
    base.model.layers[1].self_attn.v_proj.weight.zero_()
    monkeypatch.setattr(toys, "base_model", lambda kind: base)
    run = Watched(tmp_path, "llama", tasks=2)
    name = "model.layers.1.self_attn.v_proj"
    assert run.method.principal[name].shape == (32, 0)
    a, _ = run.factors[1][name]
    assert a.any(1).all()
    assert float((a @ run.before[1][run.key(name)]).abs().max()) < 1e-5


def span_at(run, task, name):
    weight = toys.base_model("llama").get_submodule(name).weight.double().numpy()
    memory = run.before[task].get(run.key(name))
    return span(leading(weight, 0.9), *([] if memory is None else [memory.T]))


def test_there_is_room_by_default_settings_of_the_toys(runs):
    for note in runs("llama").notes:
        assert note["empty_rows"] == 0
        assert "warning" not in note


# -- state ----------------------------------------------------------------------------------------


def test_state_is_the_memory_alone(runs):
    run = runs("t5")
    state = run.method.state_dict()
    assert set(state) == {f"basis/features/{name}" for name in run.after[-1]}
    other = KeepLora(KeepLoraConfig(**EPS))
    other.bind(0, 1, torch.device("cpu"))
    other.load_state_dict(state)
    for name, basis in run.after[-1].items():
        assert torch.equal(other.memory[name], basis)
    assert other.state_bytes() == sum(4 * b.numel() for b in run.after[-1].values())
    held = [*run.method.memory.values(), *run.method.principal.values()]
    assert run.method.state_bytes() == sum(4 * b.numel() for b in held) > other.state_bytes()


def test_state_of_another_memory_is_refused(runs):
    other = KeepLora(KeepLoraConfig(memory="gradients"))
    with pytest.raises(ConfigError, match=r"method\.memory: given: gradients"):
        other.load_state_dict(runs("t5").method.state_dict())


@pytest.mark.parametrize("past", ["fold", "branch"])
def test_a_resumed_run_finds_the_same_principal_directions(tmp_path, past):
    """U_w comes from W_0, which later deltas must not have touched, and A from the checkpoint."""
    parts = make(tmp_path, "llama", past=past)
    runner = StageRunner(parts)
    parts.method.on_sequence_start(runner._stage(0))
    runner._learn(0, None)
    runner._learn(1, None)
    again = KeepLora(KeepLoraConfig(**EPS))
    again.bind(0, 1, torch.device("cpu"))
    again.load_state_dict(parts.method.state_dict())
    stage = runner._stage(2)
    stage.restored = True
    fresh = stage.factors()
    again.on_task_start(stage)
    for name, columns in parts.method.principal.items():
        assert torch.equal(again.principal[name], columns)
    for name, (a, b) in stage.factors().items():
        assert torch.equal(a, fresh[name][0])
        assert torch.equal(b, fresh[name][1])
    original = parts.past.original(parts.adapted.layers[name])
    assert torch.equal(original, toys.base_model("llama").get_submodule(name).weight)


def test_work_is_shared_out_evenly():
    """LLaMA-3.2-1B with all linear layers: its wide down-projections come one in a block."""
    inputs, shapes = {}, {}
    for block in range(16):
        for layer, first, shape in (
            ("q", "q", (2048, 2048)),
            ("k", "q", (512, 2048)),
            ("v", "q", (512, 2048)),
            ("o", "o", (2048, 2048)),
            ("gate", "gate", (8192, 2048)),
            ("up", "gate", (8192, 2048)),
            ("down", "down", (2048, 8192)),
        ):
            inputs[f"{block}.{layer}"] = f"{block}.{first}"
            shapes[f"{block}.{layer}"] = shape
    for world in (1, 2, 3, 4):
        owners = layer_owners(inputs, shapes, world)
        assert owners == layer_owners(dict(inputs), shapes, world)
        for layer, name in inputs.items():
            assert owners[layer] == owners[name]
        wide = [owners[f"{block}.down"] for block in range(16)]
        work = [0.0] * world
        for layer, name in inputs.items():
            own = shapes[layer][1] ** 3 if layer == name else 0
            work[owners[layer]] += own + min(shapes[layer]) ** 3
        assert max(map(wide.count, range(world))) == -(-16 // world)
        assert max(work) <= 1.15 * sum(work) / world


def test_the_method_trains_b_alone():
    method = KeepLora(KeepLoraConfig())
    assert [method.trainable(x) for x in "AB"] == [False, True]
