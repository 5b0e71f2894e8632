"""The order of rows against a NumPy oracle, for memory-mapped rows and for streams."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accrete.pipeline.data import store
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.data.shards import ARROW_FILE, Layout, RowWriter, shard_path
from accrete.pipeline.data.store import MappedRows, StreamedRows, open_eval, open_train

ROWS, BATCH, WINDOW = 1003, 32, 5
SMALL = Layout(group_rows=64, shard_rows=256, shuffle_rows=300)


def make_rows(count: int) -> list[EncodedRow]:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 60, count)
    return [EncodedRow(f"id{i}", [i] * int(n), [i, 1], i) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prepared")
    rows = make_rows(ROWS)
    for kind, streamed in (("mapped", False), ("streamed", True)):
        layout = dataclasses.replace(SMALL, streamed=streamed)
        writer = RowWriter(root / kind, layout, None)
        for start in range(0, ROWS, 100):
            writer.add(rows[start : start + 100])
        assert writer.close().streamed is streamed
    return {kind: root / kind for kind in ("mapped", "streamed")}


def handle_of(folder: Path, streamed: bool, rows: int = ROWS) -> TaskHandle:
    empty = SplitStats(
        rows=rows,
        truncated_pct=0,
        mean_prompt_tokens=1,
        max_prompt_tokens=1,
        mean_answer_tokens=1,
        max_answer_tokens=1,
    )
    return TaskHandle(
        name="t",
        metric="exact_match",
        labels=None,
        train_dir=str(folder),
        eval_dir=str(folder),
        num_train=rows,
        num_eval=rows,
        streamed=streamed,
        stats=TaskStats(train=empty, eval=empty),
        fingerprint="",
    )


@pytest.fixture(params=["mapped", "streamed"])
def opened(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """Opens the rows of either kind: (seed, task, batch, window) -> TrainRows."""
    kind = str(request.param)

    def open_rows(
        seed: int = 3, task: int = 2, batch: int = BATCH, window: int = WINDOW
    ) -> store.TrainRows:
        return open_train(handle_of(folders[kind], kind == "streamed"), seed, task, batch, window)

    return open_rows


def numbers(rows: list[EncodedRow]) -> list[int]:
    return [row.index for row in rows]


def batches(rows: store.TrainRows, steps: range) -> list[list[int]]:
    return [numbers(rows.rows(step, 0, 1)) for step in steps]


def sort_windows(order: list[int], lengths: dict[int, int], *key: int) -> list[list[int]]:
    """Oracle: full batches sorted in windows and turned; the short rest as it is."""
    whole = len(order) // BATCH * BATCH
    out: list[list[int]] = []
    for w, start in enumerate(range(0, whole, WINDOW * BATCH)):
        window = sorted(order[start : min(start + WINDOW * BATCH, whole)])
        window.sort(key=lambda i: lengths[i])  # stable, so ties are by row number
        cut = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
        turn = np.random.Generator(np.random.PCG64([*key, w + 1])).permutation(len(cut))
        out += [cut[i] for i in turn]
    return out + ([order[whole:]] if order[whole:] else [])


@pytest.mark.parametrize("epoch", [0, 1])
def test_mapped_order_is_the_oracles(folders: dict[str, Path], epoch: int) -> None:
    lengths = {r.index: len(r.prompt) + len(r.answer) for r in make_rows(ROWS)}
    shuffled = np.random.Generator(np.random.PCG64([3, 2, epoch])).permutation(ROWS).tolist()
    expected = sort_windows(shuffled, lengths, 3, 2, epoch, 1)
    rows = MappedRows(folders["mapped"], 3, 2, BATCH, WINDOW)
    steps = rows.steps_per_epoch
    assert steps == 32
    assert batches(rows, range(epoch * steps, (epoch + 1) * steps)) == expected


@pytest.mark.parametrize("epoch", [0, 1])
def test_streamed_order_is_the_oracles(folders: dict[str, Path], epoch: int) -> None:
    lengths = {r.index: len(r.prompt) + len(r.answer) for r in make_rows(ROWS)}
    block = 10 * BATCH  # two windows of five batches hold at least 300 rows
    starts = list(range(0, ROWS, block))
    turn = np.random.Generator(np.random.PCG64([3, 2, epoch])).permutation(len(starts) - 1)
    expected: list[list[int]] = []
    for b in [*turn.tolist(), len(starts) - 1]:
        inside = list(range(starts[b], min(starts[b] + block, ROWS)))
        key = (3, 2, epoch, 2, b + 1)
        order = np.random.Generator(np.random.PCG64(key)).permutation(len(inside))
        local = [inside[i] for i in order]
        # ties are broken by the number inside the block, which orders as the row number does
        expected += sort_windows(local, lengths, *key)
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    steps = rows.steps_per_epoch
    assert batches(rows, range(epoch * steps, (epoch + 1) * steps)) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_rebuilds_the_same_batches(opened: Any, world: int) -> None:
    whole = opened()
    ranks = [opened() for _ in range(world)]
    for step in range(2 * whole.steps_per_epoch):
        parts = [numbers(ranks[r].rows(step, r, world)) for r in range(world)]
        batch = numbers(whole.rows(step, 0, 1))
        rebuilt: list[int] = [-1] * len(batch)
        for r, part in enumerate(parts):
            rebuilt[r::world] = part
        assert rebuilt == batch


@pytest.mark.parametrize("batch", [1, 7, 32, 1003, 2000])
@pytest.mark.parametrize("window", [1, 50])
def test_every_epoch_has_every_row_once(opened: Any, batch: int, window: int) -> None:
    rows = opened(batch=batch, window=window)
    per = rows.steps_per_epoch
    assert per == -(-ROWS // batch)
    for epoch in (0, 1) if batch > 1 else (0,):
        found = batches(rows, range(epoch * per, (epoch + 1) * per))
        assert Counter(i for b in found for i in b) == Counter(range(ROWS))
        assert all(len(b) == batch for b in found[:-1])


def test_resume_is_the_suffix_and_steps_may_come_in_any_order(opened: Any) -> None:
    straight = batches(opened(), range(70))
    for begin in (0, 17, 31, 32, 40, 69):
        assert batches(opened(), range(begin, 70)) == straight[begin:]
    jumping = opened()
    for step in np.random.default_rng(0).permutation(70).tolist():
        assert numbers(jumping.rows(step, 0, 1)) == straight[step]


def test_order_depends_on_seed_task_and_epoch_only(opened: Any) -> None:
    per = opened().steps_per_epoch
    first = batches(opened(), range(per))
    assert first == batches(opened(), range(per))
    assert first != batches(opened(), range(per, 2 * per))
    assert first != batches(opened(seed=4), range(per))
    assert first != batches(opened(task=3), range(per))


def test_rows_are_the_rows_written(opened: Any) -> None:
    written = make_rows(ROWS)
    rows = opened()
    for step in (0, 9, 31):
        for row in rows.rows(step, 0, 1):
            assert row == written[row.index]


def test_a_rank_beyond_a_short_batch_gets_no_rows(opened: Any) -> None:
    rows = opened()
    last = rows.steps_per_epoch - 1
    assert [len(rows.rows(last, r, 16)) for r in range(16)] == [1] * 11 + [0] * 5


def test_windows_bring_like_lengths_together_and_1_leaves_the_permutation(opened: Any) -> None:
    def spread(window: int) -> float:
        rows = opened(window=window)
        found = [rows.rows(step, 0, 1) for step in range(rows.steps_per_epoch - 1)]
        return float(np.mean([np.ptp([len(r.prompt) for r in batch]) for batch in found]))

    assert spread(5) < spread(1) / 3


def test_bad_arguments(opened: Any) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        opened(batch=0)
    with pytest.raises(ValueError, match="step must be >= 0"):
        opened().rows(-1, 0, 1)


def test_stream_reads_one_block_on_resume_and_each_block_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    rows.rows(25, 0, 1)
    assert rows.blocks_read == 1
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    batches(rows, range(rows.steps_per_epoch))
    assert rows.blocks_read == 4


def test_stream_never_holds_more_than_two_blocks(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    alive: list[weakref.ref[Any]] = []
    most, sizes, read = 0, [], StreamedRows._read

    def watch(self: StreamedRows, block: int) -> Any:
        nonlocal most
        table = read(self, block)
        alive.append(weakref.ref(table))
        sizes.append(table.num_rows)
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return table

    monkeypatch.setattr(StreamedRows, "_read", watch)
    batches(rows, range(2 * rows.steps_per_epoch))
    assert most == 1  # the old block is gone before the new one is there
    assert max(sizes) == rows.block_rows == 320
    assert len(sizes) >= 7


def test_stream_touches_only_the_row_groups_of_its_block(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    read: list[tuple[str, list[int]]] = []

    class Watched(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            super().__init__(path)
            self.path = path

        def read_row_groups(self, groups: list[int], **options: Any) -> Any:
            read.append((Path(self.path).name, groups))
            return super().read_row_groups(groups, **options)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    rows._read(1)  # rows 320 to 639: groups 1 to 3 of shard 1, groups 0 and 1 of shard 2
    assert read == [("rows-00001.parquet", [1, 2, 3]), ("rows-00002.parquet", [0, 1])]


def test_block_size_does_not_depend_on_ranks(folders: dict[str, Path]) -> None:
    rows = StreamedRows(folders["streamed"], 3, 2, BATCH, WINDOW)
    before = rows.block_rows
    rows.rows(0, 1, 8)
    assert rows.block_rows == before


def test_writer_moves_to_shards_when_there_are_too_many_rows(tmp_path: Path) -> None:
    rows = make_rows(500)
    for above, streamed in ((499, True), (500, False)):
        folder = tmp_path / str(above)
        writer = RowWriter(folder, SMALL, above)
        for start in range(0, 500, 70):
            writer.add(rows[start : start + 70])
        layout = writer.close()
        assert (layout.streamed, layout.rows) == (streamed, 500)
        assert (folder / ARROW_FILE).exists() is not streamed
        assert shard_path(folder, 1).exists() is streamed
        found = open_train(handle_of(folder, streamed, 500), 0, 0, 8, 4)
        seen = [row for step in range(found.steps_per_epoch) for row in found.rows(step, 0, 1)]
        assert sorted(seen, key=lambda r: r.index) == rows
        assert layout.complete(folder)
        next(p for p in folder.iterdir() if p.name != "layout.json").write_bytes(b"short")
        assert not layout.complete(folder)


def test_eval_rows(tmp_path: Path) -> None:
    rows = make_rows(50)
    writer = RowWriter(tmp_path, Layout(), None)
    writer.add(rows[:30], [(r.id, "other") for r in rows[:30]])
    writer.add(rows[30:], [(r.id,) for r in rows[30:]])
    writer.close()
    found = open_eval(handle_of(tmp_path, False, 50))
    assert len(found) == 50
    assert list(found) == rows
    assert found[-1] == rows[-1]
    assert found[3:6] == rows[3:6]
    assert found.take([40, 2]) == [rows[40], rows[2]]
    assert found.references(2) == ("id2", "other")
    assert found.references(49) == ("id49",)
    assert found.ids() == [row.id for row in rows]
    assert found.all_references() == [found.references(i) for i in range(50)]
    assert found.lengths.tolist() == [len(r.prompt) + len(r.answer) for r in rows]
    with pytest.raises(IndexError):
        found[50]
