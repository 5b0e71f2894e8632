"""Pooled block features against hidden states that the model itself returns."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MBartConfig,
    MBartForConditionalGeneration,
    OlmoConfig,
    OlmoForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

from toys import BOS, EOS, PAD, VOCAB, ToyRows, base_model, make_parts

from accrete.pipeline.data.collate import IGNORED, Batch, Collator
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.features import BlockFeatures
from accrete.pipeline.stage_runner import StageRunner

MODELS = ("t5", "llama")
BLOCKS = 2
ROWS = ToyRows(0, 6, 6).all


def stage_of(kind, tmp_path, **changes):
    """A stage of a toy model whose final norm and live B are not trivial."""
    parts = make_parts(
        Ranks(0, 1, torch.device("cpu")), tmp_path, model=kind, zero=None, micro=8, **changes
    )
    g = torch.Generator().manual_seed(1)
    for name, parameter in parts.adapted.base.named_parameters():
        if name.endswith(("final_layer_norm.weight", "model.norm.weight")):
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=g))
    for name, parameter in parts.engine.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return StageRunner(parts)._stage(0)


def bare(base, seq2seq=False):
    """What BlockFeatures needs of a stage, around any model."""
    engine = SimpleNamespace(gathered=lambda parameters: torch.no_grad())
    return SimpleNamespace(
        adapted=SimpleNamespace(base=base), facts=SimpleNamespace(seq2seq=seq2seq), engine=engine
    )


def pooled(stage, batch, **settings):
    features = BlockFeatures(stage, **settings)
    stage.logits(batch)
    result = features.pooled(batch)
    features.close()
    return result


def rms(state, norm):
    mean = state.double().square().mean(-1, keepdim=True)
    eps = norm.variance_epsilon
    return (state.double() / (mean + eps).sqrt() * norm.weight.double()).float()


def states_of(outputs, norm):
    """Every block's normed output; the last one of `hidden_states` comes normed already."""
    return [*[rms(state, norm) for state in outputs[1:-1]], outputs[-1]]


def by_hand(stage, rows):
    """Row by row, no padding at all: [rows, blocks, d] of every stack."""
    base = stage.adapted.base
    found = []
    for row in rows:
        prompt = torch.tensor([row.prompt])
        if stage.facts.seq2seq:
            start = torch.tensor([[PAD, *row.answer[:-1]]])
            out = base(input_ids=prompt, decoder_input_ids=start, output_hidden_states=True)
            encoder = states_of(out.encoder_hidden_states, base.encoder.final_layer_norm)
            decoder = states_of(out.decoder_hidden_states, base.decoder.final_layer_norm)
            found.append(
                [
                    torch.stack([state[0].mean(0) for state in encoder]),
                    torch.stack([state[0, 0] for state in decoder]),
                ]
            )
        else:
            whole = torch.tensor([row.prompt + row.answer[:-1]])
            out = base(input_ids=whole, output_hidden_states=True)
            states = states_of(out.hidden_states, base.model.norm)
            found.append([torch.stack([state[0, len(row.prompt) - 1] for state in states])])
    return [torch.stack(stack) for stack in zip(*found, strict=True)]


