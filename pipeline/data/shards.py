"""Prepared rows on disk: one Arrow file for random access, or Parquet shards for a stream.

Which of the two becomes clear only when the rows have been counted, and they are never all in
memory: rows go to Arrow until there are too many, then what is there moves over to Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.fingerprint import write_json

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("answer", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("references", pa.list_(pa.string())),
    ]
)
"""`length` is prompt plus answer; `references` is empty for training rows."""

ARROW_FILE = "rows.arrow"
LAYOUT_FILE = "layout.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of a folder are cut; prepared data itself, because the order hangs on it."""

    rows: int = 0
    streamed: bool = False
    group_rows: int = 2048
    """Rows of a Parquet row group: the unit of reading."""
    shard_rows: int = 262_144
    """Rows of a Parquet file; a multiple of `group_rows`."""
    shuffle_rows: int = 16_384
    """A stream is shuffled inside blocks of about so many rows."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every data file."""

    def write(self, folder: Path) -> None:
        """Write the layout file."""
        write_json(folder / LAYOUT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """Read the layout file of a folder."""
        return cls(**json.loads((folder / LAYOUT_FILE).read_text(encoding="utf-8")))

    def complete(self, folder: Path) -> bool:
        """Whether every data file is there in its full size."""
        paths = {folder / name: size for name, size in self.files.items()}
        return self.rows > 0 and all(
            p.is_file() and p.stat().st_size == s for p, s in paths.items()
        )


def shard_path(folder: Path, number: int) -> Path:
    """File of the shard of that number."""
    return folder / f"rows-{number:05d}.parquet"


def to_table(rows: Sequence[EncodedRow], references: Sequence[Sequence[str]] | None) -> Any:
    """An Arrow table of rows."""
    columns = {
        "id": [row.id for row in rows],
        "prompt": [row.prompt for row in rows],
        "answer": [row.answer for row in rows],
        "length": [len(row.prompt) + len(row.answer) for row in rows],
        "references": [[] for _ in rows] if references is None else [list(r) for r in references],
    }
    return pa.table(columns, schema=SCHEMA)


def to_rows(table: Any, indices: Sequence[int]) -> list[EncodedRow]:
    """Rows of an Arrow table whose row numbers in the split are `indices`."""
    columns = (table.column(name).to_pylist() for name in ("id", "prompt", "answer"))
    return [
        EncodedRow(id, prompt, answer, int(index))
        for id, prompt, answer, index in zip(*columns, indices, strict=True)
    ]


class RowWriter:
    """Writes a split in one pass with bounded memory."""

    def __init__(self, folder: Path, layout: Layout, stream_above: int | None) -> None:
        """Open a folder.

        Args:
            folder: Where to write; made if absent.
            layout: Sizes; its `streamed` says to write shards from the start.
            stream_above: Number of rows above which Arrow gives way to shards; None: never.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._layout = layout
        self._stream_above = stream_above
        self._count = 0
        self._arrow: Any = None if layout.streamed else self._open_arrow()
        self._shards: _ShardWriter | None = (
            _ShardWriter(folder, layout) if layout.streamed else None
        )

    def add(
        self, rows: Sequence[EncodedRow], references: Sequence[Sequence[str]] | None = None
    ) -> None:
        """Append a batch of rows."""
        table = to_table(rows, references)
        self._count += len(rows)
        if self._arrow is not None and (
            self._stream_above is not None and self._count > self._stream_above
        ):
            self._move_over()
        if self._shards is not None:
            self._shards.add(table)
        else:
            self._arrow.write_table(table)

    def close(self) -> Layout:
        """Finish the files; the layout as it came out."""
        if self._shards is not None:
            self._shards.close()
        else:
            self._arrow.close()
        streamed = self._shards is not None
        files = {path.name: path.stat().st_size for path in sorted(self._folder.iterdir())}
        layout = replace(self._layout, rows=self._count, streamed=streamed, files=files)
        layout.write(self._folder)
        return layout

    def _open_arrow(self) -> Any:
        return pa.ipc.new_stream(str(self._folder / ARROW_FILE), SCHEMA)

    def _move_over(self) -> None:
        self._arrow.close()
        self._arrow = None
        self._shards = _ShardWriter(self._folder, self._layout)
        path = self._folder / ARROW_FILE
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                self._shards.add(pa.Table.from_batches([batch]))
        path.unlink()


class _ShardWriter:
    """zstd Parquet files whose row groups all have the same number of rows, but for the last."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._pending: list[Any] = []
        self._waiting = 0
        self._written = 0
        self._file: Any = None

    def add(self, table: Any) -> None:
        self._pending.append(table)
        self._waiting += table.num_rows
        if self._waiting >= self._layout.group_rows:
            self._flush(everything=False)

    def close(self) -> None:
        self._flush(everything=True)
        if self._file is not None:
            self._file.close()

    def _flush(self, *, everything: bool) -> None:
        for group in self._groups(everything):
            if self._written % self._layout.shard_rows == 0:
                if self._file is not None:
                    self._file.close()
                number = self._written // self._layout.shard_rows
                path = shard_path(self._folder, number)
                self._file = pq.ParquetWriter(str(path), SCHEMA, compression="zstd")
            self._file.write_table(group, row_group_size=self._layout.group_rows)
            self._written += group.num_rows

    def _groups(self, everything: bool) -> Iterator[Any]:
        if not self._waiting:
            return
        table = pa.concat_tables(self._pending)
        size = self._layout.group_rows
        whole = table.num_rows if everything else table.num_rows // size * size
        for start in range(0, whole, size):
            yield table.slice(start, min(size, whole - start))
        rest = table.slice(whole)
        self._pending = [rest] if rest.num_rows else []
        self._waiting = rest.num_rows
