"""events.jsonl: what is written, what a crash leaves, what a resume may repeat."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.interruption import InterruptionError, StopSignal
from accrete.pipeline.records import Event, Recorder, json_safe, read_events


class Collected:
    """A sink that keeps what it is shown."""

    def __init__(self) -> None:
        self.past: list[Any] = []
        self.seen: list[Any] = []
        self.closed = False

    def restore(self, event: Any) -> None:
        self.past.append(dict(event))

    def write(self, event: Any) -> None:
        self.seen.append(dict(event))

    def close(self) -> None:
        self.closed = True


def write_steps(path: Path, losses: list[float], *, stage: int = 0) -> None:
    with Recorder(path) as recorder:
        for number, loss in enumerate(losses, start=1):
            recorder.emit(Event.STEP, stage=stage, task="a", step=number, loss=loss)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Recorder(path) as recorder:
        recorder.emit(Event.RUN_STARTED, name="größe", plan=[{"task": "a", "steps": 3}])
        # A reader sees an event as soon as it is emitted.
        assert lines(path)[0]["name"] == "größe"
        recorder.emit("step", stage=0, task="a", step=1, loss=0.5)
    first, second = lines(path)
    assert first["event"] == "run_started"
    assert set(second) == {"event", "time", "stage", "task", "step", "loss"}
    assert abs(second["time"] - first["time"]) < 60


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Recorder(path) as recorder:
        recorder.emit("x", a=math.nan, b=[math.inf, 1.0], c={"d": -math.inf}, e=np.float32(2.0))
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    [event] = lines(path)
    assert (event["a"], event["b"], event["c"], event["e"]) == (None, [None, 1.0], {"d": None}, 2.0)


def test_json_safe_refuses_what_is_not_data() -> None:
    assert json_safe((np.int64(3), Path("a/b"), True, None)) == [3, "a/b", True, None]
    with pytest.raises(TypeError, match="ndarray"):
        json_safe({"x": np.zeros(3)})


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    sink = Collected()
    with Recorder(None, [sink]) as recorder:
        recorder.emit(Event.STEP, stage=0, task="a", step=1, loss=1.0)
        recorder.sync()
    assert not list(tmp_path.iterdir())
    assert len(sink.seen) == 1
    assert sink.closed


def test_reading_passes_over_a_torn_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_steps(path, [1.0, 2.0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert [event["step"] for event in read_events(path)] == [1]
    path.write_bytes(whole[:5] + b"\n" + whole)
    with pytest.raises(RunFolderError, match=r"events\.jsonl:1:"):
        list(read_events(path))


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_opening_repairs_the_tail(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    write_steps(path, [1.0, 2.0])
    complete = path.read_bytes()
    path.write_bytes(complete[:-cut])
    with Recorder(path) as recorder:
        recorder.emit("x")
    events = lines(path)
    # A line that lacks nothing but its line break is whole; any other is dropped.
    assert [event["event"] for event in events] == ["step"] * (2 if cut == 1 else 1) + ["x"]
    assert path.read_bytes().startswith(complete if cut == 1 else complete.splitlines(True)[0])


def test_replayed_steps_are_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_steps(path, [3.0, 2.0, 1.0])
    before = path.read_bytes()
    sink = Collected()
    with Recorder(path, [sink]) as recorder:
        recorder.emit(Event.RESUMED, stage=0, step=1)
        recorder.emit(Event.STEP, stage=0, task="a", step=2, loss=2.0)
        recorder.emit(Event.STEP, stage=0, task="a", step=3, loss=1.0)
        recorder.emit(Event.STEP, stage=0, task="a", step=4, loss=0.5)
        recorder.emit(Event.STEP, stage=1, task="b", step=2, loss=7.0)
    assert path.read_bytes().startswith(before)
    steps = [(e["stage"], e["step"]) for e in lines(path) if e["event"] == "step"]
    assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2)]
    assert not [e for e in lines(path) if e["event"] == "warning"]
    assert [e["step"] for e in sink.past] == [1, 2, 3]
    replayed = [e["step"] for e in sink.seen if e.get("replayed")]
    assert replayed == [2, 3]


def test_replayed_steps_that_differ_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_steps(path, [4.0, 2.0, 1.0])
    with Recorder(path) as recorder:
        for step, loss in ((1, 4.0), (2, 2.2), (3, 1.01), (4, 0.5), (5, 0.4)):
            recorder.emit(Event.STEP, stage=0, task="a", step=step, loss=loss)
    events = lines(path)
    [warning] = [e for e in events if e["event"] == "warning"]
    assert warning["replayed_steps"] == 2
    assert warning["relative_difference"] == pytest.approx(0.1)
    assert (warning["stage"], warning["step"]) == (0, 2)
    # The recorded losses stand, and the warning precedes the first new step.
    assert [e["loss"] for e in events if e["event"] == "step"] == [4.0, 2.0, 1.0, 0.5, 0.4]
    assert events.index(warning) == 3


@pytest.mark.parametrize(("factor", "warned"), [(1 + 5e-7, False), (1 + 5e-6, True)])
def test_tolerance_of_replayed_losses(tmp_path: Path, factor: float, warned: bool) -> None:
    path = tmp_path / "events.jsonl"
    write_steps(path, [3.0])
    write_steps(path, [3.0 * factor])
    assert [e["event"] for e in lines(path)] == ["step"] + ["warning"] * warned


def test_a_failing_sink_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    class Broken(Collected):
        def write(self, event: Any) -> None:
            raise BrokenPipeError("the terminal is gone")

    path, good = tmp_path / "events.jsonl", Collected()
    with Recorder(path, [Broken(), good]) as recorder:
        recorder.emit("a")
        recorder.emit("b")
    assert [e["event"] for e in lines(path)] == ["a", "warning", "b"]
    assert sorted(e["event"] for e in good.seen) == ["a", "b", "warning"]
    assert "Broken" in lines(path)[1]["message"]


def test_a_reader_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    """As `accrete run ... | head`: rich asks the process to end where nobody reads its output."""
    path = tmp_path / "events.jsonl"
    script = """
