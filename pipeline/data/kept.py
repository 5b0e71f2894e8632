"""Rows kept in memory as integer tensors, so that they can be saved beside a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.order import generator

KEPT_ORDER = 4
"""Last part of the key that names the order of kept rows (see `order.generator`)."""


@dataclass(frozen=True)
class KeptRows:
    """Token ids of n rows and where they came from."""

    tokens: Tensor
    """[sum of all lengths] int32: prompt and answer of row 0, of row 1, ..."""
    lengths: Tensor
    """[n, 2] int32: tokens of prompt and answer."""
    origin: Tensor
    """[n, 2] int64: stage of the row's task, and its number among that task's rows."""

    @classmethod
    def pack(cls, rows: Sequence[tuple[int, EncodedRow]]) -> KeptRows:
        """Keep rows, each with the stage of its task."""
        flat = [token for _, row in rows for token in (*row.prompt, *row.answer)]
        lengths = [(len(row.prompt), len(row.answer)) for _, row in rows]
        origin = [(stage, row.index) for stage, row in rows]
        return cls(
            torch.tensor(flat, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32).view(-1, 2),
            torch.tensor(origin, dtype=torch.int64).view(-1, 2),
        )

    def unpack(self) -> list[tuple[int, EncodedRow]]:
        """Inverse of `pack`; a row's id now says where it came from: `STAGE/NUMBER`."""
        stages: list[int] = self.origin[:, 0].tolist()
        return list(zip(stages, self.take(range(len(self))), strict=True))

    def take(self, numbers: Sequence[int]) -> list[EncodedRow]:
        """Some rows, in the order asked for."""
        ends = self.lengths.sum(1).cumsum(0).tolist()
        rows = []
        for number in numbers:
            prompt, answer = self.lengths[number].tolist()
            stage, index = self.origin[number].tolist()
            start = ends[number] - prompt - answer
            tokens = self.tokens[start : ends[number]].tolist()
            row = EncodedRow(f"{stage}/{index}", tokens[:prompt], tokens[prompt:], index)
            rows.append(row)
        return rows

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class KeptSource:
    """Kept rows in a new random order every epoch; the `TrainRows` protocol."""

    def __init__(self, kept: KeptRows, seed: int, stage: int, global_batch: int) -> None:
        """Serve `kept` (at least one row) during `stage` in batches of `global_batch`."""
        self._kept = kept
        self._key = (seed, stage)
        self._batch = global_batch

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._kept)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return -(-self.num_rows // self._batch)

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """See `TrainRows.rows`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = generator(*self._key, epoch, KEPT_ORDER).permutation(self.num_rows)
        start = number * self._batch
        return self._kept.take(order[start : start + self._batch][rank::world].tolist())
