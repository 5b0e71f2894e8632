"""Loading any Hugging Face model, and what its forward understands."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MptConfig,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)
from transformers.models.auto import modeling_auto

from accrete.pipeline.data.collate import Collator
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.config import AdapterConfig, ModelConfig
from accrete.pipeline.models.load import (
    DROPOUTS,
    LAYER_DROPS,
    base_dtype,
    load_base,
    read_facts,
    set_dropout,
    unknown_inputs,
)
from accrete.pipeline.models.lora import AdaptedModel
from accrete.pipeline.stage import aligned_logits

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_PAIR = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
T5GEMMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
CPU = torch.device("cpu")


def a_t5gemma(**settings):
    encoder, decoder = T5GemmaModuleConfig(**T5GEMMA), T5GemmaModuleConfig(**T5GEMMA)
    return T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=30, **settings)


def models():
    torch.manual_seed(0)
    yield Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=32))
    yield GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32))
    yield BloomForCausalLM(BloomConfig(vocab_size=30, hidden_size=16, n_layer=2, n_head=2))
    yield BartForConditionalGeneration(
        BartConfig(
            **SMALL_PAIR,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )


@pytest.mark.parametrize("number", range(4))
def test_other_architectures(tmp_path, number):
    made = list(models())[number]
    made.save_pretrained(tmp_path)
    base = load_base(tmp_path, ModelConfig(path=str(tmp_path)), CPU)
    assert not any(p.requires_grad for p in base.parameters())
    seq2seq = base.config.is_encoder_decoder
    adapted = AdaptedModel(base, AdapterConfig(rank=2))
    assert adapted.layers
    rows = [
        EncodedRow("a", [5, 6, 7, 8], [9, 1], 0),
        EncodedRow("b", [5, 6], [10, 11, 12, 1], 1),
    ]
    collator = Collator(seq2seq, 0, 1 if seq2seq else None, 1)
    adapted.module.eval()
    call = (seq2seq, unknown_inputs(base))
    with torch.no_grad():
        together = aligned_logits(adapted.module, collator.train(rows), *call)
        assert together.shape == (2, 4, 30)
        for row, logits in zip(rows, together, strict=True):
            alone = aligned_logits(adapted.module, collator.train([row]), *call)[0]
            count = len(row.answer)
            part = logits[:count] if seq2seq else logits[-count:]
            torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)


def test_generation_is_greedy_whatever_the_checkpoint_wants(tmp_path):
    """BART's own settings force tokens and forbid repetitions; then decoding is no argmax."""
    made = list(models())[3].eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    constraints = {"forced_bos_token_id": 9, "no_repeat_ngram_size": 1, "min_length": 5}
    for name, value in constraints.items():
        setattr(made.generation_config, name, value)
    made.save_pretrained(tmp_path)
    base = load_base(tmp_path, ModelConfig(path=str(tmp_path)), CPU).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    tokens = [1]
    for _ in range(6):
        answer = torch.tensor([tokens])
        with torch.no_grad():
            logits = made(input_ids=prompt, decoder_input_ids=answer, use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "eos_token_id": 29}
    assert base.generate(prompt, **settings)[0].tolist() == tokens
    # Control: as it was saved, the model decodes something else.
    assert made.generate(prompt, **settings)[0].tolist() != tokens


def test_dropout_is_set_as_asked(tmp_path):
    next(models()).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), dropout=0.25)
    assert load_base(tmp_path, config, CPU).config.attention_dropout == 0.25


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("family", ["gpt2", "phi", "m2m100", "biogpt", "seed_oss", "t5gemma"])
def test_dropout_by_any_name(tmp_path, family, dropout):
    """Families' own names for it, in configurations inside T5Gemma's own, and M2M100's blocks that
    are left out at random."""
    sizes = {"vocab_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, n_embd=16)),
        "phi": lambda: PhiForCausalLM(
            PhiConfig(
                **sizes, hidden_size=16, intermediate_size=32, resid_pdrop=0.1, embd_pdrop=0.1
            )
        ),
        "m2m100": lambda: M2M100ForConditionalGeneration(
            M2M100Config(
                **SMALL_PAIR,
                encoder_layerdrop=0.5,
            )
        ),
        "biogpt": lambda: BioGptForCausalLM(
            BioGptConfig(**sizes, hidden_size=16, intermediate_size=32)
        ),
        "seed_oss": lambda: SeedOssForCausalLM(
            SeedOssConfig(
                **sizes, hidden_size=16, intermediate_size=32, num_key_value_heads=1, head_dim=8
            )
        ),
        "t5gemma": lambda: T5GemmaForConditionalGeneration(a_t5gemma(dropout_rate=0.1)),
    }[family]()
    made.save_pretrained(tmp_path)
    base = load_base(tmp_path, ModelConfig(path=str(tmp_path), dropout=dropout), CPU).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids}
    if made.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    found = [base(**inputs).logits for _ in range(8)]
    assert all(torch.equal(found[0], other) for other in found[1:]) is (dropout == 0.0)


