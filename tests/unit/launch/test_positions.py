"""Rows longer than a model's table of positions."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from accrete.launch.positions import position_limit, require_positions
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import ModelError

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIR = {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
TABLES = {
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=n)
    ),
    "gpt_neo": lambda n: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=30,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            attention_types=[[["global"], 1]],
            max_position_embeddings=n,
        )
    ),
    "opt": lambda n: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=n)
    ),
    "biogpt": lambda n: BioGptForCausalLM(
        BioGptConfig(**SMALL, intermediate_size=32, max_position_embeddings=n)
    ),
    "roberta": lambda n: RobertaForCausalLM(
        RobertaConfig(
            **SMALL,
            intermediate_size=32,
            is_decoder=True,
            max_position_embeddings=n,
            pad_token_id=0,
        )
    ),
    "bart": lambda n: BartForConditionalGeneration(BartConfig(**PAIR, max_position_embeddings=n)),
    "pegasus": lambda n: PegasusForConditionalGeneration(
        PegasusConfig(**PAIR, max_position_embeddings=n)
    ),
    "marian": lambda n: MarianMTModel(MarianConfig(**PAIR, max_position_embeddings=n)),
}
WITHOUT = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SMALL, num_key_value_heads=1, intermediate_size=32, max_position_embeddings=12
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ),
}


def reads(model, prompt, answer):
    """What the model is fed by a row of these lengths, as the collator makes it."""
    if model.config.is_encoder_decoder:
        inputs = {
            "input_ids": torch.full((1, prompt), 5),
            "decoder_input_ids": torch.full((1, answer), 5),
        }
    else:
        inputs = {"input_ids": torch.full((1, prompt + answer - 1), 5)}
    with torch.no_grad():
        model.eval()(**inputs)


def task(prompt, answer, metric="exact_match"):
    split = SimpleNamespace(max_prompt_tokens=prompt, max_answer_tokens=answer)
    return SimpleNamespace(
        name="alpha", metric=metric, stats=SimpleNamespace(train=split, eval=split)
    )


@pytest.mark.parametrize("family", TABLES)
def test_the_limit_is_where_the_model_itself_ends(family):
    model, config = TABLES[family](12), load_recipe("quickstart").config
    limit = position_limit(model)
    alone = model.config.is_encoder_decoder
    assert limit is not None
    prompt = limit if alone else limit - 3  # an answer of four tokens has three to read
    require_positions(model, [task(prompt, 4)], config)
    reads(model, prompt, 4)
    with pytest.raises(ModelError, match=f"max_source_tokens to at most {prompt}, or lower"):
        require_positions(model, [task(prompt, 4), task(prompt + 1, 4)], config)
    with pytest.raises((IndexError, RuntimeError)):
        reads(model, prompt + 1, 4)


@pytest.mark.parametrize("family", WITHOUT)
def test_models_without_a_table_take_any_length(family):
    model = WITHOUT[family]()
    assert position_limit(model) is None
    reads(model, 40, 4)


def test_what_is_decoded_counts_too():
    model, config = TABLES["gpt2"](40), load_recipe("quickstart").config
    data = replace(config.data, max_target_tokens=16)
    config = replace(config, data=data)
    require_positions(model, [task(30, 4)], config)
    with pytest.raises(ModelError, match="30 tokens of a prompt and 15 of an answer"):
        require_positions(model, [task(30, 4, metric="rouge_l")], config)
