"""What `visit_inputs` shows: every real token of every distinct input, once, and nothing else."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.pipeline.data.collate import Batch
from accrete.pipeline.distributed.comm import Ranks, owners_of
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import AdaptedModel
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.statistics import input_names, visit_inputs

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
TARGETS = {"t5": ["q", "k", "v", "o", "wi_0"], "llama": "all_linear"}


@pytest.fixture
def make_stage(tmp_path, monkeypatch):
    """Stages of toy models with more layers adapted than q and v."""

    def make(model, micro=8, targets=True):
        def attach(base, config, scales=None):
            wanted = TARGETS[model] if targets else "qv"
            return AdaptedModel(base, AdapterConfig(rank=2, targets=wanted), scales)

        with monkeypatch.context() as patch:
            patch.setattr(toys, "AdaptedModel", attach)
            folder = tmp_path / f"{model}{micro}{targets}"
            parts = toys.make_parts(ALONE, folder, model=model, zero=None, micro=micro)
        return StageRunner(parts)._stage(0)

    return make


def covariances(stage, **settings):
    """Input -> (sum of x x^T, tokens)."""
    found = {}

    def visit(name, x):
        total, tokens = found.get(name, (0.0, 0))
        found[name] = (total + x.double().T @ x.double(), tokens + len(x))

    count = visit_inputs(stage, visit, **settings)
    return found, count


def captured(stage, rows):
    """Layer -> all its inputs [tokens, d] over rows, one row at a time and so without padding."""
    seen = {name: [] for name in stage.adapted.layers}
    handles = [
        layer.module.base_layer.register_forward_hook(
            lambda module, arguments, output, name=name: seen[name].append(arguments[0][0].numpy())
        )
        for name, layer in stage.adapted.layers.items()
    ]
    with torch.no_grad():
        for row in rows:
            batch = stage.collator.train([row])
            stage.adapted.base(**batch.inputs)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("rows", [None, 13])
@pytest.mark.parametrize("model", MODELS)
def test_covariances_are_those_of_the_rows_one_by_one(make_stage, model, rows):
    stage = make_stage(model)
    found, count = covariances(stage, max_rows=rows)
    assert count == (rows or stage.rows.num_rows)
    expected = captured(stage, toys.spread(stage.rows.all, count))
    names = input_names(stage)
    assert set(found) == set(names.values())
    assert set(names) == set(expected)
    for layer, x in expected.items():
        total, tokens = found[names[layer]]
        assert tokens == len(x), layer
        wide = x.astype(np.float64)
        np.testing.assert_allclose(total, wide.T @ wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_batching_does_not_matter(make_stage, model):
    """21 rows in batches of 8 leave a last batch of 5: with micro-batches of 1, 2 and 3 rows some
    micro-batches of it hold a padding row alone."""
    whole, _ = covariances(make_stage(model, 8))
    for micro in (1, 2, 3):
        parts, _ = covariances(make_stage(model, micro))
        for name, (total, tokens) in whole.items():
            assert parts[name][1] == tokens, (micro, name)
            torch.testing.assert_close(parts[name][0], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_longer_padding_does_not_matter(make_stage, model):
    stage = make_stage(model)
    whole, _ = covariances(stage)
    with padded(stage, masked=True):
        longer, _ = covariances(stage)
    for name, (total, tokens) in whole.items():
        assert longer[name][1] == tokens
        torch.testing.assert_close(longer[name][0], total, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_without_the_mask_padding_would_count(make_stage, model):
    """Control: the same longer rows, taken for real tokens, change counts and covariances."""
    stage = make_stage(model)
    whole, _ = covariances(stage)
    with padded(stage, masked=False):
        wrong, _ = covariances(stage)
    name = next(iter(input_names(stage).values()))
    assert wrong[name][1] > whole[name][1]
    assert float((wrong[name][0] - whole[name][0]).norm() / whole[name][0].norm()) > 0.1


@contextmanager
def padded(stage, masked):
    """The stage's batches with three more columns of padding, masked out or not."""
    train = stage.collator.train

    def longer(rows, num_rows=None) -> Batch:
        batch = train(rows, num_rows)
        inputs = dict(batch.inputs)
        left = "decoder_input_ids" not in inputs
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in inputs:
                more = torch.zeros(len(inputs[name]), 3, dtype=torch.long)
                pair = [more, inputs[name]] if left else [inputs[name], more]
                inputs[name] = torch.cat(pair, 1)
        if not masked:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return replace(batch, inputs=inputs)

    stage.collator.train = longer
    try:
        yield
    finally:
        del stage.collator.train


# -- who shares an input --------------------------------------------------------------------------


def test_layers_of_an_encoder_decoder(make_stage):
    names = input_names(make_stage("t5"))
    for block in (0, 1):
        for stack in ("encoder", "decoder"):
            place = f"{stack}.block.{block}.layer.0.SelfAttention"
            assert names[f"{place}.q"] == names[f"{place}.k"] == names[f"{place}.v"] == f"{place}.q"
            assert names[f"{place}.o"] == f"{place}.o"
        cross = f"decoder.block.{block}.layer.1.EncDecAttention"
        assert names[f"{cross}.q"] == f"{cross}.q"
        # All cross-attentions read the encoder's output.
        shared = "decoder.block.0.layer.1.EncDecAttention.k"
        assert names[f"{cross}.k"] == names[f"{cross}.v"] == shared
    # Per encoder block qkv, o and wi; per decoder block also cross-q and cross-o; the shared one.
    assert len(set(names.values())) == 2 * 3 + 2 * 5 + 1


def test_layers_of_a_decoder(make_stage):
    names = input_names(make_stage("llama"))
    for block in (0, 1):
        place = f"model.layers.{block}"
        first = f"{place}.self_attn.q_proj"
        assert {names[f"{place}.self_attn.{x}_proj"] for x in "qkv"} == {first}
        assert names[f"{place}.mlp.up_proj"] == names[f"{place}.mlp.gate_proj"]
        for alone in ("self_attn.o_proj", "mlp.down_proj"):
            assert names[f"{place}.{alone}"] == f"{place}.{alone}"
    assert len(set(names.values())) == 2 * 4


@pytest.mark.parametrize("model", MODELS)
def test_a_shared_input_is_shown_once(make_stage, model):
    stage = make_stage(model, targets=False)
    names = input_names(stage)
    calls = []
    visit_inputs(stage, lambda name, x: calls.append(name), max_rows=8)
    assert len(calls) == len(set(calls)) == len(set(names.values())) < len(names)


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_left_as_it_was(make_stage, model):
    stage = make_stage(model)
    module = stage.engine.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for training in (True, False):
        module.train(training)
        visit_inputs(stage, lambda name, x: None, max_rows=3)
        assert module.training is training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


def test_owners_share_the_work_of_the_decompositions():
    """Two blocks of a decoder: in turn, both down-projections would fall to the second rank."""
    block = {"q": 2048, "o": 2048, "gate": 2048, "down": 8192}
    sizes = {f"{number}.{name}": size for number in (0, 1) for name, size in block.items()}
    owners = owners_of(sizes, 2)
    assert list(owners) == list(sizes)
    assert {owners["0.down"], owners["1.down"]} == {0, 1}
    assert sorted(owners.values()) == [0] * 4 + [1] * 4
    assert owners_of(dict.fromkeys("abcde", 7), 3) == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1}
    assert set(owners_of(sizes, 1).values()) == {0}
