"""EWC on full weights: penalty, Fisher and anchors against autograd and closed solutions."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.distributed.comm import Ranks, row_block
from accrete.pipeline.distributed.engine import OptimizerSettings
from accrete.pipeline.distributed.plain import PlainEngine
from accrete.pipeline.errors import ConfigError, DistributedError
from accrete.pipeline.methods import ewc
from accrete.pipeline.methods.ewc import Ewc, EwcConfig
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")
PLAIN = {"zero": None, "micro": 8}
SHAPES = {"matrix": (5, 3), "vector": (4,), "table": (7, 2, 2), "scalar": ()}


class Weights(nn.Module):
    """Parameters of every number of dimensions, in fp64."""

    def __init__(self, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=g, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self):
        return sum((p.sin() * (i + 1)).sum() for i, p in enumerate(self.parameters()))


def draw(seed, positive=False):
    g = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()}
    return {n: v.square() if positive else v for n, v in drawn.items()}


def setup(module, method, rank=0, world=1, accumulation=1):
    engine = PlainEngine(
        module,
        dict(module.named_parameters()),
        OptimizerSettings(),
        accumulation=accumulation,
        device=CPU,
    )
    method.bind(rank, world, CPU)
    return SimpleNamespace(engine=engine, notes={})


def own_rows(value, rank=0, world=1):
    rows = value.view(1) if value.dim() == 0 else value
    return rows[row_block(len(rows), rank, world)].clone()


def step_gradient(stage, method, loss, accumulation=1):
    method.on_task_start(stage)
    method.before_step(stage)
    for number in range(1, accumulation + 1):
        last = number == accumulation
        value = loss()
        method.before_backward(stage, last)
        stage.engine.backward(value, last)
    return {name: stage.engine.gradient(name) for name in stage.engine.parameters}


@pytest.mark.parametrize("elements", [ewc.BLOCK_ELEMENTS, 8, 1])
def test_the_pull_is_the_gradient_of_the_penalty(monkeypatch, elements):
    """fp64, through the hooks, with two micro-batches: it counts once a step, in any parts."""
    monkeypatch.setattr(ewc, "BLOCK_ELEMENTS", elements)
    fishers, anchors = draw(1, positive=True), draw(2)
    method, module = Ewc(EwcConfig(lambda_=7.0)), Weights(3)
    stage = setup(module, method, accumulation=2)
    for name in SHAPES:
        method.remember(name, own_rows(fishers[name]), own_rows(anchors[name]))
    got = step_gradient(stage, method, module, accumulation=2)
    copy = Weights(3)
    penalty = sum(
        3.5 * (fishers[n] * (p - anchors[n]).square()).sum() for n, p in copy.named_parameters()
    )
    (copy() + penalty).backward()
    for name, parameter in copy.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(method.step_sums()["penalty"], penalty.detach().float())
    assert method.step_sums()["penalty"] > 0


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_mean_over_ranks_is_the_whole_pull(world):
    fishers, anchors = draw(1, positive=True), draw(2)
    total: dict[str, torch.Tensor] = {}
    values = 0.0
    for rank in range(world):
        method, module = Ewc(EwcConfig(lambda_=7.0)), Weights(3)
        stage = setup(module, method, rank, world)
        for name in SHAPES:
            parts = (own_rows(tensors[name], rank, world) for tensors in (fishers, anchors))
            method.remember(name, *parts)
        for name, gradient in step_gradient(stage, method, module).items():
            total[name] = total.get(name, 0) + gradient / world
        values += float(method.step_sums()["penalty"])
    copy = Weights(3)
    penalty = sum(
        3.5 * (fishers[n] * (p - anchors[n]).square()).sum() for n, p in copy.named_parameters()
    )
    (copy() + penalty).backward()
    for name, parameter in copy.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-12, atol=1e-12)
    assert values == pytest.approx(float(penalty.detach()), rel=1e-5)


def test_a_partitioned_weight_is_refused_and_not_passed_over():
    method, module = Ewc(EwcConfig()), Weights(3)
    setup(module, method)
    parameter = nn.Parameter(torch.zeros(0, dtype=torch.float64))
    method.remember("matrix", torch.ones(5, 3), torch.ones(5, 3))
    method._last = True
    with pytest.raises(DistributedError, match="zero_stage=2"):
        method._pull("matrix", parameter)(torch.ones(5, 3))


# -- the Fisher ----------------------------------------------------------------------------------


def measured(folder, model, rows=None, micro=8, **settings):
    """F of the first task at untrained weights, as the method finds it."""
    parts = toys.make_parts(
        ALONE, folder, model=model, zero=None, micro=micro, method="ewc", settings=settings
    )
    if rows is not None:
        source = toys.ToyRows(0, len(rows), 8)
        source.all = rows
        parts.open_rows = lambda task, index: source
    runner = StageRunner(parts)
    before = {name: p.detach().clone() for name, p in parts.engine.parameters.items()}
    parts.method.on_task_end(runner._stage(0))
    parts.recorder.close()
    for name, parameter in parts.engine.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert torch.equal(parts.method.anchors[name], before[name])
    return parts.method.fisher


def expected_fisher(model_kind, rows, token_mean=False):
    """Squares of each row's own gradient, with transformers' own loss and padding-free inputs."""
    model = toys.base_model(model_kind)
    model.requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        loss = toys.own_loss(model, row, model_kind)
        (loss / len(row.answer) if token_mean else loss).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.square() / len(rows)
    return total


def assert_same_fisher(got, expected, tolerance=1e-4):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).norm()) <= tolerance * float(value.norm()), name
        assert got[name].min() >= 0


@pytest.mark.parametrize("tokens", ["sum", "mean"])
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_fisher_equals_autograd_of_every_weight(tmp_path, model, tokens):
    rows = toys.ToyRows(0, 21, 8).all
    got = measured(tmp_path, model, fisher_tokens=tokens, fisher_rows=11)
    assert_same_fisher(got, expected_fisher(model, toys.spread(rows, 11), tokens == "mean"))
    whole = measured(tmp_path / "whole", model, fisher_tokens=tokens, fisher_rows=None)
    assert_same_fisher(whole, expected_fisher(model, rows, tokens == "mean"))
    # Control: squares of a batch's mean gradient are something else.
    model_copy = toys.base_model(model).requires_grad_(True)
    (sum(toys.own_loss(model_copy, row, model) for row in rows) / len(rows)).backward()
    name = next(iter(got))
    batched = dict(model_copy.named_parameters())[name].grad.square()
    assert float((batched - whole[name]).norm()) > 0.1 * float(whole[name].norm())


def test_fisher_depends_neither_on_order_nor_on_micro_batches(tmp_path):
    rows = toys.ToyRows(0, 21, 8).all
    mixed = random.Random(1).sample(rows, len(rows))
    assert_same_fisher(
        measured(tmp_path / "a", "t5", mixed, micro=2), measured(tmp_path / "b", "t5", rows)
    )


def test_rows_without_labels_have_no_fisher(tmp_path):
    rows = [EncodedRow(id=str(i), prompt=[5, 6, 1], answer=[], index=i) for i in range(5)]
    for model in ("t5", "llama"):
        got = measured(tmp_path / model, model, rows)
        assert all(torch.equal(value, torch.zeros_like(value)) for value in got.values())


# -- anchors -------------------------------------------------------------------------------------


def quadratics(count):
    """Losses 1/2 sum h (w - u)^2, one per task: their Fisher is taken to be h itself."""
    return [(draw(10 + t, positive=True), draw(20 + t)) for t in range(count)]


def solve(method, stage, h, u):
    """The minimum of task loss plus penalty, from the method's own gradient: Newton's one step."""
    parameters = stage.engine.parameters

    def loss():
        return sum((h[n] * (p - u[n]).square()).sum() / 2 for n, p in parameters.items())

    gradient = step_gradient(stage, method, loss)
    for name, p in parameters.items():
        curvature = h[name].clone()
        if name in method.fisher:
            curvature += method.settings.lambda_ * method.fisher[name].view(p.shape)
        p.data -= gradient[name] / curvature
        p.grad = None


def joint_optimum(tasks):
    return {
        n: sum(h[n] * u[n] for h, u in tasks) / sum(h[n] for h, _ in tasks) for n in tasks[0][0]
    }


@pytest.mark.parametrize("anchor", ["latest", "every"])
def test_quadratics_reach_the_joint_optimum_after_every_task(anchor):
    tasks = quadratics(4)
    method, module = Ewc(EwcConfig(lambda_=1.0, anchor=anchor)), Weights(3)
    stage = setup(module, method)
    for number, (h, u) in enumerate(tasks, start=1):
        solve(method, stage, h, u)
        for name, p in module.named_parameters():
            method.remember(name, own_rows(h[name]), own_rows(p.detach()))
        expected = joint_optimum(tasks[:number])
        close = [
            torch.allclose(p, expected[n], rtol=1e-10, atol=1e-12)
            for n, p in module.named_parameters()
        ]
        # Control: one penalty per task counts early tasks twice from the third on (Huszar, 2018).
        assert all(close) == (anchor == "latest" or number <= 2)


def test_forgetting_of_two_quadratics_is_the_known_formula():
    (h1, u1), (h2, u2) = quadratics(2)
    strength = 3.0
    method, module = Ewc(EwcConfig(lambda_=strength)), Weights(3)
    stage = setup(module, method)
    solve(method, stage, h1, u1)
    for name, p in module.named_parameters():
        method.remember(name, own_rows(h1[name]), own_rows(p.detach()))
    solve(method, stage, h2, u2)
    forgotten = sum(
        float((h1[n] * (p.detach() - u1[n]).square()).sum()) / 2
        for n, p in module.named_parameters()
    )
    formula = sum(
        float((h1[n] * (h2[n] / (h2[n] + strength * h1[n]) * (u2[n] - u1[n])).square()).sum()) / 2
        for n in h1
    )
    assert forgotten == pytest.approx(formula, rel=1e-8)


def test_every_is_the_sum_of_one_penalty_per_task():
    tasks = quadratics(3)
    method, module = Ewc(EwcConfig(lambda_=2.0, anchor="every", gamma=1.0)), Weights(3)
    stage = setup(module, method)
    tasks[1][0]["matrix"].zero_()  # a task to which nothing there matters
    for h, u in tasks:
        for name in SHAPES:
            method.remember(name, own_rows(h[name]), own_rows(u[name]))
    got = step_gradient(stage, method, lambda: 0.0 * module())
    for name, p in module.named_parameters():
        expected = sum(2.0 * h[name] * (p.detach() - u[name]) for h, u in tasks)
        torch.testing.assert_close(got[name], expected, rtol=1e-10, atol=1e-12)


def test_gamma_lets_the_past_fade():
    method = Ewc(EwcConfig(gamma=0.25))
    for value in (1.0, 2.0, 4.0):
        method.remember("w", torch.full((3,), value), torch.full((3,), -value))
    torch.testing.assert_close(method.fisher["w"], torch.full((3,), 4 + 0.25 * (2 + 0.25)))
    torch.testing.assert_close(method.anchors["w"], torch.full((3,), -4.0))


# -- whole runs ----------------------------------------------------------------------------------


def run(folder, **more):
    return cases.sequence(ALONE, folder, **{**PLAIN, "model": "llama", "tasks": 3, **more})


def test_lambda_zero_is_full_fine_tuning_bit_for_bit(tmp_path):
    off = run(tmp_path / "off", method="ewc", settings={"lambda_": 0.0})
    full = run(tmp_path / "full", method="full")
    on = run(tmp_path / "on", method="ewc", settings={"lambda_": 30.0})
    assert off["losses"] == full["losses"] != on["losses"]
    weights = [name for name in full if name.endswith("/W")]
    assert len(weights) == 3 * 21
    assert all(torch.equal(off[name], full[name]) for name in weights)


def test_the_penalty_starts_at_zero_and_holds_the_weights_back(tmp_path):
    far = {}
    for strength in (1.0, 1e3):
        folder = tmp_path / str(strength)
        got = run(folder, method="ewc", settings={"lambda_": strength})
        lines = map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())
        penalties = [e.get("penalty") for e in lines if e["event"] == "step"]
        assert penalties[:3] == [None] * 3
        assert penalties[3] == penalties[6] == 0.0
        assert all(value > 0 for value in (*penalties[4:6], *penalties[7:]))
        moved = 0.0
        for name in (n for n in got if n.startswith("0/")):
            fisher = got[f"state/fisher/{name[2:-2]}"]
            moved += float((fisher * (got[f"2/{name[2:]}"] - got[name]).square()).sum())
        far[strength] = moved
    assert far[1e3] < 0.5 * far[1.0]


def test_state_is_whole_and_each_rank_keeps_its_rows():
    method, module = Ewc(EwcConfig()), Weights(3)
    setup(module, method)
    values = draw(5, positive=True)
    for name in SHAPES:
        method._shapes[name] = values[name].shape
        method.remember(name, own_rows(values[name]), own_rows(-values[name]))
    saved = method.state_dict()
    assert all(torch.equal(saved[f"fisher/{n}"], v) for n, v in values.items())
    assert all(torch.equal(saved[f"anchor/{n}"], -v) for n, v in values.items())
    ranks = []
    for rank in range(3):
        ranks.append(Ewc(EwcConfig()))
        ranks[-1].bind(rank, 3, CPU)
        ranks[-1].load_state_dict(saved)
        for name, value in values.items():
            assert torch.equal(ranks[-1].fisher[name], own_rows(value, rank, 3))
            assert torch.equal(ranks[-1].anchors[name], own_rows(-value, rank, 3))
    assert sum(part.state_bytes() for part in ranks) == method.state_bytes()
    assert max(part.state_bytes() for part in ranks) < 0.45 * method.state_bytes()


@pytest.mark.parametrize("settings", [{"fisher_tokens": "mean"}, {"anchor": "every"}])
def test_state_of_other_settings_is_refused(settings):
    def filled(**chosen):
        method, module = Ewc(EwcConfig(**chosen)), Weights(3)
        setup(module, method)
        for name, value in draw(5, positive=True).items():
            method._shapes[name] = value.shape
            method.remember(name, own_rows(value), own_rows(-value))
        return method

    saved, other = filled().state_dict(), filled(**settings)
    with pytest.raises(ConfigError, match="belong to a whole sequence"):
        Ewc(EwcConfig(**settings)).load_state_dict(saved)
    with pytest.raises(ConfigError, match="belong to a whole sequence"):
        Ewc(EwcConfig()).load_state_dict(other.state_dict())
    again = Ewc(EwcConfig(**settings))
    again.load_state_dict(other.state_dict())
    assert again.fisher.keys() == again.anchors.keys() == other.fisher.keys()
