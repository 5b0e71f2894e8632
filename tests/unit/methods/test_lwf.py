"""LwF: the divergence, its direction, its gradient, its weights and the old model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods.lwf import Lwf, LwfConfig, distillation, old_logits
from accrete.pipeline.models.lora import ADAPTER, initial_factors, load_factors
from accrete.pipeline.stage import aligned_logits
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def logits(seed, rows=6, size=11):
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()


# -- the divergence --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_it_is_the_kl_from_old_to_new(temperature):
    new, old = logits(0), logits(1)
    p, q = softmax(old.numpy() / temperature), softmax(new.numpy() / temperature)
    assert np.allclose(distillation(new, old, temperature), temperature**2 * kl(p, q), rtol=1e-12)
    reversed_ = distillation(new, old, temperature, "new_old")
    assert np.allclose(reversed_, temperature**2 * kl(q, p), rtol=1e-12)


def test_the_directions_differ():
    """Control: the oracle can tell one from the other."""
    new, old = logits(0), logits(1)
    forward, backward = distillation(new, old, 2.0), distillation(new, old, 2.0, "new_old")
    assert (forward - backward).abs().min() > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_its_gradient_goes_to_the_new_model_alone(temperature):
    """d/dnew of T^2 KL(old || new) = T (softmax(new / T) - softmax(old / T))."""
    new, old = logits(0).requires_grad_(), logits(1).requires_grad_()
    distillation(new, old, temperature).sum().backward()
    n, o = new.detach().numpy(), old.detach().numpy()
    expected = temperature * (softmax(n / temperature) - softmax(o / temperature))
    assert np.allclose(new.grad, expected, atol=1e-12)
    assert old.grad is None


def test_reversed_gradient_goes_through_the_new_distribution():
    """TreeLoRA's: against finite differences."""
    new, old, step = logits(0).requires_grad_(), logits(1), 1e-6
    distillation(new, old, 2.0, "new_old").sum().backward()
    for row, column in [(0, 0), (2, 5), (5, 10)]:
        values = []
        for sign in (1, -1):
            moved = new.detach().numpy().copy()
            moved[row, column] += sign * step
            q = softmax(moved / 2.0)
            values.append(4.0 * kl(q, softmax(old.numpy() / 2.0)).sum())
        slope = (values[0] - values[1]) / (2 * step)
        assert float(new.grad[row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_gradients_of_the_paper_and_of_the_cross_entropy_are_the_same():
    """The paper writes the cross-entropy, which differs by the old model's entropy alone."""
    new, old = logits(0).requires_grad_(), logits(1)
    distillation(new, old, 2.0).sum().backward()
    got, new.grad = new.grad, None
    target = torch.softmax(old / 2.0, -1)
    (-4.0 * (target * torch.log_softmax(new / 2.0, -1)).sum()).backward()
    assert torch.allclose(got, new.grad, atol=1e-12)


# -- the old model ---------------------------------------------------------------------------


def second_stage(folder, model="llama", micro=8, settings=None, past="fold"):
    """A runner at its second task, with a past of one task and a live adapter that is not zero."""
    parts = toys.make_parts(
        ALONE,
        folder,
        model=model,
        zero=None,
        micro=micro,
        method="lwf",
        settings=settings,
        past=past,
    )
    runner = StageRunner(parts)
    generator = torch.Generator().manual_seed(5)

    def random_factors(index):
        return {
            name: (a, 0.3 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in initial_factors(parts.adapted, 3, index).items()
        }

    first = random_factors(0)
    parts.past.add(first)
    stage = runner._stage(1)
    stage.write_factors(random_factors(1))
    return parts, stage, first


@pytest.mark.parametrize("past", ["fold", "branch"])
@pytest.mark.parametrize("model", MODELS)
def test_the_old_model_is_the_past_without_the_live_adapter(tmp_path, model, past):
    parts, stage, first = second_stage(tmp_path, model, past=past)
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    live = stage.logits(batch)
    old = old_logits(stage, batch)
    assert not old.requires_grad

    base = toys.base_model(model)
    state = base.state_dict()
    for name, (a, b) in first.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * b @ a
    base.load_state_dict(state)
    expected = aligned_logits(base, batch, model == "t5")
    assert torch.allclose(old, expected, atol=2e-5)
    assert (live - old).abs().max() > 0.1
    # Nothing of it stays.
    assert torch.equal(stage.logits(batch), live)
    for layer in parts.adapted.layers.values():
        assert layer.module.scaling[ADAPTER] == layer.scale == 2.0
    assert all(p.requires_grad for p in parts.engine.parameters.values())


def test_the_old_model_has_no_dropout(tmp_path):
    parts, stage, _ = second_stage(tmp_path)
    for module in parts.adapted.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    dropouts = [m for m in parts.adapted.module.modules() if isinstance(m, torch.nn.Dropout)]
    for layer in parts.adapted.layers.values():
        layer.module.lora_dropout[ADAPTER] = torch.nn.Dropout(0.5)
        dropouts.append(layer.module.lora_dropout[ADAPTER])
    parts.adapted.module.train()
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    state = torch.get_rng_state()
    assert torch.equal(old_logits(stage, batch), old_logits(stage, batch))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in dropouts)


def test_scaling_comes_back_when_the_forward_fails(tmp_path):
    parts, stage, _ = second_stage(tmp_path)
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    del batch.inputs["input_ids"]
    with pytest.raises(Exception):  # noqa: B017
        old_logits(stage, batch)
    for layer in parts.adapted.layers.values():
        assert layer.module.scaling[ADAPTER] == layer.scale


# -- the term --------------------------------------------------------------------------------


def step_gradients(parts, stage, step):
    """Gradients of one step and the method's value, task loss and all."""
    method, engine = parts.method, parts.engine
    stage.step = step
    method.before_step(stage)
    rows = stage.global_batch(step)
    total = 0.0
    for number, batch in enumerate(stage.micro_batches(rows), start=1):
        out = stage.logits(batch)
        terms = method.loss_terms(stage, batch, out)
        total += float(terms["distillation"].detach())
        engine.backward(terms["distillation"], number == engine.accumulation)
    gradients = {name: p.grad.clone() for name, p in engine.parameters.items()}
    for parameter in engine.parameters.values():
        parameter.grad = None
    return total / engine.accumulation, gradients, method.step_sums()["penalty"]


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_mean_over_the_steps_label_tokens(tmp_path, model, step):
    """Whatever the micro-batches; step 2 has 5 rows only, and micro-batches of padding rows."""
    settings = {"weight": 0.7, "temperature": 2.0}
    _, stage, _ = second_stage(tmp_path / "whole", model, 8, settings)
    rows = stage.global_batch(step)
    assert len(rows) == (5 if step == 2 else 8)
    each = []
    with torch.no_grad():
        for row in rows:  # one by one: no padding at all
            batch = stage.collator.train([row])
            new = stage.logits(batch).double().numpy()[0]
            old = old_logits(stage, batch).double().numpy()[0]
            assert len(new) == len(row.answer)
            each.append(4.0 * kl(softmax(old / 2), softmax(new / 2)))
    expected = 0.7 * np.concatenate(each).mean()

    reference = None
    for micro in (8, 2, 3):
        parts, stage, _ = second_stage(tmp_path / str(micro), model, micro, settings)
        value, gradients, logged = step_gradients(parts, stage, step)
        # A KL of 1e-3 is a difference of fp32 log-probabilities near -4: a few of their last bits.
        assert value == pytest.approx(expected, rel=1e-5, abs=5e-7)
        assert float(logged) == pytest.approx(expected, rel=1e-5, abs=5e-7)
        if reference is None:
            reference = gradients
        for name, gradient in gradients.items():
            difference = (gradient - reference[name]).norm() / reference[name].norm()
            assert float(difference) < 1e-5


def test_there_is_no_term_before_there_is_an_old_task(tmp_path):
    parts = toys.make_parts(ALONE, tmp_path, model="llama", zero=None, micro=8, method="lwf")
    stage = StageRunner(parts)._stage(0)
    parts.method.before_step(stage)
    batch = next(iter(stage.micro_batches(stage.global_batch(0))))
    assert parts.method.loss_terms(stage, batch, stage.logits(batch)) == {}
    assert parts.method.step_sums() == {}


def test_at_a_tasks_start_it_is_zero_and_pulls_nowhere(tmp_path):
    parts, stage, _ = second_stage(tmp_path)
    stage.write_factors(initial_factors(parts.adapted, 3, 1))
    value, gradients, _ = step_gradients(parts, stage, 0)
    assert abs(value) < 1e-6
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-6


# -- a run -----------------------------------------------------------------------------------


def run(folder, method="lwf", model="llama", **settings):
    parts = toys.make_parts(
        ALONE,
        folder,
        model=model,
        zero=None,
        micro=8,
        method=method,
        settings=settings,
        train={"epochs": 4.0},
    )
    StageRunner(parts).run()
    parts.recorder.close()
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, lines) if e["event"] == "step"]
    return parts, steps


