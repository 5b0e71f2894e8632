"""Rows of several sources as one training set.

Both mixes are functions of seed, stage and step alone: the same for any number of ranks, and exact
after a resume. Every source is read front to back, so that streams are read block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.order import Ints, generator
from accrete.pipeline.data.store import TrainRows

MIX_ORDER, BATCH_ORDER = 3, 6
"""Last parts of the keys that name random orders (see `order.generator`)."""


class Reader:
    """Runs of one source's rows, in that source's own order."""

    def __init__(self, source: TrainRows, global_batch: int) -> None:
        """Read `source`, whose steps are `global_batch` rows long."""
        self.source = source
        self._batch = global_batch
        self._held: tuple[int, list[EncodedRow]] | None = None

    def take(self, epoch: int, start: int, stop: int) -> list[EncodedRow]:
        """Rows `start` to `stop` (exclusive) of one epoch's order."""
        if stop <= start:
            return []
        first = start // self._batch
        steps = range(first, -(-stop // self._batch))
        rows = [row for number in steps for row in self._read(epoch, number)]
        return rows[start - first * self._batch : stop - first * self._batch]

    def pick(self, epoch: int, positions: Iterable[int]) -> dict[int, EncodedRow]:
        """Single rows of one epoch's order, by position; every batch is read once."""
        return {place: self.take(epoch, place, place + 1)[0] for place in sorted(positions)}

    def _read(self, epoch: int, number: int) -> list[EncodedRow]:
        step = epoch * self.source.steps_per_epoch + number
        if self._held is None or self._held[0] != step:
            self._held = (step, self.source.rows(step, 0, 1))
        return self._held[1]


class MixedRows:
    """Every row of every source once an epoch, in one random order; the `TrainRows` protocol.

    The sources are interleaved at random and each keeps its own order, which is random too.
    """

    def __init__(
        self, sources: Sequence[TrainRows], seed: int, stage: int, global_batch: int
    ) -> None:
        """Mix `sources`, whose steps are `global_batch` rows long, for `stage`."""
        self._readers = [Reader(source, global_batch) for source in sources]
        self._sizes = [source.num_rows for source in sources]
        self._key = (seed, stage)
        self._batch = global_batch
        self._turn: tuple[int, NDArray[np.uint16], Ints] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self._sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return -(-self.num_rows // self._batch)

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """See `TrainRows.rows`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        turn, starts = self._order(epoch)
        parts = [
            iter(reader.take(epoch, int(start), int(stop)))
            for reader, start, stop in zip(
                self._readers, starts[number], starts[number + 1], strict=True
            )
        ]
        place = number * self._batch
        whole = [next(parts[source]) for source in turn[place : place + self._batch].tolist()]
        return whole[rank::world]

    def _order(self, epoch: int) -> tuple[NDArray[np.uint16], Ints]:
        """[num_rows] source of each row; [steps + 1, sources] rows of each before a step."""
        if self._turn is None or self._turn[0] != epoch:
            sources = np.repeat(np.arange(len(self._sizes), dtype=np.uint16), self._sizes)
            turn = generator(*self._key, epoch, MIX_ORDER).permutation(sources)
            starts = np.zeros((self.steps_per_epoch + 1, len(self._sizes)), dtype=np.int64)
            cuts = [*range(0, self.num_rows, self._batch), self.num_rows]
            for step, (start, stop) in enumerate(pairwise(cuts)):
                counts = np.bincount(turn[start:stop], minlength=len(self._sizes))
                starts[step + 1] = starts[step] + counts
            self._turn = (epoch, turn, starts)
        return self._turn[1], self._turn[2]


class SharedBatches:
    """A fixed number of every global batch comes from a second source; the `TrainRows` protocol.

    An epoch is one pass over the first source; the second goes on from batch to batch and begins
    anew whenever it ends.
    """

    def __init__(
        self,
        rows: TrainRows,
        others: TrainRows,
        seed: int,
        stage: int,
        global_batch: int,
        num_others: int,
    ) -> None:
        """Mix two sources, whose steps are `global_batch` rows long.

        Args:
            rows: The first source.
            others: The second; at least one row.
            seed: The run's seed.
            stage: The stage.
            global_batch: Rows of a mixed batch; the last one of an epoch may be shorter.
            num_others: Rows of every batch that come from `others`: 1 to `global_batch` - 1.
        """
        self._first, self._second = Reader(rows, global_batch), Reader(others, global_batch)
        self._key = (seed, stage)
        self._own = global_batch - num_others
        self._others = num_others

    @property
    def num_rows(self) -> int:
        """Rows of one epoch, of both sources."""
        return self._first.source.num_rows + self.steps_per_epoch * self._others

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return -(-self._first.source.num_rows // self._own)

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """See `TrainRows.rows`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self._own
        stop = min(start + self._own, self._first.source.num_rows)
        whole = self._first.take(epoch, start, stop) + self._next(step)
        # Ranks take every so-many-th row: shuffled, they get alike shares of both sources.
        order = generator(*self._key, step, BATCH_ORDER).permutation(len(whole))
        return [whole[place] for place in order[rank::world].tolist()]

    def _next(self, step: int) -> list[EncodedRow]:
        """The rows of the second source for one step."""
        size = self._second.source.num_rows
        place, stop = step * self._others, (step + 1) * self._others
        rows: list[EncodedRow] = []
        while place < stop:
            epoch, start = divmod(place, size)
            end = min(start + stop - place, size)
            rows += self._second.take(epoch, start, end)
            place += end - start
        return rows
