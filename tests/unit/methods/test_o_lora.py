"""O-LoRA's penalty against a loop over tasks, layers and rows; its runs against plain autograd."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline.config.library import recipes_folder
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.distributed.comm import Ranks, row_block
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods.o_lora import norms, overlap
from accrete.pipeline.models.lora import AdaptedModel, initial_factors
from accrete.pipeline.stage import aligned_logits
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
PLAIN = {"zero": None, "micro": 8, "method": "o_lora"}


def parts_of(folder, model="llama", **params):
    return toys.make_parts(ALONE, folder, **{**PLAIN, "model": model, **params})


def run(folder, model="llama", **params):
    return cases.sequence(ALONE, folder, **{**PLAIN, "model": model, "tasks": 3, **params})


def logged(folder, key):
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [e.get(key) for e in map(json.loads, lines) if e["event"] == "step"]


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_by_one(old, live):
    """sum_j |<a_j, a>| by three loops; `old` is a list of tasks, each a list of layers' A."""
    total = 0.0
    for task in old:
        for earlier, a in zip(task, live, strict=True):
            for left, right in itertools.product(earlier, a):
                total = total + (left * right).sum().abs()
    return total


# -- the penalty --------------------------------------------------------------------------------


def test_overlap_and_its_gradient_equal_a_loop_under_autograd():
    layers, tasks, rank, size = 3, 4, 2, 7
    old = [[numbers(rank, size, seed=9 * t + k) for k in range(layers)] for t in range(tasks)]
    live = [numbers(rank, size, seed=100 + k).requires_grad_() for k in range(layers)]
    expected = one_by_one(old, live)
    slopes = torch.autograd.grad(expected, live)
    stacked = torch.stack([torch.cat([task[k] for task in old]) for k in range(layers)])
    value, slope = overlap(stacked, torch.stack(live).detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(slope, torch.stack(slopes), rtol=1e-10, atol=1e-10)


def test_orthogonal_rows_cost_nothing():
    basis, _ = torch.linalg.qr(numbers(12, 12))
    value, _ = overlap(basis.T[None, :8], basis.T[None, 8:])
    assert float(value) <= 1e-10
    # Control: one row of the new A turned towards an old one.
    turned = basis.T[None, 8:].clone()
    turned[0, 0] += 0.5 * basis.T[3]
    assert float(overlap(basis.T[None, :8], turned)[0]) == pytest.approx(0.5, abs=1e-10)


@pytest.mark.parametrize("world", [2, 3, 5, 8, 30])
def test_row_shards_times_world_average_to_the_whole(world):
    old, live = numbers(2, 12, 9, seed=1), numbers(2, 3, 9, seed=2)
    value, slope = overlap(old, live)
    shards = [overlap(old[:, row_block(12, rank, world)], live) for rank in range(world)]
    torch.testing.assert_close(sum(v for v, _ in shards), value, rtol=1e-12, atol=0)
    averaged = sum(world * s for _, s in shards) / world
    torch.testing.assert_close(averaged, slope, rtol=1e-12, atol=1e-12)


def test_norms_equal_autograd_and_are_flat_at_zero():
    live = numbers(3, 4, 5).requires_grad_()
    expected = sum(torch.linalg.matrix_norm(matrix) for matrix in live)
    value, slope = norms(live.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, live)[0], rtol=1e-10, atol=0)
    assert not norms(torch.zeros(2, 3, 4))[1].any()


# -- a run --------------------------------------------------------------------------------------


