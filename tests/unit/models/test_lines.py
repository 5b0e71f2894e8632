"""LiNeS: what is merged, saved and scored is the trained update times its block's scale."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods.base import Method
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lines import block_of, depth_scales
from accrete.pipeline.models.lora import AdaptedModel, load_factors
from accrete.pipeline.stage import aligned_logits
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}


def t5(encoder, decoder):
    config = T5Config(vocab_size=16, num_layers=encoder, num_decoder_layers=decoder, **SMALL)
    return T5ForConditionalGeneration(config)


def llama(blocks):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def scales(model, shallowest, targets="qv"):
    return depth_scales(AdaptedModel(model, AdapterConfig(rank=2, targets=targets)), shallowest)


def test_a_decoder_has_one_ramp():
    found = scales(llama(5), 0.2)
    for block, scale in enumerate([0.2, 0.4, 0.6, 0.8, 1.0]):
        for leaf in ("q_proj", "v_proj"):
            assert found.pop(f"model.layers.{block}.self_attn.{leaf}") == pytest.approx(scale)
    assert not found


def test_encoder_and_decoder_have_a_ramp_each():
    found = scales(t5(3, 2), 0.4)
    for name, scale in found.items():
        stack, block = name.split(".")[0], int(name.split(".")[2])
        ramp = {"encoder": [0.4, 0.7, 1.0], "decoder": [0.4, 1.0]}[stack]
        assert scale == pytest.approx(ramp[block]), name
    # Self-attention in both, cross-attention in the decoder; query and value.
    assert len(found) == 3 * 2 + 2 * 4


def test_one_block_and_layers_outside_blocks():
    assert set(scales(llama(1), 0.2).values()) == {1.0}
    found = scales(llama(3), 0.2, ["q_proj", "lm_head"])
    assert found["lm_head"] == 0.2
    assert block_of(llama(3), "lm_head") is None
    assert block_of(llama(3), "model.layers.2.mlp.up_proj") == ("model.layers", 2, 3)


def run(folder, lines, model="llama", method="inc_lora", past="fold", **more):
    parts = toys.make_parts(
        ALONE, folder, model=model, zero=None, micro=8, method=method, tasks=2, past=past, **more
    )
    adapter = dataclasses.replace(parts.config.adapter, lines=lines)
    parts.config = dataclasses.replace(parts.config, adapter=adapter)
    trained = {}
    finish = StageRunner._consolidated

    class Watched(StageRunner):
        def _consolidated(self, stage):
            trained[stage.index] = stage.factors()
            return finish(self, stage)

    return parts, Watched(parts), trained


RAMP = {"0": 0.25, "1": 1.0}  # both toy models have two blocks in a stack


def block(name):
    return name.split(".")[2]


@pytest.mark.parametrize("past", ["fold", "branch"])
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_merged_is_scale_times_trained(tmp_path, model, past):
    parts, runner, trained = run(tmp_path, 0.25, model, past=past)
    at_end = {}
    parts.method.on_task_end = lambda stage: at_end.update({stage.index: stage.factors()})
    runner.run()
    original = toys.base_model(model).state_dict()
    merged = dict(original)
    for index in range(2):
        saved = load_factors(parts.run.stage(index).adapter)
        for name, (a, b) in trained[index].items():
            scale = RAMP[block(name)]
            assert torch.equal(saved[name][0], a)
            assert torch.equal(saved[name][1], b * scale)
            # A method measures the model that goes on.
            assert torch.equal(at_end[index][name][1], b * scale)
            assert torch.equal(parts.past.stages[index][name][1], b * scale)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + 2.0 * scale * (b @ a)
    for name, layer in parts.adapted.layers.items():
        expected = merged[f"{name}.weight"] - original[f"{name}.weight"]
        assert torch.allclose(parts.past.delta(layer), expected, atol=1e-6)
    # And so does the whole model that is scored.
    base = toys.base_model(model)
    base.load_state_dict(merged)
    batch = parts.collator.train(toys.ToyRows(0, 21, 8).all[:5], 5)
    scored = runner._view.logits(batch)
    assert torch.allclose(scored, aligned_logits(base, batch, model == "t5"), atol=2e-5)
    plain = [b @ a for a, b in trained[0].values()]
    assert max(float(delta.abs().max()) for delta in plain) > 1e-3


def test_one_changes_nothing_and_none_is_off(tmp_path):
    found = []
    for name, lines in (("off", None), ("one", 1.0)):
        parts, runner, _ = run(tmp_path / name, lines)
        runner.run()
        found.append([load_factors(parts.run.stage(i).adapter) for i in range(2)])
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(a[k][i], b[k][i]) for k in b for i in (0, 1))


def test_joint_and_per_task_updates_are_scaled_too(tmp_path):
    """They begin anew at every stage, so nothing is scaled twice."""
    parts, runner, trained = run(tmp_path, 0.25, method="per_task")
    runner.run()
    saved = load_factors(parts.run.stage(1).adapter)
    for name, (_, b) in trained[1].items():
        assert torch.equal(saved[name][1], b * RAMP[block(name)])
        live = parts.engine.value(parts.adapted.layers[name].b)
        assert torch.equal(live, saved[name][1])


def test_opened_again_it_is_the_scored_model(tmp_path):
    parts, runner, _ = run(tmp_path, 0.25)
    runner.run()
    batch = parts.collator.train(toys.ToyRows(1, 21, 8).all[:5], 5)
    scored = runner._view.logits(batch)
    again, other, _ = run(tmp_path, 0.25)
    other.open_stage(1)
    assert torch.equal(other._view.logits(batch), scored)
    assert again.past.stages


def test_interrupted_equals_uninterrupted(tmp_path):
    parts, runner, _ = run(tmp_path / "whole", 0.25, method="ewc_lora", every_steps=1)
    runner.run()
    cut, first, _ = run(tmp_path / "cut", 0.25, method="ewc_lora", every_steps=1)
    save = first._save

    class CutError(Exception):
        pass

    def save_and_die(stage, position):
        save(stage, position)
        if (position.stage, position.step) == (1, 2):
            raise CutError

    first._save = save_and_die
    with pytest.raises(CutError):
        first.run()
    cut.recorder.close()
    again, second, _ = run(tmp_path / "cut", 0.25, method="ewc_lora", every_steps=1)
    second.run()
    a = load_factors(again.run.stage(1).adapter)
    b = load_factors(parts.run.stage(1).adapter)
    assert all(torch.equal(a[k][i], b[k][i]) for k in b for i in (0, 1))
    for name, value in parts.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value)


def test_a_frozen_factor_stays_as_it_is(tmp_path, monkeypatch):
    from accrete.pipeline.methods import inc_lora

    class FrozenA(Method):
        Config = inc_lora.IncLoraConfig

        def trainable(self, factor):
            return factor == "B"

    monkeypatch.setattr(inc_lora, "IncLora", FrozenA)
    parts, runner, trained = run(tmp_path, 0.25)
    assert type(parts.method) is FrozenA
    runner.run()
    saved = load_factors(parts.run.stage(0).adapter)
    for name, (a, b) in trained[0].items():
        assert torch.equal(saved[name][0], a)
        assert torch.equal(saved[name][1], b * RAMP[block(name)])
