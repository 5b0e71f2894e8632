"""The past in the forward: exact in both modes, and what bf16 folding loses is reported."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from accrete.pipeline.distributed.engine import OptimizerSettings
from accrete.pipeline.distributed.plain import PlainEngine
from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import (
    AdaptedModel,
    initial_factors,
    load_factors,
    load_scales,
    save_adapter,
)
from accrete.pipeline.models.past import Past, choose_mode


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False)
    return model


def build(mode, dtype=torch.float32, merge="exact", size=0.2, tasks=3):
    adapted = AdaptedModel(llama(dtype), AdapterConfig(rank=4, alpha=8))
    engine = PlainEngine(
        adapted.module,
        adapted.parameters(),
        OptimizerSettings(),
        accumulation=1,
        device=torch.device("cpu"),
    )
    past = Past(adapted, engine, mode, merge)
    stages = []
    for stage in range(tasks):
        g = torch.Generator().manual_seed(stage)
        fresh = initial_factors(adapted, 0, stage)
        stages.append(
            {k: (a, size * torch.randn(b.shape, generator=g)) for k, (a, b) in fresh.items()}
        )
    return adapted, past, stages


def dense(adapted, stages, name):
    return sum(2.0 * b.double() @ a.double() for a, b in (stage[name] for stage in stages))


IDS = torch.tensor([[3, 5, 7, 9, 11]])


def test_both_modes_equal_a_dense_model():
    reference = llama()
    adapted, past, stages = build("fold")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in adapted.layers:
                parameter.add_(dense(adapted, stages, layer).float())
        expected = reference(IDS).logits
        for mode in ("fold", "branch"):
            adapted, past, stages = build(mode)
            errors = [past.add(stage) for stage in stages]
            torch.testing.assert_close(adapted.module(IDS).logits, expected, rtol=1e-4, atol=1e-5)
            assert max(errors) < 1e-5


def test_folding_starts_from_the_untouched_base_each_time():
    adapted, past, stages = build("fold", size=1e-3)
    layer = next(iter(adapted.layers.values()))
    original = layer.weight.detach().clone()
    for stage in stages:
        past.add(stage)
    assert torch.equal(layer.weight, original + past.delta(layer))


def test_what_bf16_takes_away_is_reported():
    """Small deltas on bf16 weights lose a large part; a branch loses nothing."""
    _, past, stages = build("fold", torch.bfloat16, size=1e-4)
    assert past.add(stages[0]) > 0.1
    _, past, stages = build("branch", torch.bfloat16, size=1e-4)
    assert past.add(stages[0]) == 0.0
    assert choose_mode("auto", torch.float32) == "fold"
    assert choose_mode("auto", torch.bfloat16) == "branch"
    assert choose_mode("fold", torch.bfloat16) == "fold"


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.003, 0.49), (0.009, 0.18), (0.028, 0.06), (0.095, 0.02)]
)
def test_what_bf16_takes_away_by_the_size_of_the_delta(ratio, expected):
    """Against a recomputation in fp64; `ratio` is |dW| / |W| of every layer."""
    adapted, past, (stage, *_) = build("fold", torch.bfloat16)
    before = {name: layer.weight.detach().double() for name, layer in adapted.layers.items()}
    factors = {}
    for name, (a, b) in stage.items():
        size = float(before[name].norm() / dense(adapted, [stage], name).norm())
        factors[name] = (a, ratio * size * b)
    reported = past.add(factors)
    error = norm = 0.0
    for name, layer in adapted.layers.items():
        wanted = dense(adapted, [factors], name)
        lost = layer.weight.double() - before[name] - wanted
        error, norm = error + float(lost.square().sum()), norm + float(wanted.square().sum())
    assert reported == pytest.approx((error / norm) ** 0.5, rel=1e-5)
    assert reported == pytest.approx(expected, rel=0.15)


def test_factor_sum_is_another_model():
    adapted, past, stages = build("fold", merge="factor_sum")
    for stage in stages:
        past.add(stage)
    name, layer = next(iter(adapted.layers.items()))
    a = sum(stage[name][0] for stage in stages)
    b = sum(stage[name][1] for stage in stages)
    torch.testing.assert_close(past.delta(layer), 2.0 * b @ a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_factor_sum_is_off_by_the_root_of_the_other_tasks(tasks):
    """T terms s B_j A_j are right and T (T - 1) terms s B_i A_j, all of one size, are not."""
    adapted, past, stages = build("fold", merge="factor_sum", tasks=tasks)
    for stage in stages:
        past.add(stage)
    error = norm = 0.0
    for name, layer in adapted.layers.items():
        exact = dense(adapted, stages, name)
        error += float((past.delta(layer) - exact).square().sum())
        norm += float(exact.square().sum())
    assert (error / norm) ** 0.5 == pytest.approx((tasks - 1) ** 0.5, rel=0.1)


def test_initial_factors_depend_on_seed_stage_and_name_alone():
    adapted, _, _ = build("fold")
    first, again = initial_factors(adapted, 1, 2), initial_factors(adapted, 1, 2)
    for name, (a, b) in first.items():
        assert torch.equal(a, again[name][0])
        assert not b.any()
        assert float(a.abs().max()) <= 1 / a.shape[1] ** 0.5
        for other in (initial_factors(adapted, 2, 2), initial_factors(adapted, 1, 3)):
            assert not torch.equal(a, other[name][0])
    values = [a for a, _ in first.values() if a.shape == next(iter(first.values()))[0].shape]
    assert not torch.equal(values[0], values[1])


def test_a_saved_adapter_is_peft_s(tmp_path):
    adapted, _, stages = build("fold")
    save_adapter(adapted, stages[0], "base", tmp_path)
    again = load_factors(tmp_path)
    assert again.keys() == stages[0].keys()
    for name, (a, b) in again.items():
        assert torch.equal(a, stages[0][name][0])
        assert torch.equal(b, stages[0][name][1])
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    other, past, _ = build("branch")
    past.add(stages[0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, other.module(IDS).logits)


def half_as_strong_below(layers):
    return {name: 0.5 for name in layers if ".0." in name}


@pytest.mark.parametrize("mode", ["fold", "branch"])
def test_a_task_keeps_the_scale_it_was_trained_with(mode, tmp_path):
    """Also in a model whose own layers are scaled otherwise, as after a branch."""
    scaled = AdaptedModel(llama(), AdapterConfig(rank=4, alpha=8), half_as_strong_below)
    _, _, stages = build(mode)
    save_adapter(scaled, stages[0], "base", tmp_path)
    adapted, past, _ = build(mode)
    past.add(load_factors(tmp_path), load_scales(tmp_path, stages[0]))
    past.add(stages[1])
    for name, layer in adapted.layers.items():
        own, later = dense(adapted, stages[:1], name), dense(adapted, stages[1:2], name)
        own *= 0.5 if ".0." in name else 1.0
        torch.testing.assert_close(past.delta(layer).double(), own + later, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "count"), [("qv", 4), ("all_linear", 14), (["o_proj", "up_proj"], 4)]
)
def test_targets(targets, count):
    assert len(AdaptedModel(llama(), AdapterConfig(targets=targets)).layers) == count


def test_targets_of_t5():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    )
    layers = AdaptedModel(model, AdapterConfig(targets="qv")).layers
    assert len(layers) == 2 * 2 + 2 * 4  # encoder; decoder with cross-attention
    assert "decoder.block.1.layer.1.EncDecAttention.v" in layers


@pytest.mark.parametrize("targets", ["wrong_name", ["wrong_name"], ["q_proj", "wrong_name"]])
def test_a_target_that_fits_nothing_is_refused(targets):
    """Also beside one that fits, which would be all that is trained."""
    with pytest.raises(ModelError, match=r"'wrong_name' fits no layer .* k_proj, .* v_proj\.$"):
        AdaptedModel(llama(), AdapterConfig(targets=targets))


@pytest.mark.parametrize("targets", ["q_proj", ["layers.1.self_attn.q_proj"], ["lm_head"]])
def test_a_target_may_be_a_whole_name_or_its_end(targets):
    names = list(AdaptedModel(llama(), AdapterConfig(targets=targets)).layers)
    end = targets if isinstance(targets, str) else targets[0]
    assert names
    assert all(f".{name}".endswith(f".{end}") for name in names)


def test_a_target_may_name_a_block_that_a_short_model_lacks():
    """As in a forecast, which builds a few of the blocks."""
    targets = ["layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"]
    assert len(AdaptedModel(llama(), AdapterConfig(targets=targets)).layers) == 1
    with pytest.raises(ModelError, match=r"'layers\.7\.q_proj' fits no layer"):
        AdaptedModel(llama(), AdapterConfig(targets=[targets[0], "layers.7.q_proj"]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_layers_of_another_kind_are_named():
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D; allowed"):
        AdaptedModel(GPT2LMHeadModel(config), AdapterConfig(targets="all_linear"))
