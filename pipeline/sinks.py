"""The views that a run feeds beside its event file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accrete.pipeline.config.run import LogConfig
from accrete.pipeline.console import ConsoleSink
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.records import Event, Sink
from accrete.pipeline.run_dir import RunDir

_NOT_CURVES = frozenset({"event", "time", "stage", "step", "task", "replayed"})


class TensorBoardSink:
    """Training curves and scores as TensorBoard files, written anew from the events at a resume."""

    def __init__(self, folder: Path) -> None:
        """Open a writer in `folder`; files of an earlier life of the run are replaced.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        check_tensorboard()
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventFileWriter(str(folder))
        self._steps = 0

    def restore(self, event: Mapping[str, Any]) -> None:
        """Write an event from before a resume again."""
        self.write(event)

    def write(self, event: Mapping[str, Any]) -> None:
        """Add what the event measured."""
        if event.get("replayed"):
            return
        values: dict[str, Any] = {}
        match event["event"]:
            case Event.STEP:
                self._steps += 1
                values = {f"train/{k}": v for k, v in event.items() if k not in _NOT_CURVES}
            case Event.SCORED if event.get("moment", "after") == "after":
                values = {f"eval/{event['task']}": event["score"]}
        self._add(values, event["time"])

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _add(self, values: Mapping[str, Any], wall_time: float) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        curves = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        if curves:
            summary = summary_pb2.Summary(value=curves)
            # The x axis counts steps over the whole sequence; scores stand where they were taken.
            self._writer.add_event(
                event_pb2.Event(wall_time=wall_time, step=self._steps, summary=summary)
            )


def check_tensorboard() -> None:
    """Make sure that TensorBoard is installed.

    Raises:
        ConfigError: It is not; the message says how to install it.
    """
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard: true needs TensorBoard, which is not installed. "
            "Install it with `pip install 'accrete[tensorboard]'`, or set log.tensorboard=false."
        )


def make_sinks(config: LogConfig, run_dir: RunDir) -> list[Sink]:
    """The views that the recipe asks for; for rank 0 alone."""
    sinks: list[Sink] = [ConsoleSink(config)]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_dir.tensorboard))
    return sinks


__all__ = ["ConsoleSink", "Sink", "TensorBoardSink", "check_tensorboard", "make_sinks"]
