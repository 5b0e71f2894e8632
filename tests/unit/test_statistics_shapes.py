"""Layers whose inputs are not [rows, tokens, d]: flattened ones, output heads, unknown ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from statistics_case import LINEAR, dense_gradients, make_parts, make_stage, toys
from torch import nn

from accrete.pipeline.errors import MethodError
from accrete.pipeline.models.lora import load_factors
from accrete.pipeline.stage import row_losses
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.statistics import (
    input_names,
    visit_gradients,
    visit_inputs,
    visit_row_gradients,
)

CASES = {"opt": LINEAR["opt"], "llama": ["q_proj", "lm_head"], "t5": ["q", "lm_head"]}
"""OPT flattens rows and tokens; a decoder's head reads the label positions alone."""


def captured(stage, rows):
    """Layer -> its inputs [tokens, d], one row at a time; of the head those before an answer."""
    seen = {name: [] for name in stage.adapted.layers}
    answer = 0

    def note(name):
        def hook(module, arguments, output):
            x = arguments[0].reshape(-1, arguments[0].shape[-1])
            seen[name].append((x[-answer:] if name == "lm_head" else x).double().numpy())

        return hook

    handles = [
        layer.module.base_layer.register_forward_hook(note(name))
        for name, layer in stage.adapted.layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            answer = len(row.answer)
            stage.adapted.base(**stage.collator.train([row]).inputs)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("model", list(CASES))
def test_inputs_are_those_of_the_rows_one_by_one(tmp_path, model, micro):
    stage = make_stage(tmp_path, model, targets=CASES[model], micro=micro)
    stage.engine.module.eval()
    names = input_names(stage)
    tokens = dict.fromkeys(names.values(), 0)
    totals = dict.fromkeys(names.values(), 0.0)

    def visit(name, x):
        tokens[name] += len(x)
        totals[name] += x.double().T @ x.double()

    visit_inputs(stage, visit)
    for layer, x in captured(stage, stage.rows.all).items():
        assert tokens[names[layer]] == len(x), layer
        np.testing.assert_allclose(totals[names[layer]], x.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("model", list(CASES))
def test_gradients_are_those_of_trainable_weights(tmp_path, model, micro):
    stage = make_stage(tmp_path, model, targets=CASES[model], micro=micro)
    stage.adapted.module.double()
    shapes = set()

    def visit(layer, x, g):
        shapes.add((layer.name, x.dim(), g.dim(), x.shape[:2] == g.shape[:2]))

    visit_gradients(stage, visit)
    assert {shape[1:] for shape in shapes} == {(3, 3, True)}
    got = dense_gradients(stage, visit_gradients)
    weights = [layer.weight.requires_grad_(True) for layer in stage.adapted.layers.values()]
    loss = 0.0
    for row in stage.rows.all:
        batch = stage.collator.train([row], 1)
        loss = loss + row_losses(stage.logits(batch), batch.labels).sum()
    for name, expected in zip(got, torch.autograd.grad(loss, weights), strict=True):
        assert float((got[name] - expected).norm() / expected.norm()) < 1e-6, name


def test_gradients_of_rows_do_not_mix(tmp_path):
    """What a flattened input would hide: row n of x belongs to row n of the batch."""
    stage = make_stage(tmp_path, "opt", micro=8)
    name = next(name for name in stage.adapted.layers if name.endswith("fc2"))
    seen = []

    def visit(layer, x, g):
        if layer.name == name:
            seen.extend(torch.einsum("nto,nti->noi", g, x))

    visit_gradients(stage, visit)
    weight = stage.adapted.layers[name].weight.requires_grad_(True)
    for row, got in zip(stage.rows.all, seen, strict=True):
        batch = stage.collator.train([row], 1)
        loss = row_losses(stage.logits(batch), batch.labels).sum()
        (expected,) = torch.autograd.grad(loss, weight)
        assert float((got - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ewc_lora", {}),
        ("inf_lora", {"eps": 0.5}),
        ("keep_lora", {"eps_w": 0.2, "eps_f": 0.6}),
        ("lora_subtraction", {"energy": 0.9}),
        ("gpm", {"threshold": 0.7}),
    ],
)
def test_methods_run_on_a_model_that_flattens(tmp_path, method, settings):
    parts = make_parts(tmp_path, "opt", method=method, settings=settings)
    StageRunner(parts).run()
    parts.recorder.close()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ewc_lora", {}),
        ("inf_lora", {"eps": 0.5}),
        ("keep_lora", {"eps_w": 0.2, "eps_f": 0.6}),
        ("keep_lora", {"eps_w": 0.2, "eps_f": 0.6, "memory": "gradients"}),
        ("lora_subtraction", {"energy": 0.9}),
    ],
)
def test_layers_that_do_not_run_do_no_harm(tmp_path, method, settings):
    """A model that reads pictures has them; the others come to what they come to without."""
    found = {}
    for extra in ([], ["idle"]):
        base = toys.base_model("llama")
        for layer in base.model.layers:
            layer.idle = nn.Linear(32, 32).requires_grad_(False)
        given = {"base": base, "targets": ["q_proj", *extra], "method": method}
        parts = make_parts(tmp_path / str(len(extra)), "llama", settings=settings, **given)
        StageRunner(parts).run()
        parts.recorder.close()
        found[len(extra)] = load_factors(parts.run.stage(1).adapter)
    assert sum("idle" in name for name in found[1]) == 2
    for name, pair in found[0].items():
        for mine, other in zip(pair, found[1][name], strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-6)


