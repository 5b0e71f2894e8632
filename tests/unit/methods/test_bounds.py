"""Joint and per-task training: every stage starts from the untrained model, on the right rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.models.lora import initial_factors, load_factors
from accrete.pipeline.scoring import TaskScore
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
ROWS = 21


def run(folder, method, tasks=3, model="llama", **more):
    parts = toys.make_parts(
        ALONE, folder, model=model, zero=None, micro=8, method=method, tasks=tasks, **more
    )
    trained, started = {}, {}
    start = parts.method.on_task_start

    def begin(stage):
        started[stage.index] = stage.factors()
        start(stage)

    def record(stage):
        ids = [row.id for row in stage.global_batch(stage.step)]
        trained.setdefault(stage.index, []).append(ids)

    parts.method.on_task_start, parts.method.before_step = begin, record
    StageRunner(parts).run()
    parts.recorder.close()
    return parts, trained, started


def all_ids(*tasks):
    return sorted(f"{task}-{i}" for task in tasks for i in range(ROWS))


def flat(batches):
    return sorted(name for batch in batches for name in batch)


@pytest.mark.parametrize("method", ["joint", "per_task"])
def test_every_stage_starts_untrained_and_leaves_no_past(tmp_path, method):
    parts, _, started = run(tmp_path, method)
    for index, factors in started.items():
        expected = initial_factors(parts.adapted, parts.config.seed, index)
        for name, (a, b) in factors.items():
            assert torch.equal(a, expected[name][0])
            assert torch.count_nonzero(b) == 0
    assert parts.past.stages == []
    assert parts.method.state_dict() == {}
    assert parts.method.state_bytes() == 0


def test_joint_trains_on_all_tasks_so_far_mixed(tmp_path):
    _, trained, _ = run(tmp_path, "joint")
    for index in range(3):
        assert flat(trained[index]) == all_ids(*range(index + 1))
    assert [len(trained[index]) for index in range(3)] == [3, 6, 8]
    tasks_per_batch = [len({name[0] for name in batch}) for batch in trained[2]]
    assert sum(tasks_per_batch) > 2 * len(tasks_per_batch)


def test_per_task_trains_on_one_task_alone(tmp_path):
    _, trained, _ = run(tmp_path, "per_task")
    for index in range(3):
        assert flat(trained[index]) == all_ids(index)


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_a_per_task_stage_is_what_its_task_alone_gives(tmp_path, model):
    """The second stage equals a first stage on the same rows and initial factors."""
    whole, _, _ = run(tmp_path / "a", "per_task", tasks=2, model=model)

    alone = toys.make_parts(
        ALONE, tmp_path / "b", model=model, zero=None, micro=8, method="sequential", tasks=1
    )
    alone.open_rows = lambda task, index: toys.ToyRows(1, ROWS, 8)
    runner = StageRunner(alone)
    write = runner._stage

    def staged(index):
        stage = write(index)
        first = stage.write_factors
        stage.write_factors = lambda factors: first(initial_factors(alone.adapted, 3, 1))
        return stage

    runner._stage = staged
    runner.run()
    got = load_factors(whole.run.stage(1).adapter)
    for name, (a, b) in load_factors(alone.run.stage(0).adapter).items():
        assert torch.equal(got[name][0], a)
        assert torch.equal(got[name][1], b)


def test_the_matrix_is_of_the_newest_adapter_alone(tmp_path):
    """What is scored after stage t is W_0 with the adapter of stage t, on every task so far."""
    seen = []

    def evaluator(view, tasks):
        batch = toys.Collator(False, toys.PAD, None, toys.EOS).train(
            toys.ToyRows(0, ROWS, 8).all[:4]
        )
        seen.append((len(tasks), view.logits(batch)))
        return [TaskScore(task=task.name, score=0.0, rows=[], seconds=0.0) for task in tasks]

    parts, _, _ = run(tmp_path, "per_task", evaluator=evaluator)
    assert [count for count, _ in seen] == [1, 2, 3]
    base = toys.base_model("llama")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    batch = toys.Collator(False, toys.PAD, None, toys.EOS).train(toys.ToyRows(0, ROWS, 8).all[:4])
    for index, (_, logits) in enumerate(seen):
        changed = dict(state)
        for name, (a, b) in load_factors(parts.run.stage(index).adapter).items():
            changed[f"{name}.weight"] = state[f"{name}.weight"] + 2.0 * b @ a
        base.load_state_dict(changed)
        keep = batch.labels.shape[1]
        expected = base(**batch.inputs, logits_to_keep=keep).logits
        assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["joint", "per_task"])
def test_steps_are_announced_as_they_are_made(tmp_path, method):
    run(tmp_path, method)
    lines = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    for event in lines:
        if event["event"] == "stage_started":
            made = [e for e in lines if e["event"] == "step" and e["stage"] == event["stage"]]
            assert len(made) == event["steps"]
            assert sum(e["rows"] for e in made) == event["rows"]