def autograd_run(model, lambda_1, lambda_2):
    """Three tasks with the penalty inside the loss: no hooks, no closed form, no stacking."""
    config = toys.make_config(None, tasks=3)
    adapted = AdaptedModel(toys.base_model(model), config.adapter)
    parameters = adapted.parameters()
    facts = toys.facts(model)
    collator = toys.Collator(facts.seq2seq, toys.PAD, facts.decoder_start_id, toys.EOS)
    old, result = [], {"penalties": [], "losses": []}
    for stage in range(3):
        with torch.no_grad():
            for name, (a, b) in initial_factors(adapted, config.seed, stage).items():
                parameters[f"{name}.lora_A"].copy_(a)
                parameters[f"{name}.lora_B"].copy_(b)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=1e-2, weight_decay=0.01, eps=config.train.eps
        )
        for step in range(3):
            batch = collator.train(toys.ToyRows(stage, 21, 8).rows(step, 0, 1))
            logits = aligned_logits(adapted.module, batch, facts.seq2seq)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
            )
            result["losses"].append(float(loss.detach()))
            live = [parameters[layer.a] for layer in adapted.layers.values()]
            extra = lambda_1[stage] * one_by_one(old, live)
            for parameter in parameters.values() if lambda_2[stage] else ():
                extra = extra + lambda_2[stage] * parameter.norm()
            result["penalties"].append(float(torch.as_tensor(extra).detach()))
            optimizer.zero_grad()
            (loss + extra).backward()
            optimizer.step()
        old.append([parameters[layer.a].detach().clone() for layer in adapted.layers.values()])
        for layer in adapted.layers.values():
            a, b = parameters[layer.a].detach(), parameters[layer.b].detach()
            result[f"{stage}/{layer.name}/A"] = a.clone()
            result[f"{stage}/{layer.name}/B"] = b.clone()
            with torch.no_grad():
                layer.weight.add_(layer.scale * b @ a)
    return result


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("micro", [8, 2])
def test_a_run_equals_an_autograd_loop(tmp_path, model, lists, micro):
    lambda_1 = [0.0, 0.05, 0.1] if lists else [0.05] * 3
    lambda_2 = [0.02, 0.0, 0.05] if lists else [0.0] * 3
    settings = {"lambda_1": lambda_1, "lambda_2": lambda_2} if lists else {"lambda_1": 0.05}
    expected = autograd_run(model, lambda_1, lambda_2)
    got = run(tmp_path, model, settings=settings, micro=micro)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for kind in itertools.product("012", "AB"):
        names = [k for k in expected if k[0] == kind[0] and k[-1] == kind[1]]
        mine, theirs = (torch.cat([x[k].flatten() for k in names]) for x in (got, expected))
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5, kind
    # What the log calls the penalty is what autograd had in its loss.
    penalties = [p or 0.0 for p in logged(tmp_path, "penalty")]
    assert penalties == pytest.approx(expected["penalties"], rel=1e-5, abs=1e-9)


def test_the_log_says_how_much_of_the_gradient_is_the_penalty(tmp_path):
    run(tmp_path, settings={"lambda_1": 0.05})
    shares = logged(tmp_path, "penalty_share")
    assert shares[:3] == [None] * 3
    assert all(0.0 < share < 1.0 for share in shares[3:])


def test_the_penalty_drives_the_new_rows_apart(tmp_path):
    def left(name, strength):
        got = run(tmp_path / name, settings={"lambda_1": strength})
        layers = {k.split("/")[1] for k in got if re.match(r"\d/", k)}
        return sum(
            float((got[f"0/{n}/A"] @ got[f"2/{n}/A"].T).abs().sum())
            + float((got[f"1/{n}/A"] @ got[f"2/{n}/A"].T).abs().sum())
            for n in layers
        )

    assert left("pulled", 1.0) < 0.9 * left("free", 0.0)


def test_without_strength_it_is_inc_lora_to_the_bit(tmp_path):
    off = run(tmp_path / "off", settings={"lambda_1": 0.0})
    inc = run(tmp_path / "inc", method="inc_lora")
    assert off["losses"] == inc["losses"]
    for name, value in inc.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(off[name], value), name


