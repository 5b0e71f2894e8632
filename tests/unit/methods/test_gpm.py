"""GPM: what earlier inputs see stays, whatever the optimizer does, and nothing else stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline import checkpoint
from accrete.pipeline.checkpoint import Position
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.distributed.engine import OptimizerSettings
from accrete.pipeline.distributed.plain import PlainEngine
from accrete.pipeline.errors import ModelError
from accrete.pipeline.methods import gpm
from accrete.pipeline.methods.gpm import Gpm, GpmConfig, hold
from accrete.pipeline.models.full import FullLayer
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
PLAIN = {"zero": None, "micro": 8, "method": "gpm"}


def orthonormal(d, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, m, generator=g, dtype=torch.float64))[0]


def test_hold_is_the_projected_update():
    """Against the update projected from a snapshot, in NumPy."""
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 6, 9, generator=g, dtype=torch.float64)
    basis = orthonormal(9, 4)
    m = basis.numpy()
    expected = old.numpy() + (new.numpy() - old.numpy()) @ (np.eye(9) - m @ m.T)
    np.testing.assert_allclose(hold(new, basis, old @ basis).numpy(), expected, atol=1e-13)


# -- linear regression ---------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(12, 5, bias=False, dtype=torch.float64)


def regress(monkeypatch, optimizer, decay, **settings):
    """Two tasks with inputs of the first in a 4-dimensional space; losses of the first one."""
    module = Regression()
    layer = FullLayer("linear", module.linear, 1.0, "linear.weight")
    engine = PlainEngine(
        module,
        {"linear.weight": module.linear.weight},
        OptimizerSettings(optimizer=optimizer, weight_decay=decay),
        accumulation=1,
        device=CPU,
    )
    stage = SimpleNamespace(engine=engine, adapted=SimpleNamespace(layers={"linear": layer}))
    monkeypatch.setattr(gpm, "input_names", lambda stage: {"linear": "linear"})
    method = Gpm(GpmConfig(**settings))
    g = torch.Generator().manual_seed(1)
    basis = orthonormal(12, 4)
    first = torch.randn(30, 4, generator=g, dtype=torch.float64) @ basis.T
    second, wanted_first, wanted_second = (
        torch.randn(30, d, generator=g, dtype=torch.float64) for d in (12, 5, 5)
    )

    def loss(x, y):
        return (module.linear(x) - y).square().mean()

    def value(x, y):
        return float(loss(x, y).detach())

    def learn(x, y):
        method.on_task_start(stage)
        for _ in range(60):
            method.before_step(stage)
            engine.backward(loss(x, y), True)
            engine.step(0.05)
            method.after_step(stage)
        method._forget_task()

    learn(first, wanted_first)
    begun, before = value(second, wanted_second), value(first, wanted_first)
    old = module.linear.weight.detach().clone()
    method.memory["linear"] = basis
    learn(second, wanted_second)
    moved = module.linear.weight.detach() - old
    assert value(second, wanted_second) < 0.8 * begun  # it did learn
    leak = float((moved @ basis).norm() / moved.norm())
    return abs(value(first, wanted_first) - before), leak


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 0.0), ("adamw", 0.1), ("sgd", 0.1)])
def test_the_first_regression_keeps_its_loss(monkeypatch, optimizer, decay):
    change, leak = regress(monkeypatch, optimizer, decay)
    assert change < 1e-10
    assert leak < 1e-12


def test_projecting_before_adam_leaks(monkeypatch):
    """Control, and what the option `gradient` is right for: plain SGD."""
    change, leak = regress(monkeypatch, "adamw", 0.0, project="gradient")
    assert leak > 0.05
    assert change > 1e-3
    change, leak = regress(monkeypatch, "sgd", 0.0, project="gradient")
    assert change < 1e-10
    assert leak < 1e-12
    assert regress(monkeypatch, "sgd", 0.1, project="gradient")[1] > 1e-3


# -- whole networks ------------------------------------------------------------------------------


def learned(folder, model, rows, tasks=2, steps=6, before=None, **settings):
    """Runs stages one after another; yields (parts, stage) after each."""
    parts = toys.make_parts(
        ALONE,
        folder,
        model=model,
        rows=rows,
        tasks=tasks,
        settings=settings,
        # Adam's own eps: its steps are then far from the gradients' directions, and far above the
        # last bit of the weights.
        train={"max_steps": steps, "weight_decay": 0.1, "eps": 1e-8},
        **PLAIN,
    )
    runner = StageRunner(parts)
    for index in range(tasks):
        if before is not None and index:
            before(parts)
        runner._learn(index, None)
        yield parts, runner._stage(index)
    parts.recorder.close()


def answers(parts, rows):
    batch = parts.collator.train(rows, len(rows))
    parts.engine.module.eval()
    with torch.no_grad():
        stage = StageRunner(parts)._stage(0)
        return stage.logits(batch)[batch.labels != -100]


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_the_network_answers_old_rows_as_before(tmp_path, model):
    """Three short rows: their inputs span less than the 32 dimensions of every layer."""
    changes = {}
    for name, more in {"frozen": {}, "trained": {"others": "trained"}}.items():
        runs = learned(tmp_path / name, model, 2, threshold=1.0, **more)
        parts, stage = next(runs)
        rows = stage.rows.all
        before = answers(parts, rows)
        weights = {n: p.detach().clone() for n, p in parts.engine.parameters.items()}
        other = toys.ToyRows(1, 2, 8).all
        other_before = answers(parts, other)
        next(runs)
        assert any(not torch.equal(weights[n], p) for n, p in parts.engine.parameters.items())
        assert float((answers(parts, other) - other_before).abs().max()) > 1e-2
        changes[name] = float((answers(parts, rows) - before).abs().max() / before.abs().max())
        runs.close()
    assert changes["frozen"] < 1e-5
    assert changes["trained"] > 1e-3  # control: drifting embeddings and norms break it


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_updates_are_orthogonal_to_the_memory_after_adam_and_decay(tmp_path, model):
    runs = learned(tmp_path, model, 21, tasks=3, threshold=0.8)
    parts, _ = next(runs)
    method = parts.method
    for _ in range(2):
        memory = {name: basis.clone() for name, basis in method.memory.items()}
        before = {n: p.detach().clone() for n, p in parts.engine.parameters.items()}
        next(runs)
        for layer in parts.adapted.layers.values():
            basis = memory[method._inputs[layer.name]]
            moved = layer.weight.detach() - before[layer.parameter]
            assert float(moved.norm()) > 1e-3
            assert float((moved @ basis).norm()) < 1e-5 * float(moved.norm())
        for name, basis in method.memory.items():
            assert torch.equal(basis[:, : memory[name].shape[1]], memory[name])
            assert basis.shape[1] <= basis.shape[0]
            unit = basis.T @ basis
            torch.testing.assert_close(unit, torch.eye(len(unit)), rtol=0, atol=1e-5)
    runs.close()


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_the_memory_holds_the_threshold_of_every_layers_inputs(tmp_path, model):
    """Against covariances of each layer's own inputs, row by row and without any padding."""
    share = 0.8
    runs = learned(tmp_path, model, 7, threshold=share)
    parts, stage = next(runs)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in parts.adapted.layers}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0].detach()[0])
        )
        for name, layer in parts.adapted.layers.items()
    ]
    with torch.no_grad():
        for row in stage.rows.all:
            stage.logits(parts.collator.train([row]))
    for handle in handles:
        handle.remove()
    for name, layer in parts.adapted.layers.items():
        x = torch.cat(seen[name]).double().numpy()
        basis = parts.method.memory[parts.method._inputs[name]].double().numpy()
        energy = np.linalg.svd(x, compute_uv=False) ** 2
        needed = int((np.cumsum(energy) / energy.sum() < share - 1e-9).sum()) + 1
        assert basis.shape[1] == needed
        assert ((x @ basis) ** 2).sum() / energy.sum() >= share - 1e-6
        # The bound on what an update may change: it sees only what the memory leaves out.
        g = np.random.default_rng(0).normal(size=(layer.module.out_features, x.shape[1]))
        update = g - g @ basis @ basis.T
        changed = ((x @ update.T) ** 2).sum()
        assert changed <= np.linalg.norm(update, 2) ** 2 * (1 - share) * energy.sum() * (1 + 1e-9)
    # Layers that read one tensor share one memory.
    assert len(parts.method.memory) < len(parts.adapted.layers)
    runs.close()


