"""InfLoRA's frozen A and its guarantee, on whole runs of the toy models."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods.inf_lora import FREE, PROTECTED, InfLora, InfLoraConfig
from accrete.pipeline.models.lora import initial_factors
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.statistics import input_names

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")


def parts_of(folder, model, **params):
    base = {"zero": None, "micro": 8, "method": "inf_lora", "tasks": 3}
    return toys.make_parts(ALONE, folder, **{**base, "model": model, **params})


def projector(memory):
    basis = memory.basis.double()
    inside = basis @ basis.T
    return torch.eye(len(inside), dtype=torch.float64) - inside if memory.free else inside


class Watched:
    """A run that notes, before every task, what is protected, and its factors after it."""

    def __init__(self, folder, model, **params):
        self.parts = parts_of(folder, model, **params)
        method = self.parts.method
        self.before, self.after, self.readers = [], [], {}
        start, end = method.on_task_start, method.on_task_end

        def on_task_start(stage):
            self.before.append({k: projector(m) for k, m in method.memory.items()})
            start(stage)
            self.started = stage.factors()
            self.readers = input_names(stage)

        def on_task_end(stage):
            factors = stage.factors()
            self.after.append(factors)
            for name, (a, _) in self.started.items():
                assert torch.equal(factors[name][0], a)
            end(stage)

        method.on_task_start, method.on_task_end = on_task_start, on_task_end
        StageRunner(self.parts).run()
        self.parts.recorder.close()

    def leaks(self):
        """||A M|| and ||dW M|| / ||dW|| of every layer and task after the first."""
        for memory, factors in zip(self.before[1:], self.after[1:], strict=True):
            for name, (a, b) in factors.items():
                m = memory[self.readers[name]]
                update = b.double() @ a.double()
                if float(update.norm()):
                    yield (
                        float((a.double() @ m).abs().max()),
                        float((update @ m).norm() / update.norm()),
                    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0.3},
        {"eps": 0.7},
        {"eps": 0.95},
        {"eps": 0.8, "power": 2, "first_fill": "one_fewer"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_updates_cannot_reach_protected_inputs(tmp_path, model, settings):
    """With AdamW and weight decay, in both states of the memory."""
    seen = Watched(tmp_path, model, settings=settings)
    leaks = list(seen.leaks())
    assert len(leaks) >= len(seen.after[0])
    assert max(a for a, _ in leaks) < 1e-5
    assert max(w for _, w in leaks) < 1e-5
    # Any input in the span: no layer's answer moves by more than rounding.
    memory, factors = seen.before[2], seen.after[2]
    for name, (a, b) in factors.items():
        m = memory[seen.readers[name]]
        noise = np.random.default_rng(1).normal(size=(len(m), 7))
        x = (m @ torch.from_numpy(noise)).float()
        before = seen.parts.adapted.layers[name].weight.detach() @ x
        moved = seen.parts.adapted.layers[name].scale * b @ (a @ x)
        assert float(moved.norm()) < 1e-5 * float(before.norm())


def test_training_a_as_well_breaks_the_guarantee(tmp_path, monkeypatch):
    """Control: the same start, but A is trained too."""
    monkeypatch.setattr(InfLora, "trainable", lambda self, factor: True)
    parts = parts_of(tmp_path, "llama", settings={"eps": 0.5})
    runner = StageRunner(parts)
    runner._learn(0, None)
    memory = {k: projector(m) for k, m in parts.method.memory.items()}
    runner._learn(1, None)
    worst = 0.0
    for name, (a, _) in parts.past.stages[1].items():
        reader = name.replace("v_proj", "q_proj")
        worst = max(worst, float((a.double() @ memory[reader]).abs().max()))
    assert worst > 1e-3


def inputs_by_hand(parts, rows):
    """[n, d] inputs of every layer: one row at a time, so nothing is padded."""
    seen = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0][0].double())
        )
        for name, layer in parts.adapted.layers.items()
    ]
    for row in rows:
        batch = parts.collator.train([row], 1)
        with torch.no_grad():
            parts.adapted.module.eval()(**batch.inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).numpy() for name, found in seen.items()}


@pytest.mark.parametrize("model", MODELS)
def test_a_is_the_first_tasks_principal_inputs(tmp_path, model):
    """Over sqrt 3, by singular vectors of the inputs of single, unpadded rows."""
    parts = parts_of(tmp_path, model)
    stage = StageRunner(parts)._stage(0)
    stage.write_factors(initial_factors(parts.adapted, 3, 0))
    parts.method.on_task_start(stage)
    for name, x in inputs_by_hand(parts, stage.rows.all).items():
        expected = np.linalg.svd(x, full_matrices=False)[2][:5]
        got = stage.factors()[name][0].double().numpy() * math.sqrt(3)
        for mine, theirs in zip(got, expected, strict=True):
            assert abs(mine @ theirs) == pytest.approx(1, abs=1e-5), name
        np.testing.assert_allclose(got @ got.T, np.eye(5), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_of_the_second_task_is_what_the_first_left(tmp_path, model):
    """M and A by NumPy from the models that the run had, between its two tasks."""
    eps = 0.5
    parts = parts_of(tmp_path, model, settings={"eps": eps})
    runner = StageRunner(parts)
    runner._learn(0, None)
    stage = runner._stage(1)
    stage.write_factors(initial_factors(parts.adapted, 3, 1))
    # The finished factors are folded in, so this is the model after the first task.
    old = inputs_by_hand(parts, runner._stage(0).rows.all)
    new = inputs_by_hand(parts, stage.rows.all)
    parts.method.on_task_start(stage)
    for name, (a, _) in stage.factors().items():
        _, s, v = np.linalg.svd(old[name], full_matrices=False)
        count = int((np.cumsum(s**2) < eps * (s**2).sum()).sum()) + 1
        m = v[:count].T
        outside = new[name] - new[name] @ m @ m.T
        expected = np.linalg.svd(outside, full_matrices=False)[2][:5]
        got = a.double().numpy() * math.sqrt(3)
        overlap = np.linalg.svd(got @ expected.T, compute_uv=False)
        np.testing.assert_allclose(overlap, 1, atol=1e-4, err_msg=name)


def test_layers_of_one_input_share_a_and_memory(tmp_path):
    seen = Watched(tmp_path, "t5")
    names = set(seen.parts.adapted.layers)
    assert set(seen.readers) == names
    distinct = set(seen.readers.values())
    # Each block's q and v; all cross-attention values read the encoder's output.
    assert len(distinct) == 7
    assert set(seen.parts.method.memory) == distinct
    for name, reader in seen.readers.items():
        assert torch.equal(seen.after[1][name][0], seen.after[1][reader][0])


def events(folder, kind):
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def test_the_share_is_ramped(tmp_path):
    Watched(tmp_path, "llama", settings={"eps": 0.4})
    shares = [e["protected_share"] for e in events(tmp_path, "consolidated")]
    assert shares == pytest.approx([0.4, 0.6, 0.8])


def test_without_room_nothing_moves_and_the_run_says_so(tmp_path):
    seen = Watched(tmp_path, "llama", settings={"eps": 1.0})
    for factors in seen.after[1:]:
        for a, b in factors.values():
            assert not a.any()
            assert not b.any()
    told = [e.get("inputs_without_room") for e in events(tmp_path, "consolidated")]
    assert told == [None, 2.0, 2.0]
    said = [(e["stage"], e["message"]) for e in events(tmp_path, "warning")]
    assert [stage for stage, _ in said] == [1, 2]
    assert all("2 of 2 layer inputs have fewer free directions" in text for _, text in said)
    assert all("nothing can be learned of this task" in text for _, text in said)
    assert all(m.basis.shape == (32, 0) for m in seen.parts.method.memory.values())


@pytest.mark.parametrize("eps", [0.3, 0.95, 1.0])
def test_state_survives_a_checkpoint(tmp_path, eps):
    """Also a basis without columns; a resumed run goes on with the same A."""
    params = {"settings": {"eps": eps}, "every_steps": 1, "tasks": 3}
    whole = cases.sequence(
        ALONE, tmp_path / "whole", model="llama", zero=None, micro=8, method="inf_lora", **params
    )
    base = {"model": "llama", "zero": None, "micro": 8, "method": "inf_lora", **params}
    cases.interrupted(ALONE, tmp_path / "cut", cut=2, **base)
    got = cases.resumed(ALONE, tmp_path / "on", source="cut", **base)
    assert got["losses"] == whole["losses"][-len(got["losses"]) :]
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
    mark = "state/" + (PROTECTED if eps < 0.9 else FREE)
    kept = [k for k in whole if k.startswith("state/")]
    assert kept
    assert all(k.startswith(mark) for k in kept)
    assert whole["bytes"] == sum(whole[k].numel() * 4 for k in kept)


def test_every_rank_keeps_what_it_owns():
    names = ["b", "a", "d", "c", "e"]
    tensors = {PROTECTED + name: torch.full((6, 2), float(ord(name))) for name in names[:3]}
    tensors.update({FREE + name: torch.full((6, 1), float(ord(name))) for name in names[3:]})
    found = {}
    for rank in range(2):
        method = InfLora(InfLoraConfig())
        method.bind(rank, 2, torch.device("cpu"))
        method.load_state_dict(tensors)
        assert method.state_bytes() == sum(m.basis.numel() * 4 for m in method.memory.values())
        # As a task deals them out: in turn, by sorted names.
        assert sorted(method.memory) == sorted(names)[rank::2]
        found.update(method.memory)
    assert {k: (m.free, float(m.basis[0, 0])) for k, m in found.items()} == {
        name: (name in names[3:], float(ord(name))) for name in names
    }


def test_fewer_rows_give_another_memory(tmp_path):
    some = Watched(tmp_path / "some", "llama", settings={"eps": 0.5, "rows": 5})
    every = Watched(tmp_path / "all", "llama", settings={"eps": 0.5})
    first = next(iter(every.before[1]))
    assert float((some.before[1][first] - every.before[1][first]).norm()) > 1e-2