# -- cost and state -----------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts every operation that reaches the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.name().split("::")[1].split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def operations(folder, model, tasks, lambda_2=0.0):
    """What one step's penalty launches after so many finished tasks."""
    settings = {"lambda_1": 0.5, "lambda_2": lambda_2}
    parts = parts_of(folder, model, settings=settings)
    stage = StageRunner(parts)._stage(1)
    for index in range(tasks):
        factors = initial_factors(parts.adapted, 3, index)
        parts.past.stages.append(factors)
    parts.method.on_task_start(stage)
    parts.method.before_step(stage)
    with Operations() as seen:
        parts.method.before_backward(stage, last=True)
    return seen.counts, parts


@pytest.mark.parametrize("model", MODELS)
def test_launches_do_not_grow_with_tasks(tmp_path, model):
    few, parts = operations(tmp_path / "few", model, 1)
    many, _ = operations(tmp_path / "many", model, 14)
    assert few == many
    layers = parts.adapted.layers.values()
    shapes = {layer.module.base_layer.in_features for layer in layers}
    # Two batched products per shape, none per layer or task.
    assert many["bmm"] == 2 * len(shapes) < 2 * len(layers)
    assert many["abs"] == many["sign"] == len(shapes)
    assert "mm" not in many


def test_launches_of_the_norms_do_not_grow_with_tasks(tmp_path):
    few, _ = operations(tmp_path / "few", "llama", 1, lambda_2=0.1)
    many, _ = operations(tmp_path / "many", "llama", 14, lambda_2=0.1)
    assert few == many


def test_only_the_last_micro_batch_of_a_step_pays(tmp_path):
    parts = parts_of(tmp_path, settings={"lambda_1": 0.5})
    stage = StageRunner(parts)._stage(1)
    parts.past.stages.append(initial_factors(parts.adapted, 3, 0))
    parts.method.on_task_start(stage)
    parts.method.before_backward(stage, last=False)
    assert not parts.method.hooks.added
    parts.method.before_backward(stage, last=True)
    assert set(parts.method.hooks.added) == {x.a for x in parts.adapted.layers.values()}


@pytest.mark.parametrize("past", ["fold", "branch"])
def test_it_keeps_one_copy_of_old_rows_and_saves_none(tmp_path, past):
    parts = parts_of(tmp_path, settings={"lambda_1": 0.5}, tasks=3, past=past)
    StageRunner(parts).run()
    parts.recorder.close()
    rank = parts.config.adapter.rank
    inputs = [layer.module.base_layer.in_features for layer in parts.adapted.layers.values()]
    assert parts.method.state_bytes() == 3 * rank * sum(inputs) * 4
    assert parts.method.state_dict() == {}
    assert not parts.method.hooks.attached


# -- settings -----------------------------------------------------------------------------------


def test_a_list_must_fit_the_sequence():
    overrides = ["method=o_lora", "method.lambda_1=[0.5, 0.5, 0.5]", "method.lambda_2=[0.1, 0]"]
    with pytest.raises(ConfigError) as caught:
        load_recipe("standard_cl/order1", overrides)
    text = str(caught.value)
    assert "override method.lambda_1=[0.5, 0.5, 0.5]: method.lambda_1" in text
    assert "3 values were given for a sequence of 4 tasks" in text
    assert "2 values were given" in text
    overrides[1:] = ["method.lambda_1=[0.5, 0.5, 0.5, 0.5]"]
    assert len(load_recipe("standard_cl/order1", overrides).config.method.lambda_1) == 4


def test_the_published_lists_of_the_recipe_load():
    text = (recipes_folder() / "methods" / "o_lora.yaml").read_text()
    lists = re.findall(r'#\s+(method\.lambda_\d=)"(\[.*\])"', text)
    config = load_recipe("long_sequence/order6", ["method=o_lora", *(k + v for k, v in lists)])
    method = config.config.method
    assert len(method.lambda_1) == len(method.lambda_2) == len(config.config.tasks) == 15
    assert method.lambda_1[1:9] == [0.5] * 8
    assert method.lambda_1[9:] == [5.0] * 6
    assert max(method.lambda_2) == 0.3