def test_everything_but_the_linear_layers_stays_as_it_came(tmp_path):
    runs = learned(tmp_path, "llama", 21, threshold=0.7)
    base = dict(toys.base_model("llama").named_parameters())
    parts, _ = next(runs)
    next(runs)
    trained = {layer.parameter for layer in parts.adapted.layers.values()}
    for name, value in parts.adapted.base.named_parameters():
        assert torch.equal(value, base[name]) == (name not in trained)
    runs.close()
    state = checkpoint.load(parts.run.path, Position(stage=1), "state")
    assert set(state) == {f"factor/{name}" for name in base}


def test_without_its_memory_it_would_be_another_run(tmp_path):
    """Control: the mechanism changes the second task, and only that."""
    result = []
    for number, before in enumerate((None, lambda parts: parts.method.memory.clear())):
        runs = learned(tmp_path / str(number), "llama", 21, before=before, threshold=0.7)
        found = []
        for parts, _ in runs:
            found.append({n: p.detach().clone() for n, p in parts.engine.parameters.items()})
        result.append(found)
    first, second = zip(*result, strict=True)
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    apart = sum(float((second[0][n] - second[1][n]).square().sum()) for n in second[0])
    moved = sum(float((second[1][n] - first[1][n]).square().sum()) for n in second[0])
    assert apart > 0.05 * moved