import sys
from pathlib import Path
from accrete.pipeline.config.run import LogConfig
from accrete.pipeline.console import ConsoleSink
from accrete.pipeline.records import Recorder
with Recorder(Path(sys.argv[1]), [ConsoleSink(LogConfig())]) as recorder:
    sys.stdin.read()
    for number in range(3):
        recorder.emit("warning", message=f"number {number}")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    said = [event["message"] for event in lines(path)]
    assert [text for text in said if text.startswith("number")] == [f"number {n}" for n in range(3)]
    assert len(said) == 4
    assert "ConsoleSink failed and was switched off" in said[1]


def test_a_wish_to_stop_is_not_taken_for_a_failing_sink(tmp_path: Path) -> None:
    """A signal that comes while a sink writes must end what the process is doing."""
    stop = StopSignal()

    class Interrupted(Collected):
        def write(self, event: Any) -> None:
            stop._on_signal(signal.SIGTERM, None)

    with (
        Recorder(tmp_path / "events.jsonl", [Interrupted()]) as recorder,
        pytest.raises(InterruptionError),
    ):
        recorder.emit("a")
    assert [event["event"] for event in lines(tmp_path / "events.jsonl")] == ["a"]


def test_a_sink_that_fails_at_the_end_changes_nothing(tmp_path: Path) -> None:
    """A run that is done has succeeded, and one that was asked to stop says so."""

    class Broken(Collected):
        def close(self) -> None:
            raise OSError(5, "the terminal is gone")

    good = Collected()
    with Recorder(tmp_path / "events.jsonl", [Broken(), good]) as recorder:
        recorder.emit("a")
    assert good.closed
    assert recorder._file is None
    with pytest.raises(InterruptionError), Recorder(None, [Broken()]):
        raise InterruptionError("asked")
