"""Untrained small models of the two architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKETS = 32
"""Relative positions of a T5: half of them for what stands to the left, half to the right."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    width: int
    layers: int
    """Of the decoder, and of the encoder if there is one."""
    heads: int
    inner: int
    """Width inside the feed-forward layers."""


def new_t5(shape: Shape, vocab_size: int) -> Any:
    """A gated-GELU T5 without dropout whose encoder heads start out looking at places.

    Of four heads the first looks one token to the left, the second one to the right, the third
    around, the fourth anywhere. Positions in T5 are only learned biases; from flat ones a model of
    this size needs many minutes to discover order at all.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab_size,
            d_model=shape.width,
            d_kv=shape.width // shape.heads,
            d_ff=shape.inner,
            num_layers=shape.layers,
            num_decoder_layers=shape.layers,
            num_heads=shape.heads,
            relative_attention_num_buckets=BUCKETS,
            relative_attention_max_distance=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    attention = model.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight  # [buckets, heads]
    right = BUCKETS // 2
    with torch.no_grad():
        bias[1, 0::4] += 3.0
        bias[right + 1, 1::4] += 3.0
        bias[1:4, 2::4] += 1.5
        bias[right + 1 : right + 4, 2::4] += 1.5
    return model


def new_llama(shape: Shape, vocab_size: int) -> Any:
    """A LLaMA with two query heads for each key-value head and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 2,
            max_position_embeddings=512,
            # The usual 0.02 is for wide models; at a width of 64 training would hardly start.
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
