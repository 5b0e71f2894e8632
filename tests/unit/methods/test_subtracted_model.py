"""LoRA subtraction: the subtracted model, the reference's rules, prototypes and state."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

from subtraction_case import (
    ENERGY,
    MODELS,
    SCALE,
    Oracle,
    assert_close,
    events,
    parts_of,
    run,
    watched,
)
from toys import ToyRows, base_model

from accrete.pipeline.errors import MethodError
from accrete.pipeline.methods import prototypes
from accrete.pipeline.methods.lora_subtraction import LoraSubtraction, LoraSubtractionConfig
from accrete.pipeline.models.lora import initial_factors
from accrete.pipeline.stage_runner import StageRunner


def with_past(folder, model, past, tasks=2):
    parts = parts_of(folder, model, past=past)
    generator = torch.Generator().manual_seed(5)
    deltas = dict.fromkeys(parts.adapted.layers, 0.0)
    for index in range(tasks):
        factors = {
            name: (a, 0.1 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in initial_factors(parts.adapted, 0, index).items()
        }
        parts.past.add(factors)
        for name, (a, b) in factors.items():
            deltas[name] = deltas[name] + SCALE * b @ a
    return parts, deltas


@pytest.mark.parametrize("past", ["fold", "branch"])
@pytest.mark.parametrize("model", MODELS)
def test_subtracted_model_is_that_of_the_difference(tmp_path, model, past):
    parts, deltas = with_past(tmp_path, model, past)
    stage = StageRunner(parts)._stage(0)
    batch = parts.collator.train(stage.rows.all[:6])
    reference = base_model(model)
    for name, delta in deltas.items():
        weight = reference.get_submodule(name).weight
        expected = weight - delta
        got = parts.past.subtracted_weight(parts.adapted.layers[name])
        assert float((got - expected).norm() / expected.norm()) < 1e-6
        weight.data.copy_(expected)
    with torch.no_grad():
        expected = reference(**batch.inputs).logits[:, -batch.labels.shape[1] :]
    before = {k: v.clone() for k, v in parts.adapted.module.state_dict().items()}
    logits = stage.logits(batch).detach()
    with parts.past.subtracted():
        inside = stage.logits(batch).detach()
    assert float((inside - expected).norm() / expected.norm()) < 1e-6
    assert float((logits - expected).norm() / expected.norm()) > 1e-2
    with pytest.raises(RuntimeError), parts.past.subtracted():
        raise RuntimeError
    assert torch.equal(stage.logits(batch), logits)
    for key, value in parts.adapted.module.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("past", ["fold", "branch"])
def test_nothing_is_subtracted_without_a_past(tmp_path, past):
    parts = parts_of(tmp_path, past=past)
    stage = StageRunner(parts)._stage(0)
    batch = parts.collator.train(stage.rows.all[:6])
    logits = stage.logits(batch)
    with parts.past.subtracted():
        assert torch.equal(stage.logits(batch), logits)
    layer = next(iter(parts.adapted.layers.values()))
    assert torch.equal(parts.past.subtracted_weight(layer), layer.weight)


def test_the_past_may_stay_a_branch(tmp_path):
    fold = run(parts_of(tmp_path / "a", "t5"))
    branch = run(parts_of(tmp_path / "b", "t5", past="branch"))
    for mine, theirs in zip(fold, branch, strict=True):
        assert_close(mine, theirs)


# -- the reference's rules ---------------------------------------------------------------------


def covariance_bases(parts, stage, outputs):
    """Layer -> P of its inputs or outputs, row by row under dense W_0 - V."""
    reference = base_model("t5" if stage.facts.seq2seq else "llama")
    for layer in parts.adapted.layers.values():
        reference.get_submodule(layer.name).weight.data.sub_(parts.past.delta(layer))
    kept = {name: [] for name in parts.adapted.layers}
    for name, pieces in kept.items():
        reference.get_submodule(name).register_forward_hook(
            lambda module, given, out, pieces=pieces: pieces.append(out if outputs else given[0])
        )
    with torch.no_grad():
        for row in stage.rows.all:
            reference(**parts.collator.train([row]).inputs)
    found = {}
    for name, pieces in kept.items():
        x = torch.cat([piece[0] for piece in pieces]).double().numpy()
        values, vectors = np.linalg.eigh(x.T @ x)
        size = int(np.argmax(np.cumsum(values[::-1]) / values.sum() >= ENERGY)) + 1
        top = torch.from_numpy(vectors[:, ::-1][:, :size].copy())
        found[name] = (top @ top.T, size)
    return found


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("t5", {"mode": "reference"}),
        ("llama", {"mode": "reference", "b_mode": "output_cov"}),
        ("llama", {"mode": "reference", "b_mode": "none", "scale_mode": "none"}),
        ("t5", {"b_mode": "output_cov"}),
        ("llama", {"b_mode": "output_cov", "scale_mode": "inv_sqrt_k"}),
    ],
)
def test_every_rule_projects_the_step_that_adam_made(tmp_path, model, settings):
    parts = parts_of(tmp_path, model, settings, tasks=2)
    reference = settings.get("mode") == "reference"
    scaled = settings.get("scale_mode", "inv_sqrt_k" if reference else "none") == "inv_sqrt_k"
    b_mode = settings.get("b_mode", "reference" if reference else "none")
    records, bases = [], {}
    step, before_step = parts.engine.step, parts.method.before_step

    def values():
        return {name: parts.engine.value(name).double() for name in parts.engine.parameters}

    def engine_step(rate):
        norm = step(rate)
        records[-1]["raw"] = values()
        return norm

    def start(stage):
        before_step(stage)
        records.append({"index": stage.index, "old": values()})
        if stage.index == 1 and not bases:
            bases["in"] = covariance_bases(parts, stage, False)
            bases["out"] = covariance_bases(parts, stage, True)

    parts.engine.step, parts.method.before_step = engine_step, start
    run(watched(parts, lambda stage: records[-1].update(new=values())))
    second = [record for record in records if record["index"] == 1]
    assert len(second) == 3
    initial = initial_factors(parts.adapted, parts.config.seed, 1)
    for layer in parts.adapted.layers.values():
        p, size = bases["in"][layer.name]
        q, outer = bases["out"][layer.name] if b_mode == "output_cov" else (p, size)
        first = initial[layer.name][0].double()
        expected = first if reference else first @ p
        assert (second[0]["old"][layer.a] - expected).abs().max() < 1e-5
        for record in second:
            old, raw, new = (record[key] for key in ("old", "raw", "new"))
            moved = (raw[layer.a] - old[layer.a]) @ p / (size**0.5 if scaled else 1)
            assert_moved(old[layer.a], new[layer.a], moved)
            moved = raw[layer.b] - old[layer.b]
            if b_mode != "none":
                moved = q @ moved / (outer**0.5 if scaled else 1)
            assert_moved(old[layer.b], new[layer.b], moved)


def assert_moved(old, new, expected):
    """Tolerance: fp32 rounding of the values that the step is a difference of."""
    assert float((new - old - expected).norm()) < 1e-5 * float(expected.norm() + old.norm())
    assert float(expected.norm()) > 0


def test_reference_rule_for_b_needs_square_layers(tmp_path):
    parts = parts_of(tmp_path, "llama", {"mode": "reference"})
    with pytest.raises(MethodError, match=r"maps 32 to 16.*method\.b_mode=none or output_cov"):
        StageRunner(parts).run()


# -- closed and open tasks, diagnostics, state ---------------------------------------------------


def test_open_tasks_have_no_triplet_loss(tmp_path):
    parts = parts_of(tmp_path / "a", settings={"triplet": 5.0, "ncm": True})
    off = parts_of(tmp_path / "b", settings={"triplet": 0.0})
    for mine, theirs in zip(run(parts), run(off), strict=True):
        for name, pair in theirs.items():
            assert torch.equal(mine[name][0], pair[0])
            assert torch.equal(mine[name][1], pair[1])
    assert all("triplet" not in event for event in events(parts, "step"))
    assert all("ncm_accuracy" not in event for event in events(parts, "consolidated"))
    assert parts.method.state_bytes() == 0
    # Control: with closed labels the same weight changes the run.
    closed = run(parts_of(tmp_path / "c", settings={"triplet": 5.0}, closed=3))
    plain = run(parts_of(tmp_path / "d", settings={"triplet": 0.0}, closed=3))
    name = next(iter(plain[0]))
    assert (closed[0][name][1] - plain[0][name][1]).norm() > 1e-3 * plain[0][name][1].norm()


@pytest.mark.parametrize("model", MODELS)
def test_nearest_class_mean(tmp_path, model):
    parts = parts_of(tmp_path, model, {"triplet": 0.0, "ncm": True}, closed=3, tasks=2)
    run(parts)
    noted = [event["ncm_accuracy"] for event in events(parts, "consolidated")]
    oracle = Oracle(parts, model, triplet=0.0, margin=0.0, pool=8, closed=3)
    for index in range(2):
        factors = oracle.task(index)
        rows = ToyRows(index, 21, 8, 3).all
        weights = {n: w + oracle.past[n] for n, w in oracle.start.items()}
        means = np.array(oracle.means)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        answers = list(dict.fromkeys(tuple(row.answer) for row in rows))
        hits = 0
        for row in rows:
            with torch.no_grad():
                f = oracle.forward([row], weights)[2][0].numpy()
            nearest = int(((means - f / np.linalg.norm(f)) ** 2).sum(1).argmin())
            hits += nearest == len(means) - 3 + answers.index(tuple(row.answer))
        assert factors
        assert noted[index] == pytest.approx(100 * hits / 21, abs=1e-9)
        assert hits > 0
    assert "triplet" not in events(parts, "step")[0]


@pytest.mark.parametrize("ncm", [False, True])
def test_features_are_added_up_batch_by_batch(tmp_path, monkeypatch, ncm):
    """One pass for the prototypes and one for `ncm`; no batch's features outlive the next."""
    seen: list[weakref.ref] = []
    most = 0
    real = prototypes.last_features

    def watch(features, batch):
        nonlocal most
        found = real(features, batch)
        seen.append(weakref.ref(found))
        most = max(most, sum(ref() is not None for ref in seen))
        return found

    monkeypatch.setattr(prototypes, "last_features", watch)
    parts = parts_of(tmp_path, settings={"triplet": 0.0, "ncm": ncm}, closed=3, tasks=1)
    if not ncm:  # prototypes alone
        parts.method.settings = dataclasses.replace(parts.method.settings, triplet=1e-30)
    run(parts)
    assert len(seen) == 3 * (1 + ncm)
    assert most <= 2