def drift(folder, parts, index):
    """Norm of the second task's delta, all layers."""
    factors = load_factors(parts.run.stage(index).adapter)
    return float(sum((b @ a).square().sum() for a, b in factors.values())) ** 0.5


def test_without_weight_it_is_inc_lora_to_the_bit(tmp_path):
    off, _ = run(tmp_path / "off", weight=0.0)
    plain, _ = run(tmp_path / "inc", "inc_lora")
    for index in range(2):
        a = load_factors(off.run.stage(index).adapter)
        b = load_factors(plain.run.stage(index).adapter)
        assert all(torch.equal(a[k][i], b[k][i]) for k in b for i in (0, 1))


@pytest.mark.parametrize(("model", "strong"), [("t5", 30.0), ("llama", 300.0)])
def test_it_holds_the_new_task_back(tmp_path, model, strong):
    found = {}
    for weight in (0.0, 1.0, strong):
        parts, steps = run(tmp_path / str(weight), model=model, weight=weight)
        found[weight] = drift(tmp_path, parts, 1)
        logged = [step.get("penalty") for step in steps if step["stage"] == 1]
        assert all(v is None for v in logged) if weight == 0 else logged[-1] > 0
        assert all("penalty" not in step for step in steps if step["stage"] == 0)
    assert found[strong] < 0.5 * found[0.0]
    assert found[strong] < found[1.0] < found[0.0]


def test_it_keeps_nothing():
    method = Lwf(LwfConfig())
    assert method.state_dict() == {}
    assert method.state_bytes() == 0
