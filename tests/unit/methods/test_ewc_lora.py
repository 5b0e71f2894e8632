"""EWC-LoRA's ablations and its memory fallback against plain autograd; its Fisher's invariants."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline.data.collate import IGNORED
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import ConfigError, MethodError
from accrete.pipeline.methods.ewc_lora import EwcLoraConfig
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import AdaptedModel, initial_factors
from accrete.pipeline.stage import aligned_logits, row_losses
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.statistics import visit_gradients

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
VARIANTS = {
    "full_space": ({}, 3e2),
    "separate": ({"penalty": "separate"}, 30.0),
    "pretrained": ({"fisher_at": "pretrained"}, 3e2),
    "rank1": ({"fisher": "rank1"}, 3e2),
    "decayed": ({"fisher": "rank1", "gamma": 0.5}, 3e2),
}
PLAIN = {"zero": None, "micro": 8}


def run(folder, model, settings=None, tasks=3, method="ewc_lora", **more):
    return cases.sequence(
        ALONE,
        folder,
        **{**PLAIN, "model": model, "method": method, "settings": settings, "tasks": tasks, **more},
    )


class Autograd:
    """Three tasks by plain autograd: no engine, no hooks on gradients, no closed form."""

    def __init__(self, model, variant, strength, gamma):
        self.config = toys.make_config(None, tasks=3)
        self.adapted = AdaptedModel(toys.base_model(model), self.config.adapter)
        self.parameters = self.adapted.parameters()
        self.facts = toys.facts(model)
        start = self.facts.decoder_start_id
        self.collator = toys.Collator(self.facts.seq2seq, toys.PAD, start, toys.EOS)
        self.variant, self.strength, self.gamma = variant, strength, gamma
        self.memory = {}
        self.start = {}

    def pair(self, name):
        return self.parameters[f"{name}.lora_A"], self.parameters[f"{name}.lora_B"]

    def row_loss(self, row):
        batch = self.collator.train([row], 1)
        logits = aligned_logits(self.adapted.module, batch, self.facts.seq2seq)
        return row_losses(logits, batch.labels).sum()

    def run(self):
        result = {"losses": []}
        for stage in range(3):
            for name, (a, b) in initial_factors(self.adapted, self.config.seed, stage).items():
                for parameter, value in zip(self.pair(name), (a, b), strict=True):
                    parameter.data.copy_(value)
                self.start[name] = (a, b)
            rows = toys.ToyRows(stage, 21, 8)
            if self.variant == "pretrained" and stage == 0:
                self.measure(rows.all)
            result["losses"] += self.train(rows, penalised=stage > 0)
            for name in self.adapted.layers:
                for letter, value in zip("AB", self.pair(name), strict=True):
                    result[f"{stage}/{name}/{letter}"] = value.detach().clone()
            if self.variant != "pretrained":
                self.measure(rows.all)
            with torch.no_grad():
                for name, layer in self.adapted.layers.items():
                    a, b = self.pair(name)
                    layer.weight.add_(layer.scale * b @ a)
        return result

    def train(self, rows, penalised):
        settings = self.config.train
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=1e-2, weight_decay=0.01, eps=settings.eps
        )
        losses = []
        for step in range(3):
            batch = self.collator.train(rows.rows(step, 0, 1))
            logits = aligned_logits(self.adapted.module, batch, self.facts.seq2seq)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
            )
            losses.append(float(loss.detach()))
            if penalised:
                for name, layer in self.adapted.layers.items():
                    loss = loss + self.penalty(name, layer.scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    def penalty(self, name, scale):
        a, b = self.pair(name)
        memory = self.memory[name]
        if self.variant == "separate":
            (start_a, start_b), (of_a, of_b) = self.start[name], memory
            moved = (of_a * (a - start_a) ** 2).sum() + (of_b * (b - start_b) ** 2).sum()
            return self.strength / 2 * moved
        if self.variant == "rank1":  # the outer product of the margins of the dense F
            memory = memory.sum(1)[:, None] * memory.sum(0)[None] / memory.sum()
        return self.strength / 2 * (memory * (scale * b @ a) ** 2).sum()

    def measure(self, rows):
        self.adapted.module.eval()
        measure = self.of_factors if self.variant == "separate" else self.dense
        for name, fresh in measure(rows).items():
            old = self.memory.get(name)
            if old is None:
                self.memory[name] = fresh
            elif isinstance(fresh, tuple):
                self.memory[name] = tuple(x + y for x, y in zip(old, fresh, strict=True))
            else:
                self.memory[name] = self.gamma * old + fresh

    def of_factors(self, rows):
        names = list(self.adapted.layers)
        total = {name: [torch.zeros_like(p) for p in self.pair(name)] for name in names}
        for row in rows:
            flat = [p for name in names for p in self.pair(name)]
            gradients = iter(torch.autograd.grad(self.row_loss(row), flat))
            for name in names:
                for sums in total[name]:
                    sums += next(gradients) ** 2
        return {name: tuple(p / len(rows) for p in pair) for name, pair in total.items()}

    def dense(self, rows):
        weights = {n: la.weight.requires_grad_(True) for n, la in self.adapted.layers.items()}
        total = {name: torch.zeros_like(w) for name, w in weights.items()}
        for row in rows:
            gradients = torch.autograd.grad(self.row_loss(row), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += gradient.square()
        for weight in weights.values():
            weight.requires_grad_(False)
        return {name: value / len(rows) for name, value in total.items()}


def assert_same(got, expected, tolerance=1e-5):
    for a, b in zip(got["losses"], expected["losses"], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    for kind in {(k[0], k[-1]) for k, v in expected.items() if isinstance(v, torch.Tensor)}:
        keys = [k for k in sorted(expected) if (k[0], k[-1]) == kind]
        a, b = (torch.cat([r[k].flatten() for k in keys]) for r in (got, expected))
        assert float((a - b).norm() / b.norm()) <= tolerance, kind


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", list(VARIANTS))
def test_equals_an_autograd_loop(name, model, tmp_path):
    settings, strength = VARIANTS[name]
    got = run(tmp_path / "own", model, {"lambda_": strength, **settings})
    variant = {"decayed": "rank1"}.get(name, name)
    expected = Autograd(model, variant, strength, settings.get("gamma", 1.0)).run()
    assert_same(got, expected)
    # Control: without the penalty another run comes out.
    free = run(tmp_path / "free", model, method="inc_lora")
    last = next(k for k in free if k.startswith("2/") and k.endswith("/B"))
    assert float((got[last] - free[last]).norm() / free[last].norm()) > 1e-3


def test_without_a_fisher_it_is_inc_lora_to_the_bit(tmp_path):
    none = run(tmp_path / "none", "llama", {"penalty": "none"})
    free = run(tmp_path / "free", "llama", method="inc_lora")
    assert none["losses"] == free["losses"]
    assert none["bytes"] == 0
    for name, value in free.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(none[name], value), name


def test_the_first_task_is_free_of_the_pretrained_fisher(tmp_path):
    held = run(tmp_path / "held", "llama", {"fisher_at": "pretrained", "lambda_": 1e4})
    free = run(tmp_path / "free", "llama", method="inc_lora")
    assert held["losses"][:4] == free["losses"][:4]
    assert held["losses"][5] != free["losses"][5]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_cut_in_the_first_task_changes_no_bit(name, tmp_path, monkeypatch):
    settings, strength = VARIANTS[name]
    params = {
        **PLAIN,
        "model": "llama",
        "method": "ewc_lora",
        "settings": {"lambda_": strength, **settings},
        "every_steps": 1,
    }
    whole = cases.sequence(ALONE, tmp_path / "whole", **params)
    parts = toys.make_parts(ALONE, tmp_path / "cut", **params)
    runner = StageRunner(parts)
    save = runner._save

    def save_and_stop(stage, position):
        save(stage, position)
        if position.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    parts.recorder.close()
    again = cases.sequence(ALONE, tmp_path / "cut", **params)
    assert again["losses"] == whole["losses"]
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(again[key], value), key


def first_stage(folder, settings, model="llama", masked=False):
    parts = toys.make_parts(
        ALONE, folder, model=model, method="ewc_lora", settings=settings, **PLAIN
    )
    stage = StageRunner(parts)._stage(0)
    if masked:
        train = stage.collator.train

        def without_labels(rows, size=None):
            batch = train(rows, size)
            return dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORED))

        stage.collator = SimpleNamespace(train=without_labels)
    generator = torch.Generator().manual_seed(0)
    stage.write_factors(
        {
            name: (a, 0.1 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in initial_factors(parts.adapted, 0, 0).items()
        }
    )
    return parts.method, stage


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("settings", [*[s for s, _ in VARIANTS.values()], {"fisher": "per_batch"}])
def test_masked_labels_leave_no_fisher(settings, model, tmp_path):
    for masked in (False, True):
        method, stage = first_stage(tmp_path / str(masked), settings, model, masked)
        method.on_task_start(stage)
        method.on_task_end(stage)
        state = method.state_dict()
        assert len(state) >= len(stage.adapted.layers)
        for value in state.values():
            assert bool((value >= 0).all())
            assert bool(value.any()) is not masked


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("targets", "layers"), [("qv", (12, 4)), ("all_linear", (36, 14))])
@pytest.mark.parametrize("model", MODELS)
def test_hooks_see_the_gradient_of_a_trainable_weight(
    model, targets, layers, dtype, tolerance, tmp_path, monkeypatch
):
    def attach(base, config, scales=None):
        return AdaptedModel(base, AdapterConfig(rank=2, targets=targets), scales)

    monkeypatch.setattr(toys, "AdaptedModel", attach)
    _, stage = first_stage(tmp_path, {}, model)
    assert len(stage.adapted.layers) == layers[MODELS.index(model)]
    stage.adapted.module.to(dtype)
    seen = {name: torch.zeros_like(la.weight).double() for name, la in stage.adapted.layers.items()}

    def visit(layer, x, g):
        seen[layer.name] += torch.einsum("nto,nti->oi", g.double(), x.double())

    visit_gradients(stage, visit)
    weights = [layer.weight.requires_grad_(True) for layer in stage.adapted.layers.values()]
    loss = 0.0
    for row in stage.rows.all:
        batch = stage.collator.train([row], 1)
        loss = loss + row_losses(stage.logits(batch), batch.labels).sum()
    for got, expected in zip(seen.values(), torch.autograd.grad(loss, weights), strict=True):
        assert float((got - expected).norm() / expected.norm()) <= tolerance


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [({"fisher": "rank1"}, "per_sequence"), ({"fisher_at": "pretrained"}, "each_task")],
)
def test_ablations_that_exclude_each_other(more, said):
    with pytest.raises(ValueError, match=f"penalty: separate needs .*{said}"):
        EwcLoraConfig(penalty="separate", **more)


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty": "separate"},
        {"fisher": "rank1"},
        {"fisher": "per_batch"},
        {"fisher_at": "pretrained"},
        {"fisher_tokens": "mean"},
    ],
)
def test_state_of_another_variant_is_refused(settings, tmp_path):
    full, stage = first_stage(tmp_path / "full", {})
    full.on_task_end(stage)
    other, other_stage = first_stage(tmp_path / "other", settings)
    with pytest.raises(ConfigError, match="belong to a whole sequence"):
        other.load_state_dict(full.state_dict())
    other.on_task_start(other_stage)
    other.on_task_end(other_stage)
    with pytest.raises(ConfigError, match="belong to a whole sequence"):
        full.load_state_dict(other.state_dict())


def test_a_pretrained_fisher_cannot_come_late(tmp_path):
    method, stage = first_stage(tmp_path, {"fisher_at": "pretrained"})
    stage.index = 1
    with pytest.raises(MethodError, match="Start a new run"):
        method.on_task_start(stage)


def test_memory_of_the_fallback_is_small(tmp_path):
    sizes = {}
    for name in ("full_space", "rank1"):
        method, stage = first_stage(tmp_path / name, VARIANTS[name][0])
        method.on_task_end(stage)
        sizes[name] = method.state_bytes()
    linears = [layer.module.base_layer for layer in stage.adapted.layers.values()]
    assert sizes["full_space"] == sum(m.out_features * m.in_features * 4 for m in linears)
    assert sizes["rank1"] == sum((m.out_features + m.in_features) * 4 for m in linears)
