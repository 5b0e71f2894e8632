"""A signal in the middle of a task, at its end, and while tasks are scored."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.pipeline.checkpoint import positions
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.fence import Fence, FencedError, take
from accrete.pipeline.interruption import InterruptionError, StopSignal
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.records import Recorder, read_events
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = 4
"""Steps of a task: 32 rows in batches of 8."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads on two busy cores wait for each other at every tiny operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stop():
    """A stop signal that listens; what listened before does so again afterwards."""
    kinds = (signal.SIGUSR1, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    asked = StopSignal()
    asked.listen()
    yield asked
    for kind, handler in before.items():
        signal.signal(kind, handler)


def parts_of(folder: Path, stop: StopSignal | None = None, evaluator=None):
    parts = toys.make_parts(
        ALONE,
        folder,
        model="t5",
        zero=None,
        micro=4,
        method="ewc_lora",
        settings={"lambda_": 10.0},
        rows=32,
        evaluator=evaluator,
    )
    parts.stop = stop or parts.stop
    return parts


def run(parts) -> None:
    with parts.recorder:
        StageRunner(parts).run()


def ask_before_step(parts, stage: int, step: int) -> None:
    """Send this process a signal just before it makes a step."""
    method = parts.method
    ordinary = method.before_step

    def before_step(now):
        if (now.index, now.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGUSR1)
        ordinary(now)

    method.before_step = before_step


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("run/**/*.safetensors"))
        if "-step-" not in str(path)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    run(parts_of(folder))
    return weights(folder)


@pytest.mark.parametrize(("stage", "step"), [(0, 0), (0, 2), (1, 1), (1, STEPS - 1)])
def test_saved_after_the_step_and_resumed_to_the_bit(stop, stage, step, whole, tmp_path):
    parts = parts_of(tmp_path, stop)
    ask_before_step(parts, stage, step)
    with pytest.raises(InterruptionError, match="SIGUSR1"):
        run(parts)
    # Asked before the step's collective, so this very step is the last one; also the task's last,
    # because what follows it can take long.
    newest = positions(parts.run.path)[-1]
    assert (newest.stage, newest.step) == (stage, step + 1)
    run(parts_of(tmp_path))
    assert weights(tmp_path) == whole
    made = [e["step"] for e in read_events(parts.run.events) if e["event"] == "step"]
    assert made == [1, 2, 3, 4] * 2


def test_asked_while_the_stage_ends(stop, whole, tmp_path):
    parts = parts_of(tmp_path, stop)
    ordinary = parts.method.on_task_end

    def on_task_end(stage):
        os.kill(os.getpid(), signal.SIGTERM)
        ordinary(stage)

    parts.method.on_task_end = on_task_end
    with pytest.raises(InterruptionError, match="SIGTERM"):
        run(parts)
    assert positions(parts.run.path)[-1].folder == "stage-0"
    assert not parts.run.stage(0).score.exists()
    run(parts_of(tmp_path))
    assert weights(tmp_path) == whole


def test_asked_when_the_ranks_have_just_told_each_other(stop, whole, tmp_path):
    """Nobody looks again before the next task: noted alone, the signal would wait for its step."""
    parts = parts_of(tmp_path, stop)
    runner = StageRunner(parts)
    ordinary = runner._leave_if_asked

    def leave_if_asked():
        ordinary()
        os.kill(os.getpid(), signal.SIGTERM)

    runner._leave_if_asked = leave_if_asked
    with pytest.raises(InterruptionError, match="SIGTERM"), parts.recorder:
        runner.run()
    assert positions(parts.run.path)[-1].folder == "stage-0"
    run(parts_of(tmp_path))
    assert weights(tmp_path) == whole


def test_asked_while_tasks_are_scored(stop, whole, tmp_path):
    """Nothing is lost there: the process leaves at once, and scores again."""

    def evaluator(view, tasks):
        os.kill(os.getpid(), signal.SIGUSR1)
        return toys.no_scores(view, tasks)

    parts = parts_of(tmp_path, stop, evaluator)
    with pytest.raises(InterruptionError):
        run(parts)
    assert stop.leaving
    run(parts_of(tmp_path))
    assert weights(tmp_path) == whole


def test_without_a_wish_nothing_is_saved_in_mid_task(stop, tmp_path):
    """Control: no signal, no step checkpoint."""
    parts = parts_of(tmp_path, stop)
    run(parts)
    assert [p.folder for p in positions(parts.run.path)] == ["stage-0", "stage-1"]


def test_the_second_signal_changes_nothing(stop):
    with stop.deferred():
        for kind in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), kind)
    assert stop.received is signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not stop.leaving


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path):
    parts = parts_of(tmp_path)
    owner = parts.run.owner
    take(owner, "old")
    fence = Fence(owner, "old")
    parts.fence, parts.recorder = fence, Recorder(parts.run.events, fence=fence)
    ordinary = parts.method.on_task_end

    def on_task_end(stage):
        take(owner, "new")
        ordinary(stage)

    parts.method.on_task_end = on_task_end
    with pytest.raises(FencedError, match="taken over by attempt new"):
        run(parts)
    assert positions(parts.run.path) == []
    kinds = [event["event"] for event in read_events(parts.run.events)]
    assert "checkpoint" not in kinds
    assert "consolidated" not in kinds


def test_the_method_of_these_tests_keeps_something_between_tasks():
    """A resume that forgot the Fisher would show."""
    assert method_class("ewc_lora").fresh_adapter
