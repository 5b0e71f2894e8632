"""Seeded full training of a small model on prompts and answers, in one process.

This makes the models that accrete starts from; tasks are learned by `train_task`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accrete.pipeline.data.collate import Collator
from accrete.pipeline.data.encode import EncodedRow, Encoder
from accrete.pipeline.stage import aligned_logits, row_losses

if TYPE_CHECKING:
    from accrete.pipeline.data.prompts import Prompt
    from accrete.pipeline.models.cache import Progress

WINDOW = 8
"""Batches that are sorted by length together."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """How long and how fast."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


@contextmanager
def one_thread(seed: int) -> Iterator[None]:
    """Run with one thread and a fixed seed, and give both back as they were.

    One thread gives the same sums on every machine of a kind, and other processes on the same
    cores do not slow it down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def encode_pairs(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Prompt, str]],
    source_tokens: int,
    target_tokens: int,
) -> tuple[list[EncodedRow], Collator]:
    """Prompts and answers as rows of the model's kind, and what makes batches of them."""
    seq2seq = bool(model.config.is_encoder_decoder)
    encoder = Encoder(
        tokenizer,
        seq2seq=seq2seq,
        max_source_tokens=source_tokens,
        max_target_tokens=target_tokens,
    )
    encoded = encoder.encode([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
    rows = [
        EncodedRow(str(index), encoding.prompt, encoding.answer, index)
        for index, encoding in enumerate(encoded)
        if encoding.fits
    ]
    start = model.config.decoder_start_token_id if seq2seq else None
    return rows, Collator(seq2seq, tokenizer.pad_token_id, start, tokenizer.eos_token_id)


def pretrain(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    collator: Collator,
    settings: PretrainSettings,
    progress: Progress,
) -> float:
    """Train all weights in fp32 with AdamW, warm-up and a cosine to zero.

    Args:
        model: A Hugging Face encoder-decoder or decoder; changed in place, left in eval mode.
        rows: Encoded examples; passed over as often as the steps need.
        collator: Of the same kind as the model.
        settings: Steps, batch, rate.
        progress: Told about ten times how far it is.

    Returns:
        The last step's loss per label token.
    """
    seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model.train()
    value = math.nan
    for step, batch in zip(range(settings.steps), _batches(rows, settings), strict=False):
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        rate = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(warm, rate)
        chunk = collator.train(batch)
        losses = row_losses(aligned_logits(model, chunk, seq2seq), chunk.labels)
        loss = losses.sum() / chunk.num_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        if (step + 1) % max(1, settings.steps // 10) == 0:
            value = loss.item()
            progress(f"Pre-training: step {step + 1} of {settings.steps}, loss {value:.2f}")
    model.eval()
    return value


def _batches(rows: Sequence[EncodedRow], settings: PretrainSettings) -> Iterator[list[EncodedRow]]:
    """Endless batches, shuffled every pass, of rows of about the same length."""
    rng = random.Random(f"accrete batches {settings.seed}")
    size = min(settings.batch_size, len(rows))
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - size + 1, size * WINDOW):
            window = order[start : start + size * WINDOW]
            window.sort(key=lambda i: (len(rows[i].prompt), i))
            batches = [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
            rng.shuffle(batches)
            for batch in batches:
                yield [rows[i] for i in batch]
