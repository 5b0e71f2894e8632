"""Mixed rows: nothing lost, nothing twice, the same for any number of ranks, any step by itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.kept import KeptRows, KeptSource
from accrete.pipeline.data.mix import MixedRows, Reader, SharedBatches


class Source:
    """Rows `name-0`, `name-1`, ... in an order of their own for every epoch."""

    def __init__(self, name: int, num_rows: int, batch: int) -> None:
        self.name, self.num_rows, self.batch = name, num_rows, batch
        self.steps_per_epoch = -(-num_rows // batch)
        self.asked: list[int] = []

    def order(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.name, epoch, 1])
        return [int(i) for i in rng.permutation(self.num_rows)]

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        self.asked.append(step)
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self.batch
        return [
            EncodedRow(f"{self.name}-{i}", [self.name, i], [i], i)
            for i in self.order(epoch)[start : start + self.batch][rank::world]
        ]


def sources(batch: int = 8) -> list[Source]:
    return [Source(0, 21, batch), Source(1, 5, batch), Source(2, 40, batch)]


def ids(rows: list[EncodedRow]) -> list[str]:
    return [row.id for row in rows]


def epoch_of(mix: MixedRows | SharedBatches, epoch: int) -> list[str]:
    first = epoch * mix.steps_per_epoch
    steps = range(first, first + mix.steps_per_epoch)
    return [name for step in steps for name in ids(mix.rows(step, 0, 1))]


def test_an_epoch_is_every_row_of_every_source_once() -> None:
    mix = MixedRows(sources(), seed=1, stage=2, global_batch=8)
    everything = sorted(f"{s.name}-{i}" for s in sources() for i in range(s.num_rows))
    assert mix.num_rows == len(everything) == 66
    assert mix.steps_per_epoch == 9
    for epoch in range(3):
        assert sorted(epoch_of(mix, epoch)) == everything
    assert [len(mix.rows(step, 0, 1)) for step in range(9)] == [8] * 8 + [2]


def test_every_source_keeps_its_own_order() -> None:
    mix = MixedRows(sources(), seed=1, stage=2, global_batch=8)
    for epoch in range(2):
        seen = epoch_of(mix, epoch)
        for source in sources():
            mine = [int(name.split("-")[1]) for name in seen if name.startswith(f"{source.name}-")]
            assert mine == source.order(epoch)


def test_sources_are_interleaved_evenly() -> None:
    """Each third of an epoch holds about a third of each source; a concatenation would not."""
    big = [Source(0, 3000, 50), Source(1, 1500, 50)]
    seen = epoch_of(MixedRows(big, seed=0, stage=1, global_batch=50), 0)
    for third in range(3):
        part = seen[third * 1500 : (third + 1) * 1500]
        share = sum(name.startswith("0-") for name in part) / len(part)
        # Hypergeometric: standard deviation below 0.01.
        assert share == pytest.approx(2 / 3, abs=0.04)


@pytest.mark.parametrize("make", ["mixed", "shared"])
def test_any_step_alone_and_any_number_of_ranks(make: str) -> None:
    def build() -> MixedRows | SharedBatches:
        if make == "mixed":
            return MixedRows(sources(), seed=1, stage=2, global_batch=8)
        first, second, _ = sources()
        return SharedBatches(first, second, seed=1, stage=2, global_batch=8, num_others=3)

    through = build()
    whole = [ids(through.rows(step, 0, 1)) for step in range(2 * through.steps_per_epoch)]
    for step in np.random.default_rng(0).permutation(4 * len(whole)) % len(whole):
        assert ids(through.rows(int(step), 0, 1)) == whole[step]
    for step in range(len(whole)):
        assert ids(build().rows(step, 0, 1)) == whole[step]
        for world in (2, 4):
            parts = [ids(build().rows(step, rank, world)) for rank in range(world)]
            assert [parts[i % world][i // world] for i in range(len(whole[step]))] == whole[step]


def test_order_depends_on_seed_stage_and_epoch() -> None:
    def order(seed: int, stage: int, epoch: int) -> list[str]:
        # Sources whose own order is fixed: what differs is the mix.
        fixed = [Source(0, 21, 8), Source(1, 30, 8)]
        for source in fixed:
            source.order = lambda epoch, n=source.num_rows: list(range(n))  # type: ignore[misc, method-assign]
        return epoch_of(MixedRows(fixed, seed, stage, 8), epoch)

    first = order(1, 2, 0)
    assert order(1, 2, 0) == first
    assert len({tuple(order(*key)) for key in [(1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 1)]}) == 4


def test_batches_of_a_source_are_read_once_and_in_order() -> None:
    """What a stream needs."""
    parts = sources()
    epoch_of(MixedRows(parts, seed=1, stage=2, global_batch=8), 0)
    for source in parts:
        assert source.asked == list(range(source.steps_per_epoch))


def test_shared_batches_hold_a_fixed_number_of_others() -> None:
    first, second, _ = sources()
    mix = SharedBatches(first, second, seed=1, stage=1, global_batch=8, num_others=3)
    assert mix.steps_per_epoch == 5  # 21 rows, 5 a batch
    assert mix.num_rows == 21 + 5 * 3
    for step in range(10):
        counts = Counter(name[0] for name in ids(mix.rows(step, 0, 1)))
        assert counts == {"0": 5 if step % 5 < 4 else 1, "1": 3}
    seen = [name for epoch in range(2) for name in epoch_of(mix, epoch)]
    assert sorted(seen[: len(seen) // 2])[:21] == sorted(f"0-{i}" for i in range(21))
    # The others go round and round: 30 of 5 rows are 6 each.
    assert Counter(name for name in seen if name[0] == "1") == {f"1-{i}": 6 for i in range(5)}
    places = {ids(mix.rows(step, 0, 1)).index(f"0-{first.order(0)[5 * step]}") for step in range(4)}
    assert len(places) > 1  # shuffled inside the batch


def test_picking_reads_each_batch_once() -> None:
    source = Source(0, 21, 8)
    found = Reader(source, 8).pick(1, [20, 3, 9, 2])
    assert {place: row.index for place, row in found.items()} == {
        place: source.order(1)[place] for place in (2, 3, 9, 20)
    }
    assert source.asked == [3, 4, 5]  # epoch 1 begins at step 3


def kept_rows() -> list[tuple[int, EncodedRow]]:
    return [
        (0, EncodedRow("a", [5, 6, 7], [1], 12)),
        (3, EncodedRow("b", [], [9, 1], 2**40)),
        (1, EncodedRow("c", [128_000], [], 0)),
    ]


def test_kept_rows_come_back_as_they_were() -> None:
    kept = KeptRows.pack(kept_rows())
    for (stage, row), (old_stage, old) in zip(kept.unpack(), kept_rows(), strict=True):
        assert (stage, row.prompt, row.answer, row.index) == (
            old_stage,
            old.prompt,
            old.answer,
            old.index,
        )
        assert row.id == f"{old_stage}/{old.index}"
    again = KeptRows.pack(kept.unpack())
    for name in ("tokens", "lengths", "origin"):
        assert torch.equal(getattr(again, name), getattr(kept, name))
    assert [row.index for row in kept.take([2, 0])] == [0, 12]
    assert kept.num_bytes == 7 * 4 + 3 * 2 * 4 + 3 * 2 * 8


def test_kept_rows_are_served_in_a_new_order_every_epoch() -> None:
    kept = KeptRows.pack([(0, EncodedRow("", [i], [i], i)) for i in range(30)])
    source = KeptSource(kept, seed=1, stage=2, global_batch=8)
    assert (source.num_rows, source.steps_per_epoch) == (30, 4)
    epochs = [
        [row.index for step in range(4 * e, 4 * e + 4) for row in source.rows(step, 0, 1)]
        for e in range(2)
    ]
    assert epochs[0] != epochs[1]
    assert all(sorted(order) == list(range(30)) for order in epochs)
    assert [row.index for row in source.rows(3, 1, 2)] == epochs[0][25::2]
