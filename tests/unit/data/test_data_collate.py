"""Batches: padding, alignment of labels and logits, padding rows; against real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accrete.pipeline.data.collate import IGNORED, Batch, Collator
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.stage import aligned_logits

PAD, EOS, START = 0, 1, 0
ROWS = [
    EncodedRow("a", [5, 6, 7, EOS], [8, 9, EOS], 0),
    EncodedRow("b", [5, EOS], [10, EOS], 1),
]
DECODER_ROWS = [
    EncodedRow("a", [2, 5, 6, 7], [8, 9, EOS], 0),
    EncodedRow("b", [2, 5], [10, EOS], 1),
]


@pytest.fixture
def seq2seq() -> Collator:
    return Collator(True, PAD, START, EOS)


@pytest.fixture
def causal() -> Collator:
    return Collator(False, PAD, None, EOS)


def test_encoder_decoder_batch(seq2seq: Collator) -> None:
    batch = seq2seq.train(ROWS)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 8, 9], [0, 10, 0]]
    assert batch.labels.tolist() == [[8, 9, 1], [10, 1, IGNORED]]
    assert (batch.num_tokens, batch.ids, batch.real_rows) == (5, ["a", "b"], 2)


def test_decoder_batch(causal: Collator) -> None:
    batch = causal.train(DECODER_ROWS)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9], [0, 0, 0, 2, 5, 10]]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert batch.labels.tolist() == [[8, 9, 1], [IGNORED, 10, 1]]
    assert batch.num_tokens == 5


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_padding_rows_have_one_token_and_no_label(
    kind: str, rows: int, request: pytest.FixtureRequest
) -> None:
    collator: Collator = request.getfixturevalue(kind)
    given = (ROWS if kind == "seq2seq" else DECODER_ROWS)[:rows]
    batch = collator.train(given, 4)
    assert batch.labels.shape[0] == 4
    assert batch.real_rows == len(batch.ids) == rows
    assert (batch.labels[rows:] == IGNORED).all()
    assert batch.inputs["attention_mask"][rows:].sum(dim=1).tolist() == [1] * (4 - rows)
    assert batch.num_tokens == sum(len(row.answer) for row in given)
    prompts = collator.prompts(given, 4)
    assert prompts.inputs["attention_mask"].sum(dim=1).min() >= 1
    assert prompts.labels.shape == (4, 0)


def test_prompts(seq2seq: Collator, causal: Collator) -> None:
    assert seq2seq.prompts(ROWS).inputs["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 0, 0]]
    batch = causal.prompts(DECODER_ROWS)
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 6, 7], [0, 0, 2, 5]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.num_tokens == 0


def test_rows_that_do_not_fit(seq2seq: Collator) -> None:
    with pytest.raises(ValueError, match="2 rows do not fit a batch of 1"):
        seq2seq.train(ROWS, 1)
    with pytest.raises(ValueError, match="0 rows"):
        seq2seq.train([])
    with pytest.raises(ValueError, match="decoder_start_id"):
        Collator(True, PAD, None, EOS)


def test_to_device_keeps_everything_else(seq2seq: Collator) -> None:
    batch = seq2seq.train(ROWS)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {t.device.type for t in (*moved.inputs.values(), moved.labels)} == {"meta"}
    assert (moved.num_tokens, moved.ids, moved.real_rows) == (5, ["a", "b"], 2)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).double(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    config.decoder_start_token_id = START
    return T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def test_decoder_logits_align_with_labels(causal: Collator, llama: Any) -> None:
    """Padded and kept logits give the loss that each row gives alone, unpadded and unshifted."""
    batch = causal.train(DECODER_ROWS, 3)
    logits = aligned_logits(llama, batch, seq2seq=False)
    assert logits.shape[:2] == batch.labels.shape
    assert torch.isfinite(logits).all()  # also where a row is all padding
    alone = 0.0
    for row in DECODER_ROWS:
        ids = torch.tensor([row.prompt + row.answer])
        labels = torch.tensor([[IGNORED] * len(row.prompt) + row.answer])
        full = llama(input_ids=ids).logits
        alone += float(answer_loss(full[:, :-1], labels[:, 1:]))
    assert float(answer_loss(logits, batch.labels)) == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_encoder_decoder_logits_align_with_labels(seq2seq: Collator, t5: Any) -> None:
    batch = seq2seq.train(ROWS, 3)
    logits = aligned_logits(t5, batch, seq2seq=True)
    assert torch.isfinite(logits).all()
    alone = sum(
        float(t5(input_ids=torch.tensor([r.prompt]), labels=torch.tensor([r.answer])).loss)
        * len(r.answer)
        for r in ROWS
    )
    assert float(answer_loss(logits, batch.labels)) == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_misaligned_labels_would_be_seen(causal: Collator, llama: Any) -> None:
    """Negative control of the two tests above."""
    batch = causal.train(DECODER_ROWS)
    logits = aligned_logits(llama, batch, seq2seq=False)
    right = float(answer_loss(logits, batch.labels))
    wrong = float(answer_loss(logits.roll(1, dims=1), batch.labels))
    assert abs(right - wrong) > 1e-3


@torch.no_grad()
def test_generation_takes_the_prompts(causal: Collator, llama: Any) -> None:
    batch = causal.prompts(DECODER_ROWS)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "eos_token_id": EOS}
    together = llama.generate(**batch.inputs, **options)[:, 4:]
    for number, row in enumerate(DECODER_ROWS):
        ids = torch.tensor([row.prompt])
        alone = llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
            0, ids.shape[1] :
        ]
        assert together[number, : len(alone)].tolist() == alone.tolist()