def test_a_class_that_comes_late_has_a_prototype(tmp_path, monkeypatch):
    """Sums grow with the classes found; the means are those of all features at once."""
    parts = parts_of(tmp_path, settings={"triplet": 0.1}, closed=3, tasks=1, micro=2)
    rows = ToyRows(0, 21, 8, 3)
    late = [7, 7, 7, 1]
    rows.all[-1] = dataclasses.replace(rows.all[-1], answer=late)
    parts.open_rows = lambda task, index: rows
    kept: list[tuple[tuple[int, ...], torch.Tensor]] = []
    real = prototypes.last_features

    def keep(features, batch):
        found = real(features, batch)
        for labels, feature in zip(batch.labels[: batch.real_rows].tolist(), found, strict=True):
            kept.append((tuple(t for t in labels if t >= 0), feature.clone()))
        return found

    monkeypatch.setattr(prototypes, "last_features", keep)
    run(parts)
    means, answers = parts.method.prototypes.means["one"], parts.method.prototypes.answers["one"]
    assert answers[-1].tolist()[:4] == late
    assert means.shape[0] == 4
    for mean, answer in zip(means, answers.tolist(), strict=True):
        own = [f for known, f in kept if known == tuple(t for t in answer if t >= 0)]
        expected = torch.stack(own).double().mean(0)
        assert float((mean - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_state_comes_back(tmp_path):
    parts = parts_of(tmp_path, settings={"triplet": 0.1}, closed=3)
    run(parts)
    state = parts.method.state_dict()
    assert parts.method.state_bytes() == sum(v.numel() * v.element_size() for v in state.values())
    fresh = LoraSubtraction(LoraSubtractionConfig())
    fresh.bind(0, 1, torch.device("cpu"))
    fresh.load_state_dict(dict(reversed(state.items())))
    again = fresh.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)
    directions = fresh.prototypes.directions()
    assert torch.equal(directions, parts.method.prototypes.directions())
    assert torch.allclose(directions.norm(dim=1), torch.ones(9), atol=1e-6)
