"""Which rows a pass with `max_rows` takes: of every length, the same for all ranks and visitors."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from statistics_case import make_stage, toys

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.mix import MixedRows
from accrete.pipeline.data.shards import Layout, RowWriter
from accrete.pipeline.data.store import MappedRows, StreamedRows
from accrete.pipeline.statistics import (
    global_batches,
    visit_gradients,
    visit_inputs,
    visit_row_gradients,
)

ROWS, BATCH = 6000, 64


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(1).gamma(2.0, 40.0, ROWS).astype(int) + 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory, lengths):
    """Kind -> rows of those lengths, in batches of like lengths; windows as a recipe's default."""
    rows = [EncodedRow(str(i), [5] * (int(n) - 1), [1], i) for i, n in enumerate(lengths)]
    found = {}
    for kind, opened, window in (("mapped", MappedRows, 50), ("streamed", StreamedRows, 10)):
        folder = tmp_path_factory.mktemp(kind)
        layout = Layout(
            streamed=kind == "streamed", group_rows=512, shard_rows=2048, shuffle_rows=1000
        )
        writer = RowWriter(folder, layout, None)
        writer.add(rows)
        writer.close()
        found[kind] = partial(opened, folder, 3, 1, BATCH, window)
    found["mixed"] = lambda: MixedRows([found["mapped"](), found["streamed"]()], 3, 1, BATCH)
    return found


def stage_over(source):
    config = SimpleNamespace(train=SimpleNamespace(global_batch_size=BATCH))
    return SimpleNamespace(
        rows=source, config=config, global_batch=lambda step: source.rows(step, 0, 1)
    )


def distance(sample, population):
    """Of Kolmogorov and Smirnov: between the shares of rows up to any length."""
    cuts = np.unique(population)
    share = [np.searchsorted(np.sort(x), cuts, side="right") / len(x) for x in (sample, population)]
    return float(np.abs(share[0] - share[1]).max())


def size(row):
    return len(row.prompt) + len(row.answer)


@pytest.mark.parametrize("kind", ["mapped", "streamed", "mixed"])
@pytest.mark.parametrize("count", [256, 100])
def test_lengths_are_those_of_the_task(sources, lengths, kind, count):
    source = sources[kind]()
    picked = [row for batch in global_batches(stage_over(source), count) for row in batch]
    assert len(picked) == count
    if kind != "mixed":  # which holds every row twice
        assert len({row.index for row in picked}) == count
    assert distance([size(row) for row in picked], lengths) < 0.1
    assert np.mean([size(row) for row in picked]) == pytest.approx(lengths.mean(), rel=0.1)


def test_the_first_rows_would_be_of_a_few_lengths(sources, lengths):
    """Control: what is near in the order is alike in length."""
    source = sources["mapped"]()
    first = [size(row) for step in range(4) for row in source.rows(step, 0, 1)]
    assert len(first) == 256
    assert distance(first, lengths) > 0.15


@pytest.mark.parametrize("kind", ["mapped", "streamed"])
def test_positions_are_evenly_spread_over_the_first_epoch(sources, kind):
    order = [
        row.index for step in range(-(-ROWS // BATCH)) for row in sources[kind]().rows(step, 0, 1)
    ]
    place = {index: number for number, index in enumerate(order)}
    for count in (1, 7, 100, 4001, ROWS - 1):
        batches = list(global_batches(stage_over(sources[kind]()), count))
        assert {len(batch) for batch in batches[:-1]} <= {BATCH}
        places = sorted(place[row.index] for batch in batches for row in batch)
        assert len(places) == count
        ideal = (np.arange(count) + 0.5) * ROWS / count
        assert np.abs(np.asarray(places) + 0.5 - ideal).max() <= 0.5
        for batch in batches:
            assert [size(row) for row in batch] == sorted(size(row) for row in batch)


@pytest.mark.parametrize("limit", [None, ROWS, ROWS + 5])
def test_without_a_limit_batches_are_those_of_training(sources, limit):
    source = sources["mapped"]()
    batches = list(global_batches(stage_over(source), limit))
    expected = [source.rows(step, 0, 1) for step in range(source.steps_per_epoch)]
    assert batches == expected


def test_a_stream_is_read_block_by_block_and_once(sources):
    source = sources["streamed"]()
    blocks = -(-ROWS // source.block_rows)
    assert blocks > 3
    for _ in global_batches(stage_over(source), 300):
        assert len(source._held[2]) <= source.block_rows
    assert source.blocks_read == blocks


# -- on models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize("go", [visit_gradients, visit_row_gradients, visit_inputs])
def test_every_pass_takes_the_same_rows(tmp_path, go, micro, world):
    """For every number of ranks and every micro-batch."""
    seen = Counter()
    for rank in range(world):
        stage = make_stage(tmp_path / str(rank), "llama", micro=micro)
        stage.engine.rank, stage.engine.world = rank, world
        train = stage.collator.train

        def note(rows, size=None, train=train):
            seen.update(row.id for row in rows)
            return train(rows, size)

        if go is visit_inputs:  # it looks at the first two rows beforehand
            seen.subtract(row.id for row in stage.rows.all[:2])
        stage.collator.train = note
        assert go(stage, lambda *_: None, max_rows=10) == 10
    expected = Counter(row.id for row in toys.spread(stage.rows.all, 10))
    assert +seen == expected


def test_sums_over_batches_count_every_row(tmp_path):
    stage = make_stage(tmp_path, "llama")
    for limit, sizes in ((None, [8, 8, 5]), (10, [8, 2]), (8, [8]), (21, [8, 8, 5])):
        found = []
        count = visit_gradients(stage, lambda *_: None, max_rows=limit, after_batch=found.append)
        assert found == sizes
        assert count == sum(sizes)
