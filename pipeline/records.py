"""The events of a run: one append-only file that is the truth, and the views fed from it."""

from __future__ import annotations

import json
import math
import numbers
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.interruption import InterruptionError

if TYPE_CHECKING:
    from accrete.pipeline.fence import Fence

REPLAY_TOLERANCE = 1e-6
"""Relative difference up to which a recomputed loss counts as the recorded one."""


class Event(StrEnum):
    """The kinds of events and the fields that each carries beside `event` and `time`."""

    RUN_STARTED = "run_started"
    """name, seed, world, device, method, model, forward_transfer,
    plan: [{task, steps, rows_train, rows_eval, tokens (mean of a training row)}]."""
    STAGE_STARTED = "stage_started"
    """stage, task, steps (planned), rows."""
    STEP = "step"
    """stage, task, step (from 1), loss, lr, tokens (all ranks, padding excluded), seconds, and
    what the method measured."""
    CHECKPOINT = "checkpoint"
    """stage, step (null at the end of a task), path, bytes, seconds."""
    CONSOLIDATED = "consolidated"
    """stage, task, seconds, train_seconds, state_bytes, and what the method measured."""
    SCORED = "scored"
    """stage, task, score (percent), rows, seconds, moment: `untrained` (stage -1), `before` or
    `after`; where all answers were decoded, outside (percent that is none of the task's labels).
    After stage t the tasks 0..t are scored, and t + 1 as well where forward transfer is wanted."""
    STAGE_FINISHED = "stage_finished"
    """stage, task, row (the new row of the matrix), score_seconds."""
    RESUMED = "resumed"
    """stage, step (null at the end of a task), checkpoint, world."""
    WARNING = "warning"
    """message, numbers that support it, and the stage if it is about one."""
    RUN_FINISHED = "run_finished"
    """seconds (since the start, or since the last resume)."""


class Sink(Protocol):
    """A view of the events: console, TensorBoard."""

    def restore(self, event: Mapping[str, Any]) -> None:
        """Take in an event from before a resume, without showing it again."""
        ...

    def write(self, event: Mapping[str, Any]) -> None:
        """Show an event as it happens; `replayed` is true for a step that was recorded before."""
        ...

    def close(self) -> None:
        """No event follows."""
        ...


def json_safe(value: Any) -> Any:
    """`value` as JSON can hold it: non-finite numbers become None, paths text, tuples lists.

    Raises:
        TypeError: Something that is not data, such as a tensor with many elements.
    """
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, StrEnum) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return json_safe(asdict(value))
    if isinstance(value, Sequence):
        return [json_safe(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, in order; an unfinished last line is passed over.

    Raises:
        RunFolderError: A line in the middle is not an event.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            event = _parse(line)
            if event is not None:
                yield event
            elif line.endswith(b"\n"):
                raise RunFolderError(
                    f"{path}:{number}: this line is not an event (one JSON object with `event`). "
                    "The file was edited or damaged: restore it, or delete the line."
                )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _repair_tail(path: Path) -> None:
    """Complete or cut off a last line without a line break, which only a crash leaves behind."""
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if _parse(content[start:]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)


class Recorder:
    """Appends events to a file and shows them to the sinks.

    On a file that exists (a resumed run) its events are handed to the sinks as the past, and a
    training step that it already holds is not written a second time.
    """

    def __init__(
        self, path: Path | None, sinks: Sequence[Sink] = (), fence: Fence | None = None
    ) -> None:
        """Open `path` for appending.

        Args:
            path: events.jsonl on rank 0; None elsewhere: nothing is written.
            sinks: Views to feed. One that fails is dropped with a warning; the run goes on.
            fence: Asked before events are written.
        """
        self._fence = fence
        self._sinks = list(sinks)
        self._replay = _Replay()
        self._file: IO[bytes] | None = None
        if path is None:
            return
        if path.exists():
            _repair_tail(path)
            for event in read_events(path):
                self._replay.remember(event)
                for sink in self._sinks:
                    sink.restore(event)
        self._file = path.open("ab")

    def emit(self, event: str, **fields: Any) -> None:
        """Record one event now; `fields` must be data (see `json_safe`)."""
        record = {"event": str(event), "time": time.time(), **json_safe(fields)}
        if event == Event.STEP and self._replay.known(record):
            self._show({**record, "replayed": True})
            return
        if event in (Event.STEP, Event.STAGE_FINISHED, Event.RUN_FINISHED):
            self._report_replay()
        self._write(record, durable=event != Event.STEP)
        self._show(record)

    def sync(self) -> None:
        """Force what was written onto the disk, so that no checkpoint is newer than its events."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the sinks."""
        self._report_replay()
        for sink in self._sinks:
            # How the run ended does not depend on who watched it.
            with suppress(Exception, SystemExit):
                sink.close()
        self._sinks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: dict[str, Any], *, durable: bool) -> None:
        if self._file is None:
            return
        if self._fence is not None:
            self._fence.check(always=durable)
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode("utf-8") + b"\n")
        self._file.flush()
        if durable:
            self.sync()

    def _show(self, record: dict[str, Any]) -> None:
        for sink in tuple(self._sinks):
            try:
                sink.write(record)
            except InterruptionError:
                raise
            except (Exception, SystemExit) as error:
                # A closed terminal or a full disk under a view must not end hours of training; rich
                # asks for the process's end where its output goes to a pipe that nobody reads.
                self._sinks.remove(sink)
                self.emit(
                    Event.WARNING,
                    message=f"{type(sink).__name__} failed and was switched off: {error!r}",
                )

    def _report_replay(self) -> None:
        message = self._replay.take_report()
        if message is not None:
            self.emit(Event.WARNING, **message)


class _Replay:
    """The recorded steps of an earlier life of the run, and how far recomputed ones differ."""

    def __init__(self) -> None:
        self._losses: dict[tuple[int, int], float | None] = {}
        self._differing = 0
        self._worst = 0.0
        self._where = (0, 0)
        self._reported = False

    def remember(self, event: Mapping[str, Any]) -> None:
        if event["event"] == Event.STEP:
            self._losses[event["stage"], event["step"]] = event["loss"]

    def known(self, record: Mapping[str, Any]) -> bool:
        """Whether the step is in the file already; notes by how much its loss differs."""
        key = (record["stage"], record["step"])
        if key not in self._losses:
            return False
        old, new = self._losses[key], record["loss"]
        if old == new:
            return True
        if old is None or new is None:
            difference = math.inf
        else:
            difference = abs(new - old) / max(abs(old), 1e-12)
        if difference > REPLAY_TOLERANCE:
            self._differing += 1
            if difference > self._worst:
                self._worst, self._where = difference, key
        return True

    def take_report(self) -> dict[str, Any] | None:
        """The warning about this resume, once."""
        if self._reported or self._differing == 0:
            return None
        self._reported = True
        stage, step = self._where
        return {
            "message": (
                f"{self._differing} replayed steps have another loss than before the resume, by up "
                f"to {self._worst:.2g} of it (stage {stage}, step {step}). On a CPU with the same "
                "engine and number of ranks they are identical; the recorded losses are kept."
            ),
            "replayed_steps": self._differing,
            "relative_difference": self._worst,
            "stage": stage,
            "step": step,
        }
