"""Prepared rows, read in training and scoring order.

The order is a function of seed, task, epoch and global batch (`order.py`); `rows` may be asked for
any step at any time, and the step is the whole position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.handle import TaskHandle
from accrete.pipeline.data.order import (
    Ints,
    block_batches,
    block_order,
    epoch_order,
    rows_of_block,
)
from accrete.pipeline.data.shards import ARROW_FILE, Layout, shard_path, to_rows


class TrainRows(Protocol):
    """Training rows of one task in their order."""

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        ...

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """This rank's part of a global batch: every `world`-th row, from number `rank`.

        Args:
            step: Global step inside the task, from 0; steps count on through the epochs.
            rank: This rank.
            world: Number of ranks. The global batch does not depend on it.

        Returns:
            Rows; fewer than on other ranks, or none, where the batch does not divide.
        """
        ...


def open_train(
    handle: TaskHandle, seed: int, task_index: int, global_batch: int, window_batches: int
) -> TrainRows:
    """Open a task's training rows.

    Args:
        handle: The prepared task.
        seed: The run's seed.
        task_index: Number of the task in the sequence.
        global_batch: Rows of an optimizer step over all ranks.
        window_batches: Batches within which rows are sorted by length; 1: none.
    """
    kind = StreamedRows if handle.streamed else MappedRows
    return kind(Path(handle.train_dir), seed, task_index, global_batch, window_batches)


def open_eval(handle: TaskHandle) -> EvalRows:
    """Open the rows a task is scored on, in the order of its file."""
    return EvalRows(Path(handle.eval_dir))


class _Steps:
    """What both kinds of training rows share: the arithmetic of steps."""

    def __init__(
        self, folder: Path, seed: int, task_index: int, global_batch: int, window_batches: int
    ) -> None:
        if min(global_batch, window_batches) < 1:
            raise ValueError(
                f"global_batch ({global_batch}) and window_batches ({window_batches}) must be >= 1"
            )
        self._folder = folder
        self._layout = Layout.read(folder)
        self._seed = seed
        self._task = task_index
        self._batch = global_batch
        self._window = window_batches

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self._layout.rows

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of one epoch; the last may be short."""
        return -(-self._layout.rows // self._batch)

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return divmod(step, self.steps_per_epoch)


class MappedRows(_Steps):
    """Rows in a memory-mapped Arrow file, indexed by a permutation."""

    def __init__(
        self, folder: Path, seed: int, task_index: int, global_batch: int, window_batches: int
    ) -> None:
        super().__init__(folder, seed, task_index, global_batch, window_batches)
        self._data = _open_arrow(folder)
        self._lengths = _lengths(self._data)
        self._order: tuple[int, Ints] | None = None

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[n] prompt plus answer tokens of every row, without loading rows."""
        return self._lengths

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """See `TrainRows.rows`."""
        epoch, batch = self._place(step)
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(
                self._lengths, self._seed, self._task, epoch, self._batch, self._window
            )
            self._order = (epoch, order)
        start = batch * self._batch
        mine = self._order[1][start : start + self._batch][rank::world]
        return _select(self._data, mine)


class StreamedRows(_Steps):
    """Rows in Parquet shards, read block by block; one block is held at a time.

    A block is a run of rows as they were written, whole windows long. Blocks come in a permuted
    order and are shuffled inside, so a stream need not be shuffled beforehand, but rows far apart
    never share a batch.
    """

    def __init__(
        self, folder: Path, seed: int, task_index: int, global_batch: int, window_batches: int
    ) -> None:
        super().__init__(folder, seed, task_index, global_batch, window_batches)
        layout = self._layout
        self._per_block = block_batches(global_batch, window_batches, layout.shuffle_rows)
        self._blocks = -(-self.steps_per_epoch // self._per_block)
        self._turn: tuple[int, Ints] | None = None
        self._held: tuple[int, int, Any, Ints] | None = None
        self.blocks_read = 0
        """Blocks read from disk so far."""

    @property
    def block_rows(self) -> int:
        """Rows of a block; only the last may have fewer."""
        return self._per_block * self._batch

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        """See `TrainRows.rows`."""
        epoch, batch = self._place(step)
        place, within = divmod(batch, self._per_block)
        if self._turn is None or self._turn[0] != epoch:
            self._turn = (epoch, block_order(self._blocks, self._seed, self._task, epoch))
        block = int(self._turn[1][place])
        table, order = self._load(epoch, block)
        start = within * self._batch
        mine = order[start : start + self._batch][rank::world]
        return to_rows(table.take(mine), (mine + block * self.block_rows).tolist())

    def _load(self, epoch: int, block: int) -> tuple[Any, Ints]:
        """The rows of a block and their order in an epoch."""
        if self._held is not None and self._held[:2] == (epoch, block):
            return self._held[2], self._held[3]
        kept = self._held[2] if self._held is not None and self._held[1] == block else None
        self._held = None  # let go of the old block before the new one is read
        table = self._read(block) if kept is None else kept
        order = rows_of_block(
            table.column("length").to_numpy(),
            self._seed,
            self._task,
            epoch,
            block,
            self._batch,
            self._window,
        )
        self._held = (epoch, block, table, order)
        return table, order

    def _read(self, block: int) -> Any:
        """Read the row groups that a block touches, and keep its rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        layout, first = self._layout, block * self.block_rows
        last = min(first + self.block_rows, layout.rows)
        parts = []
        for shard in range(first // layout.shard_rows, -(-last // layout.shard_rows)):
            begin = shard * layout.shard_rows
            low, high = max(first - begin, 0), min(last - begin, layout.shard_rows)
            size = layout.group_rows
            groups = list(range(low // size, -(-high // size)))
            with pq.ParquetFile(str(shard_path(self._folder, shard))) as file:
                table = file.read_row_groups(groups, columns=["id", "prompt", "answer", "length"])
            skipped = groups[0] * size
            parts.append(table.slice(low - skipped, high - low))
        self.blocks_read += 1
        return pa.concat_tables(parts).combine_chunks()


class EvalRows(Sequence[EncodedRow]):
    """The rows a task is scored on."""

    def __init__(self, folder: Path) -> None:
        self._data = _open_arrow(folder)
        self._lengths = _lengths(self._data)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[n] prompt plus answer tokens of every row, without loading rows."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...

    def __getitem__(self, index: int | slice) -> EncodedRow | list[EncodedRow]:
        """One row, or the rows of a slice."""
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self.take([range(len(self))[index]])[0]

    def take(self, indices: Sequence[int]) -> list[EncodedRow]:
        """Rows by number, read together: several times faster than one by one."""
        return _select(self._data, np.asarray(indices, dtype=np.int64))

    def ids(self) -> list[str]:
        """The ids of all rows; reads nothing else."""
        return list(_values(self._data, "id"))

    def all_references(self) -> list[tuple[str, ...]]:
        """The references of all rows; reads nothing else."""
        return [tuple(found) for found in _values(self._data, "references")]

    def references(self, index: int) -> tuple[str, ...]:
        """Every right answer of a row, as text."""
        row = self._data.select_columns(["references"])[range(len(self))[index]]
        return tuple(row["references"])


def _open_arrow(folder: Path) -> Any:
    import datasets

    return datasets.Dataset.from_file(str(folder / ARROW_FILE))


def _lengths(data: Any) -> NDArray[np.int32]:
    """The length column as an array."""
    return np.asarray(data.data.column("length").to_numpy(), dtype=np.int32)


def _values(data: Any, name: str) -> Iterator[Any]:
    """One column as Python values, a batch of rows at a time."""
    for chunk in data.data.column(name).chunks:
        yield from chunk.to_pylist()


def _select(data: Any, indices: Ints) -> list[EncodedRow]:
    """Rows of a memory-mapped data set by number, in that order."""
    if not len(indices):
        return []
    found = data[indices.tolist()]
    return [
        EncodedRow(id, prompt, answer, int(index))
        for id, prompt, answer, index in zip(
            found["id"], found["prompt"], found["answer"], indices, strict=True
        )
    ]
