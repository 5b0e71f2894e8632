"""The live model decodes what a loop without a cache decodes."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from accrete.pipeline.data.collate import Batch
from accrete.pipeline.view import LiveModel

PAD, EOS = 0, 1


def a_t5(encoder: int, decoder: int) -> Any:
    torch.manual_seed(encoder)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=encoder,
        num_decoder_layers=decoder,
        num_heads=4,
        initializer_factor=8.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config).eval()


def without_a_cache(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> list[list[int]]:
    answers = torch.full((len(inputs["input_ids"]), 1), PAD)
    for _ in range(tokens):
        logits = model(**inputs, decoder_input_ids=answers, use_cache=False).logits
        answers = torch.cat([answers, logits[:, -1:].argmax(-1)], dim=1)
    rows = answers[:, 1:].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


def check_decoding(model: Any) -> None:
    engine = SimpleNamespace(module=model, rank=0, world=1, device=torch.device("cpu"))
    adapted: Any = SimpleNamespace(decoding=lambda keep_casts: nullcontext())
    facts: Any = SimpleNamespace(seq2seq=True, pad_id=PAD, eos_id=EOS, decoder_start_id=PAD)
    ids = torch.tensor([[5, 9, 30, 2], [7, 7, PAD, PAD]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    labels = torch.zeros(2, 1, dtype=torch.long)
    batch = Batch(inputs=inputs, labels=labels, num_tokens=0, ids=["a", "b"], real_rows=2)
    found = LiveModel(engine, adapted, facts, synced=False).generate(batch, 6)  # type: ignore[arg-type]
    expected = without_a_cache(model, inputs, 6)
    assert found == expected
    assert len({tuple(row) for row in expected}) == 2  # the prompt matters


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (2, 2), (3, 1)])
def test_stacks_of_unequal_depth_decode(encoder: int, decoder: int) -> None:
    check_decoding(a_t5(encoder, decoder))


@pytest.mark.parametrize("start", [None, 7])
def test_decoding_starts_as_training_does(start: int | None) -> None:
    """Whatever generation_config.json says: without a start token `generate` would fail."""
    model = a_t5(2, 2)
    model.generation_config.decoder_start_token_id = start
    check_decoding(model)