def assert_close(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", MODELS)
def test_they_equal_hidden_states_row_by_row(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    got = pooled(stage, stage.collator.train(ROWS))
    assert [g.shape for g in got] == [(6, BLOCKS, 32)] * (2 if kind == "t5" else 1)
    assert_close(got, by_hand(stage, ROWS))


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_through_hidden_states(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    parameters = list(stage.engine.parameters.values())
    weights = [
        torch.randn(6, BLOCKS, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    ]

    def gradients(stacks):
        total = sum((w * s).sum() for w, s in zip(weights, stacks, strict=False))
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    got = gradients(pooled(stage, stage.collator.train(ROWS)))
    expected = gradients(by_hand(stage, ROWS))
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 0.1
    # A gradient's entries are sums that cancel: the largest says how exact fp32 can be.
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", MODELS)
def test_length_of_padding_and_padding_rows_do_not_matter(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    collate = stage.collator.train
    expected = pooled(stage, collate(ROWS))
    alone = [pooled(stage, collate([row])) for row in ROWS]
    assert_close([torch.cat(stack) for stack in zip(*alone, strict=True)], expected)
    filled = pooled(stage, collate(ROWS, num_rows=9))
    assert all(bool(stack.isfinite().all()) for stack in filled)
    assert_close([stack[:6] for stack in filled], expected)
    empty = pooled(stage, collate([], num_rows=1))
    assert [stack.shape for stack in empty] == [(1, BLOCKS, 32)] * len(expected)
    assert_close(empty, [stack[6:7] for stack in filled])


def turned(rows, kind):
    """The same batch, padded on the other side."""
    width = max(len(row.prompt) + (0 if kind == "t5" else len(row.answer) - 1) for row in rows)
    ids, mask, labels = [], [], []
    for row in rows:
        tokens = row.prompt if kind == "t5" else row.prompt + row.answer[:-1]
        fill = width - len(tokens)
        if kind == "t5":  # the source on the left
            ids.append([PAD] * fill + tokens)
            mask.append([0] * fill + [1] * len(tokens))
        else:  # a label stands in the column of the token that predicts it
            ids.append(tokens + [PAD] * fill)
            mask.append([1] * len(tokens) + [0] * fill)
            before = [IGNORED] * (len(row.prompt) - 1)
            labels.append(before + row.answer + [IGNORED] * fill)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if kind == "t5":
        right = Collator(True, PAD, PAD, EOS).train(rows)
        inputs["decoder_input_ids"] = right.inputs["decoder_input_ids"]
        return replace(right, inputs=inputs)
    return Batch(
        inputs=inputs,
        labels=torch.tensor(labels),
        num_tokens=0,
        ids=[row.id for row in rows],
        real_rows=len(rows),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_side_of_padding_does_not_matter(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    batch = turned(ROWS, kind)
    expected = pooled(stage, stage.collator.train(ROWS))
    assert_close(pooled(stage, batch), expected)
    # Control: a fixed column is another token in most rows.
    unmasked = replace(
        batch,
        labels=batch.labels[:, :0],
        inputs={**batch.inputs, "attention_mask": torch.ones_like(batch.inputs["attention_mask"])},
    )
    features = BlockFeatures(stage)
    stage.logits(batch)
    wrong = features.pooled(unmasked)
    features.close()
    assert float((wrong[0] - expected[0]).detach().abs().max()) > 0.1


def test_a_prompt_alone_gives_what_the_whole_row_gives(tmp_path):
    """Causal: the answer behind the pooled token changes nothing."""
    stage = stage_of("llama", tmp_path)
    expected = pooled(stage, stage.collator.train(ROWS))
    prompts = stage.collator.prompts(ROWS, num_rows=8)
    features = BlockFeatures(stage)
    stage.adapted.module(**prompts.inputs)
    assert_close([features.pooled(prompts)[0][:6]], expected)
    features.close()


def test_row_without_labels_ends_where_its_mask_ends(tmp_path):
    """On either side of the padding."""
    stage = stage_of("llama", tmp_path)
    batch = turned(ROWS, "llama")
    last = pooled(stage, replace(batch, labels=torch.full_like(batch.labels, IGNORED)))[0]
    for number, row in enumerate(ROWS):
        out = stage.adapted.base(
            input_ids=torch.tensor([row.prompt + row.answer[:-1]]), output_hidden_states=True
        )
        torch.testing.assert_close(
            last[number, -1], out.hidden_states[-1][0, -1], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", MODELS)
def test_last_only(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    batch = stage.collator.train(ROWS)
    whole = pooled(stage, batch)
    features = BlockFeatures(stage, last_only=True)
    assert features.sizes == [1] * len(whole)
    features.close()
    got = pooled(stage, batch, last_only=True)
    for a, b in zip(got, whole, strict=True):
        assert torch.equal(a, b[:, -1:])


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(kind, tmp_path):
    """Same features, same gradients; recomputing the blocks leaves nothing behind."""
    results = []
    for checkpointing in (False, True):
        stage = stage_of(kind, tmp_path / str(checkpointing), checkpointing=checkpointing)
        stage.adapted.module.train()
        calls = []
        stage.adapted.base.get_decoder().get_submodule(
            "block.0.layer.0" if kind == "t5" else "layers.0.self_attn"
        ).register_forward_hook(lambda *_, seen=calls: seen.append(1))
        features = BlockFeatures(stage)
        batch = stage.collator.train(ROWS, 7)
        logits = stage.logits(batch)
        stacks = features.pooled(batch)
        loss = sum(stack.square().mean() for stack in stacks) + logits.square().mean()
        grads = torch.autograd.grad(loss, list(stage.engine.parameters.values()))
        assert len(calls) == 1 + checkpointing
        assert features._seen == {}
        results.append((stacks, grads))
    (plain, expected), (again, got) = results
    for a, b in zip([*again, *got], [*plain, *expected], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_blocks(kind, tmp_path):
    """A bf16 base gives fp32 features, near those of the fp32 base."""
    half = stage_of(kind, tmp_path / "half", dtype="bf16", past="branch")
    single = stage_of(kind, tmp_path / "single")
    got = pooled(half, half.collator.train(ROWS))
    expected = pooled(single, single.collator.train(ROWS))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert float(((a - b).norm() / b.norm()).detach()) < 0.05


@pytest.mark.parametrize("kind", MODELS)
def test_close_and_forget(kind, tmp_path):
    stage = stage_of(kind, tmp_path)
    batch = stage.collator.train(ROWS)

    def hooks():
        return sum(len(module._forward_hooks) for module in stage.adapted.base.modules())

    before = hooks()
    features = BlockFeatures(stage)
    assert hooks() == before + sum(features.sizes)
    stage.logits(batch)
    assert len(features._seen) == sum(features.sizes)
    features.forget()
    assert features._seen == {}
    stage.logits(batch)
    features.close()
    assert features._seen == {}
    assert hooks() == before


SMALL = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
LLAMA_LIKE = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def randomise_norm(norm):
    g = torch.Generator().manual_seed(2)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=g) + 0.5)


def test_decoder_with_layer_norms():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4)).eval()
    randomise_norm(base.transformer.ln_f)
    features = BlockFeatures(bare(base))
    batch = Collator(False, PAD, None, EOS).train(ROWS[:1])
    out = base(**batch.inputs, output_hidden_states=True)
    place = len(ROWS[0].prompt) - 1
    expected = [base.transformer.ln_f(out.hidden_states[1]), out.hidden_states[2]]
    assert_close(features.pooled(batch), [torch.stack([s[:, place] for s in expected], dim=1)])


def test_encoder_decoder_with_layer_norms():
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    base = MBartForConditionalGeneration(MBartConfig(**SMALL, **sizes, **heads, **layers)).eval()
    encoder, decoder = base.model.encoder, base.model.decoder
    randomise_norm(encoder.layer_norm)
    randomise_norm(decoder.layer_norm)
    features = BlockFeatures(bare(base, seq2seq=True))
    batch = Collator(True, PAD, PAD, EOS).train(ROWS)
    out = base(**batch.inputs, output_hidden_states=True)
    mask = batch.inputs["attention_mask"][..., None]
    first = [encoder.layer_norm(out.encoder_hidden_states[1]), out.encoder_hidden_states[2]]
    second = [decoder.layer_norm(out.decoder_hidden_states[1]), out.decoder_hidden_states[2]]
    expected = [
        torch.stack([(s * mask).sum(1) / mask.sum(1) for s in first], dim=1),
        torch.stack([s[:, 0] for s in second], dim=1),
    ]
    assert_close(features.pooled(batch), expected)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (GemmaForCausalLM, GemmaConfig(**LLAMA_LIKE, head_dim=8)),  # adds 1 to the weight
        (CohereForCausalLM, CohereConfig(**LLAMA_LIKE)),  # subtracts the mean
        (OlmoForCausalLM, OlmoConfig(**LLAMA_LIKE)),  # has no weight
    ],
)
def test_unknown_norms_are_refused(family, config):
    base = family(config)
    randomise_norm(base.get_decoder().norm)
    with pytest.raises(ModelError, match=r"Norm: accrete does not know this kind of final norm"):
        BlockFeatures(bare(base))


def test_model_without_a_final_norm_is_refused():
    base = base_model("llama")
    del base.model.norm
    with pytest.raises(ModelError, match="no list of blocks with a final norm"):
        BlockFeatures(bare(base))
