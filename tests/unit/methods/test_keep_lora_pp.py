"""KeepLoRA++'s ramp: its values, what it multiplies, and that peft reads it back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.launch.export import _write_adapter
from accrete.pipeline.checkpoint import read_manifest
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods.keep_lora_pp import KeepLoraPp, KeepLoraPpConfig
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import AdaptedModel, load_factors
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
EPS = {"eps_w": 0.2, "eps_f": 0.6}


def scales(names, **settings):
    return KeepLoraPp(KeepLoraPpConfig(**settings)).layer_scales(names)


def run(folder, model, method="keep_lora_pp", **settings):
    parts = toys.make_parts(
        ALONE,
        folder,
        model=model,
        zero=None,
        micro=8,
        method=method,
        settings={**EPS, **settings},
    )
    runner = StageRunner(parts)
    runner.run()
    parts.recorder.close()
    return runner


# -- values ---------------------------------------------------------------------------------------


def test_the_ramp_is_linear_from_shallow_to_deep():
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(16) for x in "qv"]
    found = scales(names)
    for i in range(16):
        for x in "qv":
            scale = found[f"model.layers.{i}.self_attn.{x}_proj"]
            assert scale == pytest.approx(0.2 + 0.8 * i / 15, rel=1e-12)
    assert found[names[0]] == 0.2
    assert found[names[-1]] == 1.0


def test_encoder_and_decoder_have_a_ramp_each_or_share_one():
    names = [
        f"{s}.block.{i}.layer.0.SelfAttention.q" for s in ("encoder", "decoder") for i in (0, 1, 2)
    ]
    assert list(scales(names).values()) == pytest.approx([0.2, 0.6, 1.0] * 2)
    joined = scales(names, ramp="joined", first_scale=0.5)
    assert list(joined.values()) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_it_counts_adapted_layers_alone():
    """Block 7 is the first of the adapted ones and 11 the last; ten and more sort as numbers."""
    found = scales([f"h.{i}.attn" for i in (7, 9, 11)])
    assert list(found.values()) == pytest.approx([0.2, 0.6, 1.0])
    assert scales(["h.7.attn", "lm_head"]) == {"h.7.attn": 1.0}


# -- what it multiplies ---------------------------------------------------------------------------


def random_factors(adapted):
    g = torch.Generator().manual_seed(1)
    for layer in adapted.layers.values():
        for factor in (layer.module.lora_A, layer.module.lora_B):
            weight = factor["default"].weight
            weight.data = 0.2 * torch.randn(weight.shape, generator=g)


@pytest.mark.parametrize("model", MODELS)
def test_forward_delta_is_merged_delta_is_what_the_layer_says(model):
    method = KeepLoraPp(KeepLoraPpConfig())
    adapted = AdaptedModel(
        toys.base_model(model), AdapterConfig(rank=5, alpha=10.0), method.layer_scales
    )
    random_factors(adapted)
    expected = method.layer_scales(list(adapted.layers))
    assert {0.2, 1.0} == set(expected.values())
    for name, layer in adapted.layers.items():
        module = layer.module
        assert layer.scale == pytest.approx(2.0 * expected[name], rel=1e-12)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        delta = layer.scale * b @ a
        x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(
            module(x) - module.base_layer(x), x @ delta.T, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(module.get_delta_weight("default"), delta, rtol=1e-6, atol=1e-6)
    before = {name: layer.weight.detach().clone() for name, layer in adapted.layers.items()}
    deltas = {
        name: layer.scale
        * layer.module.lora_B["default"].weight.detach()
        @ layer.module.lora_A["default"].weight.detach()
        for name, layer in adapted.layers.items()
    }
    merged = adapted.merged()
    for name, weight in before.items():
        got = merged.get_submodule(name).weight.detach() - weight
        assert float((got - deltas[name]).norm() / deltas[name].norm()) <= 1e-6


@pytest.mark.parametrize("method", ["inc_lora", "keep_lora_pp"])
def test_another_method_goes_on_from_the_same_model(tmp_path, method):
    """As after a branch: the shared tasks keep their ramp, whatever the new method's is."""
    runner = run(tmp_path, "llama")
    settings = {"first_scale": 0.7} if method == "keep_lora_pp" else {}
    parts = toys.make_parts(
        ALONE, tmp_path, model="llama", zero=None, micro=8, method=method, settings=settings
    )
    other = StageRunner(parts)
    other._load_past(read_manifest(parts.run.checkpoints / "stage-1"))
    assert len(parts.past.stages) == 2
    for name, layer in runner.parts.adapted.layers.items():
        assert torch.equal(parts.adapted.layers[name].weight, layer.weight)
    # Control: their own layers are scaled otherwise.
    assert any(
        parts.adapted.layers[n].scale != la.scale for n, la in runner.parts.adapted.layers.items()
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_past_holds_the_scaled_deltas(tmp_path, model):
    runner = run(tmp_path, model)
    base = toys.base_model(model)
    for name, layer in runner.parts.adapted.layers.items():
        total = torch.zeros_like(layer.weight)
        for stage in (0, 1):
            a, b = load_factors(runner.parts.run.stage(stage).adapter)[name]
            total += layer.scale * b @ a
        moved = layer.weight - base.get_submodule(name).weight
        torch.testing.assert_close(moved, total, rtol=1e-4, atol=1e-6)
        held = runner.parts.past.delta(layer)
        assert float((held - total).norm() / total.norm()) <= 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_a_flat_ramp_is_keep_lora_to_the_bit(tmp_path, model):
    flat = run(tmp_path / "flat", model, first_scale=1.0)
    plain = run(tmp_path / "plain", model, method="keep_lora")
    ramped = run(tmp_path / "ramped", model)
    for stage in (0, 1):
        folders = [r.parts.run.stage(stage).adapter for r in (flat, plain, ramped)]
        one, two, three = map(load_factors, folders)
        for name, (a, b) in one.items():
            assert torch.equal(a, two[name][0])
            assert torch.equal(b, two[name][1])
            assert not torch.equal(b, three[name][1])


# -- saved and read back --------------------------------------------------------------------------


def logits(module, runner, model):
    batch = runner.parts.collator.train(toys.ToyRows(5, 4, 4).all)
    with torch.no_grad():
        return module.eval()(**batch.inputs).logits


@pytest.mark.parametrize("model", MODELS)
def test_peft_reads_a_stage_s_adapter_with_its_scales(tmp_path, model):
    runner = run(tmp_path, model)
    adapted, folder = runner.parts.adapted, runner.parts.run.stage(0).adapter
    base = toys.base_model(model)
    with torch.no_grad():
        for name, (a, b) in load_factors(folder).items():
            base.get_submodule(name).weight += adapted.layers[name].scale * b @ a
    expected = logits(base, runner, model)
    read = PeftModel.from_pretrained(toys.base_model(model), str(folder))
    found = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in read.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == {name: layer.scale for name, layer in adapted.layers.items()}
    got = logits(read, runner, model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # Control: the folder's own scales matter.
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(config["alpha_pattern"]) == len(found)
    config["alpha_pattern"] = {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    flat = PeftModel.from_pretrained(toys.base_model(model), str(folder))
    assert float((logits(flat, runner, model) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_an_exported_adapter_is_scaled_once(tmp_path, model):
    """All tasks' ranks side by side, with the scale inside B."""
    runner = run(tmp_path, model)
    expected = logits(runner.parts.adapted.module, runner, model)
    runner.opened = 1
    out = tmp_path / "adapter"
    _write_adapter(runner, out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == 10
    read = PeftModel.from_pretrained(toys.base_model(model), str(out))
    torch.testing.assert_close(logits(read, runner, model), expected, rtol=1e-5, atol=1e-5)
    base = logits(toys.base_model(model), runner, model)
    assert float((base - expected).abs().max()) > 1e-2
