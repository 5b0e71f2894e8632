"""Rows to tensors, for encoder-decoders and decoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accrete.pipeline.data.encode import EncodedRow

IGNORED = -100
"""Label of a position that does not count."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model's forward."""
    labels: Tensor
    """[b, K] int64, -100 where ignored; logits[:, k] predicts labels[:, k], with no shift left to
    do. Decoders: the last K positions of the sequence, the only ones whose logits are made."""
    num_tokens: int
    """Label tokens that count."""
    ids: list[str]
    """Ids of the real rows."""
    real_rows: int
    """Rows before the padding rows."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return replace(
            self,
            inputs={
                name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()
            },
            labels=self.labels.to(device, non_blocking=True),
        )


class Collator:
    """Pads rows into batches."""

    def __init__(
        self, seq2seq: bool, pad_id: int, decoder_start_id: int | None, eos_id: int
    ) -> None:
        """Set the model's kind and special ids.

        Args:
            seq2seq: Encoder-decoder.
            pad_id: Fills up; never attended, so a decoder without one may give its end token.
            decoder_start_id: First decoder input of an encoder-decoder.
            eos_id: The one token of a padding row.

        Raises:
            ValueError: An encoder-decoder without a start id.
        """
        if seq2seq and decoder_start_id is None:
            raise ValueError("an encoder-decoder needs decoder_start_id (its config has it)")
        self._seq2seq = seq2seq
        self._pad = pad_id
        self._start = decoder_start_id if decoder_start_id is not None else eos_id
        self._dummy = EncodedRow("", [eos_id], [], -1)

    def train(self, rows: Sequence[EncodedRow], num_rows: int | None = None) -> Batch:
        """A batch with labels.

        Args:
            rows: Real rows; may be empty.
            num_rows: Fill up to so many rows with rows of one token and no label, so that every
                rank makes the same number of forwards; default: no filling.
        """
        filled = self._fill(rows, num_rows)
        if self._seq2seq:
            inputs, labels = self._encoder_decoder(filled)
        else:
            inputs, labels = self._decoder(filled)
        return self._batch(rows, inputs, labels)

    def prompts(self, rows: Sequence[EncodedRow], num_rows: int | None = None) -> Batch:
        """A batch of prompts alone, for generation; its `labels` are [b, 0]."""
        filled = [row.prompt for row in self._fill(rows, num_rows)]
        inputs = _padded(filled, self._pad, left=not self._seq2seq)
        return self._batch(rows, inputs, torch.empty((len(filled), 0), dtype=torch.long))

    def _fill(self, rows: Sequence[EncodedRow], num_rows: int | None) -> list[EncodedRow]:
        missing = 0 if num_rows is None else num_rows - len(rows)
        if missing < 0 or len(rows) + missing == 0:
            raise ValueError(f"{len(rows)} rows do not fit a batch of {num_rows}")
        return [*rows, *[self._dummy] * missing]

    def _batch(
        self, rows: Sequence[EncodedRow], inputs: dict[str, Tensor], labels: Tensor
    ) -> Batch:
        return Batch(
            inputs=inputs,
            labels=labels,
            num_tokens=int((labels != IGNORED).sum()),
            ids=[row.id for row in rows],
            real_rows=len(rows),
        )

    def _encoder_decoder(self, rows: Sequence[EncodedRow]) -> tuple[dict[str, Tensor], Tensor]:
        """Everything right-padded; the decoder reads the answer one step late."""
        inputs = _padded([row.prompt for row in rows], self._pad, left=False)
        shifted = [[self._start, *row.answer[:-1]] for row in rows]
        inputs["decoder_input_ids"] = _padded(shifted, self._pad, left=False)["input_ids"]
        labels = _padded([row.answer or [IGNORED] for row in rows], IGNORED, left=False)
        return inputs, labels["input_ids"]

    def _decoder(self, rows: Sequence[EncodedRow]) -> tuple[dict[str, Tensor], Tensor]:
        """Left-padded, so that the answers' logits are the last columns of every row."""
        inputs = _padded([row.prompt + row.answer[:-1] for row in rows], self._pad, left=True)
        positions = inputs["attention_mask"].cumsum(dim=1) - 1
        inputs["position_ids"] = positions.clamp(min=0)
        labels = _padded([row.answer or [IGNORED] for row in rows], IGNORED, left=True)
        return inputs, labels["input_ids"]


def _padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> dict[str, Tensor]:
    """Rows as `input_ids` and `attention_mask`, both [b, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, part] = torch.tensor(row, dtype=torch.long)
        mask[number, part] = 1
    return {"input_ids": ids, "attention_mask": mask}
