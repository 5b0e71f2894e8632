"""Replay: which rows are kept, that they come back, and that nothing else is needed for it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.data.kept import KeptRows
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import ConfigError, MethodError
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.methods.replay import Replay, ReplayConfig, quota, reservoir
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
ROWS = 21


def make(folder, **settings):
    train = settings.pop("train", None)
    tasks = settings.pop("tasks", 3)
    return toys.make_parts(
        ALONE,
        folder,
        model="llama",
        zero=None,
        micro=8,
        method="replay",
        settings=settings,
        tasks=tasks,
        train=train,
        every_steps=1,
    )


def events(folder, kind):
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]


def by_origin(count=3):
    """(stage, row number) -> the row as its task has it."""
    return {(t, row.index): row for t in range(count) for row in toys.ToyRows(t, ROWS, 8).all}


def kept_origins(method):
    return [(stage, row.index) for stage, row in method.memory.unpack()]


def assert_rows_are_real(rows_with_stage):
    originals = by_origin()
    for stage, row in rows_with_stage:
        original = originals[stage, row.index]
        assert (row.prompt, row.answer) == (original.prompt, original.answer)


# -- choosing --------------------------------------------------------------------------------


def test_quota_is_a_uniform_sample_without_replacement():
    counts: Counter[int] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(6000):
        chosen = quota(np.random.default_rng(seed), 2, 5)
        assert len(set(chosen)) == 2
        counts.update(chosen)
        pairs[tuple(chosen)] += 1
    assert len(pairs) == 10
    # Expected 600 a pair, chi-square with 9 degrees of freedom: 27.9 at p = 0.001.
    assert sum((n - 600) ** 2 / 600 for n in pairs.values()) < 27.9
    assert quota(np.random.default_rng(0), 9, 4) == [0, 1, 2, 3]


def fill(seed, size, tasks, choose=reservoir):
    """Slots after a stream of tasks; a row is its number in the whole stream."""
    slots: dict[int, int] = {}
    seen = 0
    for task, count in enumerate(tasks):
        rng = np.random.default_rng([seed, task + 1])
        slots.update({s: seen + row for s, row in choose(rng, size, seen, count).items()})
        seen += count
    return slots


TASKS = (3, 7, 1, 9)


def chi_square(choose):
    """Against a uniform sample of 5 of 20, over fixed seeds."""
    trials, size = 4000, 5
    counts: Counter[int] = Counter()
    for seed in range(trials):
        slots = fill(seed, size, TASKS, choose)
        assert sorted(slots) == list(range(size))
        assert len(set(slots.values())) == size
        counts.update(slots.values())
    expected = trials * size / sum(TASKS)
    return sum((counts[row] - expected) ** 2 / expected for row in range(sum(TASKS)))


def test_reservoir_is_a_uniform_sample_of_the_whole_stream():
    # 19 degrees of freedom: 43.8 at p = 0.001 (inclusions exclude each other, so less is expected).
    assert chi_square(reservoir) < 43.8


def test_a_reservoir_that_forgets_what_it_has_seen_is_not_uniform():
    """Control: the test above can tell."""

    def wrong(rng, size, seen, count):
        return reservoir(rng, size, min(seen, size), count)

    assert chi_square(wrong) > 200


def test_reservoir_by_hand():
    """Algorithm R written row by row, on the same draws."""
    for seed in range(50):
        slots: dict[int, int] = {}
        draws = np.random.default_rng(seed).integers(0, np.arange(4, 24) + 1)
        for row, total in enumerate(range(4, 24)):
            if total < 6:
                slots[total] = row
            elif draws[row] < 6:
                slots[int(draws[row])] = row
        assert reservoir(np.random.default_rng(seed), 6, 4, 20) == slots
    assert reservoir(np.random.default_rng(0), 6, 0, 4) == {0: 0, 1: 1, 2: 2, 3: 3}


# -- a run -----------------------------------------------------------------------------------


def test_per_task_quota_is_exact_and_old_rows_stay(tmp_path):
    parts = make(tmp_path, rows=4)
    method, seen = parts.method, []
    method.after_consolidation = lambda stage: seen.append(kept_origins(method))
    StageRunner(parts).run()
    assert [len(origins) for origins in seen] == [4, 8, 12]
    assert seen[2][:8] == seen[1]
    assert seen[1][:4] == seen[0]
    assert Counter(stage for stage, _ in seen[2]) == {0: 4, 1: 4, 2: 4}
    assert len(set(seen[2])) == 12
    assert_rows_are_real(method.memory.unpack())
    assert method.seen == 3 * ROWS


def test_fraction_is_rounded_up(tmp_path):
    parts = make(tmp_path, fraction=0.1, tasks=2)
    StageRunner(parts).run()
    assert Counter(stage for stage, _ in kept_origins(parts.method)) == {0: 3, 1: 3}


def test_a_whole_number_of_rows_is_not_rounded_up():
    """In floating point 0.07 x 100 is 7.000000000000001."""
    assert [Replay(ReplayConfig(fraction=f))._quota(100) for f in (0.07, 0.14, 0.29)] == [7, 14, 29]
    assert [Replay(ReplayConfig(fraction=f))._quota(21) for f in (1e-9, 0.1, 1.0)] == [1, 3, 21]


def test_reservoir_keeps_its_size_and_mixes_tasks(tmp_path):
    parts = make(tmp_path, memory="reservoir", rows=12)
    StageRunner(parts).run()
    origins = kept_origins(parts.method)
    assert len(origins) == len(set(origins)) == 12
    assert {stage for stage, _ in origins} == {0, 1, 2}
    assert_rows_are_real(parts.method.memory.unpack())


def test_new_and_kept_rows_are_trained_once_an_epoch(tmp_path):
    parts = make(tmp_path, rows=4)
    trained: dict[int, list[tuple[str, tuple[int, ...]]]] = {}

    def record(stage):
        for row in stage.global_batch(stage.step):
            trained.setdefault(stage.index, []).append((row.id, tuple(row.prompt)))

    parts.method.before_step = record
    memories = []
    parts.method.on_task_start = lambda stage: memories.append(parts.method.memory)
    StageRunner(parts).run()
    for index in range(3):
        own = [(row.id, tuple(row.prompt)) for row in toys.ToyRows(index, ROWS, 8).all]
        kept = [] if memories[index] is None else memories[index].unpack()
        expected = own + [(row.id, tuple(row.prompt)) for _, row in kept]
        assert sorted(trained[index]) == sorted(expected)
    assert len(trained[2]) == ROWS + 8
    started = events(tmp_path, "stage_started")
    assert [(e["steps"], e["rows"]) for e in started] == [(3, 21), (4, 25), (4, 29)]


def test_share_replays_in_every_batch(tmp_path):
    parts = make(tmp_path, rows=4, share=0.25, tasks=2)
    kept = []

    def record(stage):
        if stage.index:
            rows = stage.global_batch(stage.step)
            kept.append(sum(row.id.startswith("0/") for row in rows))

    parts.method.before_step = record
    StageRunner(parts).run()
    # 21 new rows, 6 a batch of 8.
    assert kept == [2, 2, 2, 2]


def test_choice_depends_on_the_seed_alone(tmp_path):
    def origins(name, seed, **more):
        parts = make(tmp_path / name, rows=4, tasks=2, **more)
        parts.config = dataclasses.replace(parts.config, seed=seed)
        StageRunner(parts).run()
        return kept_origins(parts.method)

    first = origins("a", 3)
    assert origins("b", 3, train={"learning_rate": 1e-4}) == first
    assert origins("c", 4) != first


def test_resuming_needs_no_rows_of_earlier_tasks(tmp_path):
    """Cut in the middle of the third task; no row of the first two can be read any more."""
    whole = make(tmp_path / "whole", rows=4)
    StageRunner(whole).run()

    parts = make(tmp_path / "cut", rows=4)
    runner = StageRunner(parts)
    save = runner._save

    class CutError(Exception):
        pass

    def save_and_die(stage, position):
        save(stage, position)
        if (position.stage, position.step) == (2, 2):
            raise CutError

    runner._save = save_and_die
    with pytest.raises(CutError):
        runner.run()
    parts.recorder.close()

    again = make(tmp_path / "cut", rows=4)
    open_rows = again.open_rows

    def open_some(task, index):
        rows = open_rows(task, index)
        if index < 2:
            rows.rows = None
        return rows

    again.open_rows = open_some
    StageRunner(again).run()
    for name in whole.engine.parameters:
        assert torch.equal(again.engine.value(name), whole.engine.value(name))
    losses = [e["loss"] for e in events(tmp_path / "whole", "step")]
    resumed = [e["loss"] for e in events(tmp_path / "cut", "step")]
    assert resumed == losses  # nothing was made twice, and all of it is the same


def test_state_goes_through_tensors_and_its_size_is_true(tmp_path):
    parts = make(tmp_path, rows=4)
    StageRunner(parts).run()
    method = parts.method
    state = method.state_dict()
    assert all(not value.is_floating_point() for value in state.values())
    other = Replay(ReplayConfig(rows=4))
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert other.memory.unpack() == method.memory.unpack()
    assert other.seen == method.seen
    tokens = sum(len(row.prompt) + len(row.answer) for _, row in method.memory.unpack())
    assert method.state_bytes() == tokens * 4 + 12 * (2 * 4 + 2 * 8)
    assert method.state_bytes() == sum(
        value.numel() * value.element_size()
        for name, value in state.items()
        if name.startswith("kept/")
    )


MADE = {"rows": 4}
OTHERS = [
    ({"rows": 2}, "method.memory=per_task method.rows=2"),
    ({"rows": 30}, "method.memory=per_task method.rows=30"),
    ({"rows": 4, "memory": "reservoir"}, "method.memory=reservoir method.rows=4"),
    ({"fraction": 0.1}, "method.memory=per_task method.fraction=0.1"),
]


@pytest.mark.parametrize(("given", "named"), OTHERS)
def test_a_memory_made_otherwise_is_refused_before_anything_is_trained(tmp_path, given, named):
    StageRunner(make(tmp_path, **MADE, tasks=1)).run()
    before = events(tmp_path, "step")
    parts = make(tmp_path, **given, tasks=2)  # as a branch finds its parent's stages
    with pytest.raises(ConfigError) as caught:
        StageRunner(parts).run()
    assert f"given: {named}; " in str(caught.value)
    assert "kept with method.memory=per_task method.rows=4. Allowed: the same" in str(caught.value)
    assert events(tmp_path, "step") == before
    assert parts.method.memory is None
    # Control: what the memory does not depend on may change.
    same = make(tmp_path, **MADE, share=0.5, tasks=2)
    StageRunner(same).run()
    assert len(events(tmp_path, "step")) > len(before)
    assert Counter(stage for stage, _ in kept_origins(same.method)) == {0: 4, 1: 4}


@pytest.mark.parametrize("settings", [MADE, *(given for given, _ in OTHERS)])
def test_a_state_knows_what_it_was_made_with(settings):
    """Through tensors; every other setting is told from it."""
    method = Replay(ReplayConfig(**settings))
    method.memory = KeptRows.pack([(0, row) for row in toys.ToyRows(0, 4, 8).all])
    state = method.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = Replay(ReplayConfig(**settings))
    again.load_state_dict(state)
    assert again.memory.unpack() == method.memory.unpack()
    for other in (MADE, *(given for given, _ in OTHERS)):
        if other != settings:
            with pytest.raises(ConfigError, match="the memory belongs to a whole sequence"):
                Replay(ReplayConfig(**other)).load_state_dict(state)


def test_a_state_of_before_settings_were_noted_is_taken():
    """Its run may still be resumed, scored and exported."""
    method = Replay(ReplayConfig(rows=4))
    method.memory = KeptRows.pack([(0, row) for row in toys.ToyRows(0, 4, 8).all])
    state = {k: v for k, v in method.state_dict().items() if not k.startswith("made/")}
    again = Replay(ReplayConfig(rows=4))
    again.load_state_dict(state)
    assert again.memory.unpack() == method.memory.unpack()


def test_nothing_is_kept_before_the_first_task(tmp_path):
    method = method_class("replay")(ReplayConfig())
    assert method.state_dict() == {}
    assert method.state_bytes() == 0
    method.load_state_dict({})  # a branch from another method
    assert method.memory is None


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fraction"):
        ReplayConfig(memory="reservoir", fraction=0.1)
    parts = make(tmp_path, share=0.5, train={"global_batch_size": 1, "micro_batch_size": 1})
    with pytest.raises(MethodError, match="global_batch_size"):
        StageRunner(parts).run()