# -- what nobody can tell apart --------------------------------------------------------------------


class Routed(nn.Module):
    """A feed-forward part that sees every second token, as an expert does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        out[::2] = self.inner(flat[::2])
        return out.view_as(x)


def routed():
    base = toys.base_model("llama")
    base.model.layers[1].mlp = Routed(base.model.layers[1].mlp)
    return base


@pytest.mark.parametrize("go", [visit_gradients, visit_inputs, lambda s, _: input_names(s)])
def test_an_unknown_shape_is_named(tmp_path, go):
    stage = make_stage(tmp_path, "llama", base=routed())
    with pytest.raises(MethodError) as caught:
        go(stage, lambda *_: None)
    said = str(caught.value)
    assert said.startswith("model.layers.1.mlp.inner.gate_proj: its input has the shape [")
    for part in (", 32] for ", "[rows, tokens, features]", "adapter.targets", "another method"):
        assert part in said
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in stage.adapted.base.modules())


class Placed(nn.Module):
    """A feed-forward part beside a layer that sees places, the same of every row."""

    def __init__(self, inner, shape):
        super().__init__()
        self.inner, self.shape = inner, shape
        self.places = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x):
        places = torch.linspace(0, 1, x.shape[1] * 32).view(*self.shape, x.shape[1], 32)
        return self.inner(x) + self.places(places)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_input_that_rows_share_is_named(tmp_path, shape):
    """Of one row alone it would look like any other."""
    base = toys.base_model("llama")
    base.model.layers[1].mlp = Placed(base.model.layers[1].mlp, shape)
    stage = make_stage(tmp_path, "llama", base=base, targets=["q_proj", "places"])
    with pytest.raises(MethodError, match=r"^model\.layers\.1\.mlp\.places: its input has"):
        input_names(stage)


def test_it_is_said_before_training(tmp_path):
    for number, method in enumerate(("inf_lora", "keep_lora", "gpm")):
        parts = make_parts(tmp_path / str(number), "llama", base=routed(), method=method)
        with pytest.raises(MethodError, match=r"inner\.gate_proj"):
            StageRunner(parts).run()
        parts.recorder.close()
        assert '"step"' not in (tmp_path / str(number) / "run" / "events.jsonl").read_text()


def test_other_layers_of_such_a_model_are_measured(tmp_path):
    """Control, and what the error advises."""
    stage = make_stage(tmp_path, "llama", base=routed(), targets=["q_proj", "v_proj"])
    assert len(input_names(stage)) == 4
    assert visit_gradients(stage, lambda *_: None) == 21
    whole = make_stage(tmp_path / "whole", "llama", base=routed(), method="ewc")
    assert visit_row_gradients(whole, lambda *_: None, max_rows=2) == 2