def test_no_part_keeps_keys_and_values(tmp_path):
    """Least of all a T5's decoder, which has a config of its own."""
    made = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    made.config.decoder_start_token_id = 0
    made.save_pretrained(tmp_path)
    base = load_base(tmp_path, ModelConfig(path=str(tmp_path)), CPU)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert base(input_ids=ids, decoder_input_ids=ids).past_key_values is None
        assert made(input_ids=ids, decoder_input_ids=ids).past_key_values is not None


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_output_head_that_is_the_embedding_cannot_be_adapted(tmp_path):
    """Merged into it, an update of the head would move every input as well."""
    config = Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=32)
    for tied in (False, True):
        config.tie_word_embeddings = tied
        base = Qwen2ForCausalLM(config)
        assert AdaptedModel(base, AdapterConfig(targets=["q_proj", "v_proj"])).layers
        wanted = AdapterConfig(targets=["q_proj", "lm_head"])
        if tied:
            with pytest.raises(ModelError, match=r"lm_head shares its weight with .*embed_tokens"):
                AdaptedModel(Qwen2ForCausalLM(config), wanted)
        else:
            assert "lm_head" in AdaptedModel(Qwen2ForCausalLM(config), wanted).layers


@pytest.mark.parametrize(("given", "taken"), [(None, 1), (5, 5), (29, 29), (30, 1)])
def test_padding_is_a_token_that_the_model_knows(tmp_path, given, taken):
    """A padding token that was added to the tokenizer alone has no embedding to look up."""
    Qwen2Config(**SMALL).save_pretrained(tmp_path)
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=given)
    assert read_facts(tmp_path, tokenizer).pad_id == taken


def test_where_an_answer_starts(tmp_path):
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    settings = a_t5gemma()
    settings.save_pretrained(tmp_path)
    start = read_facts(tmp_path, tokenizer).decoder_start_id
    made = T5GemmaForConditionalGeneration(settings)
    shifted = made.prepare_decoder_input_ids_from_labels(torch.tensor([[9, 1]]))
    assert start == shifted[0, 0] == 2
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        read_facts(tmp_path, tokenizer)
    T5Config(decoder_start_token_id=0).save_pretrained(tmp_path)
    assert read_facts(tmp_path, tokenizer).decoder_start_id == 0


def test_precision():
    gpu = torch.device("cuda", 0)
    assert base_dtype(ModelConfig(path="x"), CPU) == torch.float32
    assert base_dtype(ModelConfig(path="x"), gpu) == torch.bfloat16
    assert base_dtype(ModelConfig(path="x", dtype="bf16"), CPU) == torch.bfloat16
    assert base_dtype(ModelConfig(path="x", dtype="fp32"), gpu) == torch.float32


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_base(tmp_path, ModelConfig(path=str(tmp_path)), CPU)


OTHER_HEADS = re.compile("classifier|summary|speech|adaptor|pred|projector")
"""Dropout of parts that a language model over text does not have."""


def parts(settings):
    """The settings of a configuration, and of those inside it."""
    yield vars(settings)
    for name in settings.sub_configs:
        part = getattr(settings, name, None)
        if part is not None:
            yield from parts(part)


def test_a_dropout_that_a_family_cannot_have_is_refused():
    settings = MptConfig()
    set_dropout(settings, 0.0)
    with pytest.raises(ModelError, match=r"dropout 0\.1: MptAttentionConfig\.attn_pdrop is 0 and"):
        set_dropout(settings, 0.1)


def test_every_family_s_dropout_is_known():
    """One that is forgotten would be at work in training, whatever `model.dropout` says."""
    families = {
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    found = {}
    for family in families:
        with contextlib.suppress(Exception):  # parts that only make sense within another model
            found[family] = list(parts(AutoConfig.for_model(family)))
    assert len(found) > 150
    unknown = {
        f"{family}: {name}"
        for family, configurations in found.items()
        for settings in configurations
        for name, value in settings.items()
        if "drop" in name and type(value) in (int, float) and not OTHER_HEADS.search(name)
        if name not in (*DROPOUTS, *LAYER_DROPS)
    }
    assert not unknown
