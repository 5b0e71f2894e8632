"""LoRA-: whole runs against plain autograd with dense projectors; guarantees and their controls."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))


from subtraction_case import (
    MODELS,
    SHARP,
    Oracle,
    assert_close,
    dense,
    events,
    parts_of,
    run,
    watched,
)

from accrete.pipeline.methods.lora_subtraction import LoraSubtraction
from accrete.pipeline.models.lora import initial_factors


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("triplet", "micro"), [(0.0, 8), (0.5, 8), (0.5, 4)])
def test_three_tasks_equal_plain_autograd(tmp_path, model, triplet, micro):
    closed = 3 if triplet else None
    settings = {"triplet": triplet, "margin": 0.7}
    parts = parts_of(tmp_path, model, settings, closed=closed, micro=micro)
    got = run(parts)
    oracle = Oracle(parts, model, triplet=triplet, margin=0.7, pool=micro, closed=closed)
    for index, factors in enumerate(got):
        assert_close(factors, oracle.task(index))
    if triplet:
        logged = [event["triplet"] for event in events(parts, "step")]
        assert logged == pytest.approx(oracle.triplets, rel=1e-5)
        assert min(logged) > 0.05
        state = parts.method.state_dict()
        means = np.concatenate([state[k] for k in sorted(state) if k.startswith("prototypes/")])
        assert means.shape[0] == 9
        assert np.abs(means - np.array(oracle.means)).max() < 1e-5 * np.abs(means).max()
    else:
        assert not parts.method.state_dict()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    settings = {"triplet": 0.5}
    plain = run(parts_of(tmp_path / "a", "t5", settings, closed=3, tasks=2))
    saving = run(parts_of(tmp_path / "b", "t5", settings, closed=3, tasks=2, checkpointing=True))
    for mine, theirs in zip(saving, plain, strict=True):
        assert_close(mine, theirs)


# -- the guarantee -----------------------------------------------------------------------------


def leak(value, p):
    return float((value.double() - value.double() @ p).norm() / value.norm())


@pytest.mark.parametrize("scale_mode", ["none", "inv_sqrt_k"])
@pytest.mark.parametrize("model", MODELS)
def test_updates_stay_in_the_space_after_every_step(tmp_path, model, scale_mode):
    seen = []

    def look(stage):
        if stage.index == 0:
            assert not parts.method.rules
            return
        for rule in parts.method.rules:
            p = dense(rule.projector)
            assert torch.allclose(p, p.T, atol=1e-6)
            assert torch.allclose(p @ p, p, atol=1e-5)
            assert float(p.trace()) == pytest.approx(rule.projector.size, rel=1e-5)
            assert 0 < rule.projector.size < len(p)
            for name in rule.names:
                layer = parts.adapted.layers[name.removesuffix(".lora_A")]
                a, b = stage.read(layer.a), stage.read(layer.b)
                assert leak(a, p) < 1e-5
                assert leak(layer.scale * b @ a, p) < 1e-5
                seen.append((stage.index, stage.step, name))

    train = {"weight_decay": 0.3, **SHARP}
    parts = parts_of(tmp_path, model, {"scale_mode": scale_mode}, train=train)
    run(watched(parts, look))
    assert len(set(seen)) == len(seen) == 2 * 3 * len(parts.adapted.layers)


def test_projecting_the_gradient_before_adam_leaks(tmp_path):
    """Negative control: the same space, the same start, the gradient instead of the step."""
    parts = parts_of(tmp_path, tasks=2, train=SHARP)
    leaks = []

    def edit(stage):
        for rule in parts.method.rules:
            for name in rule.names:
                gradient = stage.engine.gradient(name)
                stage.engine.write_gradient(name, rule.projector.rows(gradient))

    def look(stage):
        for rule in parts.method.rules:
            for name in rule.names:
                layer = parts.adapted.layers[name.removesuffix(".lora_A")]
                start = initial_factors(parts.adapted, parts.config.seed, 1)[layer.name][0]
                moved = stage.read(name) - rule.projector.rows(start)
                leaks.append(leak(moved, dense(rule.projector)))

    parts.method.after_backward = edit
    parts.method.after_step = look
    run(parts)
    assert len(leaks) == 3 * len(parts.adapted.layers)
    assert np.mean(leaks) > 0.05


@pytest.mark.parametrize("model", MODELS)
def test_without_earlier_tasks_it_is_plain_lora(tmp_path, model):
    own = run(parts_of(tmp_path / "a", model, {"triplet": 0.0}))
    inc = run(parts_of(tmp_path / "b", model, method="inc_lora"))
    for name, (a, b) in inc[0].items():
        assert torch.equal(own[0][name][0], a)
        assert torch.equal(own[0][name][1], b)
    assert not torch.equal(own[1][name][0], inc[1][name][0])


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_projected_in_the_first_task(tmp_path, monkeypatch, model):
    """With the triplet loss on, where the factors are not those of plain LoRA."""
    settings = {"triplet": 0.5}
    whole = run(parts_of(tmp_path / "a", model, settings, closed=3, tasks=1))
    inc = run(parts_of(tmp_path / "b", model, method="inc_lora", closed=3, tasks=1))

    def refuse(method, stage):
        raise AssertionError(f"a space is looked for in task {stage.index}")

    monkeypatch.setattr(LoraSubtraction, "_find_rules", refuse)
    blind = run(parts_of(tmp_path / "c", model, settings, closed=3, tasks=1))
    for name, pair in whole[0].items():
        for mine, theirs in zip(pair, blind[0][name], strict=True):
            assert torch.equal(mine, theirs)
        assert not torch.equal(pair[1], inc[0][name][1])
    # Control: the second task looks for one.
    with pytest.raises(AssertionError, match="in task 1"):
        run(parts_of(tmp_path / "d", model, settings, closed=3, tasks=2))


def test_whole_energy_is_plain_lora(tmp_path):
    """With everything kept nothing is projected, to the bit."""
    own = run(parts_of(tmp_path / "a", settings={"energy": 1.0}))
    inc = run(parts_of(tmp_path / "b", method="inc_lora"))
    for mine, theirs in zip(own, inc, strict=True):
        for name, pair in theirs.items():
            for x, y in zip(mine[name], pair, strict=True):
                assert torch.equal(x, y)


# -- the subtracted model ----------------------------------------------------------------------