def test_a_full_memory_is_said_before_training(tmp_path):
    runs = learned(tmp_path, "llama", 21, tasks=2, steps=1, threshold=1.0)
    parts, _ = next(runs)
    before = {n: p.detach().clone() for n, p in parts.engine.parameters.items()}
    assert all(b.shape[0] == b.shape[1] for b in parts.method.memory.values())
    next(runs)
    for name, value in parts.engine.parameters.items():
        torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=1e-5)
    runs.close()
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    said = [e["message"] for e in map(json.loads, events) if e["event"] == "warning"]
    assert len(said) == 1
    assert said[0].startswith("two: the memory holds all directions of 8 of 8 layer inputs")
    runs = learned(tmp_path / "half", "llama", 21, tasks=2, steps=1, threshold=0.5)  # control
    for _ in runs:
        pass
    assert '"warning"' not in (tmp_path / "half" / "run" / "events.jsonl").read_text()


def test_rows_and_state(tmp_path):
    cases.sequence(ALONE, tmp_path, model="t5", settings={"threshold": 0.7, "rows": 3}, **PLAIN)
    tensors = checkpoint.load(tmp_path / "run", Position(stage=1), "method")
    assert all(name.startswith("basis/") for name in tensors)
    again = Gpm(GpmConfig())
    again.load_state_dict(tensors)
    assert again.state_bytes() == sum(value.numel() * 4 for value in tensors.values())
    saved = again.state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value) for name, value in tensors.items())


# -- models that it cannot work on ---------------------------------------------------------------


@pytest.mark.parametrize("others", ["frozen", "trained"])
def test_a_model_without_linear_layers_is_refused_before_training(tmp_path, monkeypatch, others):
    """GPT-2 has layers of its own kind; `trained` finds weights to train all the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=toys.VOCAB, n_positions=40, n_embd=32, n_layer=1, n_head=4, use_cache=False
    )
    monkeypatch.setattr(toys, "base_model", lambda kind: GPT2LMHeadModel(config))
    with pytest.raises(ModelError, match=r"no nn\.Linear layers .* Choose another method"):
        StageRunner(
            toys.make_parts(ALONE, tmp_path, model="llama", settings={"others": others}, **PLAIN)
        ).run()
    events = tmp_path / "run" / "events.jsonl"
    assert not events.exists() or '"step"' not in events.read_text()
