"""Why a rank failed: written by the worker, read by the launcher."""

from __future__ import annotations

import os
import signal
import time
import traceback
from dataclasses import dataclass

from accrete.pipeline.errors import AccreteError
from accrete.pipeline.run_dir import RunDir, read_json, write_json


class LaunchError(AccreteError):
    """Workers failed; `exit_code` is the status with which the command ends."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of one rank that did not succeed."""

    rank: int
    time: float
    """Unix seconds of the failure: the earliest rank is the cause, the others follow from it."""
    kind: str
    message: str
    exit_code: int
    expected: bool
    """True for errors that accrete raises on purpose: their message says all there is to say."""


def report_failure(run_dir: RunDir, rank: int, exception: BaseException) -> int:
    """Leave word of a rank's failure in the run folder; returns its exit status.

    The traceback of an unexpected error goes to the rank's log, never to the terminal.
    """
    expected = isinstance(exception, AccreteError)
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    exit_code = exception.exit_code if isinstance(exception, AccreteError) else 1
    if not expected:
        with run_dir.rank_log(rank).open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(exception)))
    summary = str(exception) if expected else _one_line(exception)
    write_json(
        run_dir.error_file(rank),
        {
            "type": type(exception).__name__,
            "message": summary,
            "exit_code": exit_code,
            "expected": expected,
            "time": time.time(),
        },
    )
    return exit_code


def _one_line(exception: BaseException) -> str:
    first = str(exception).strip().partition("\n")[0]
    return f"{type(exception).__name__}: {first}" if first else type(exception).__name__


def read_failure(run_dir: RunDir, rank: int, status: int, ended: float) -> Failure:
    """What is known of a failed rank: its own word, or its exit status.

    Args:
        run_dir: Folder with the error files.
        rank: The rank that failed.
        status: As `subprocess` gives it; negative for a signal.
        ended: Unix seconds at which the launcher saw it end.
    """
    path = run_dir.error_file(rank)
    if path.exists():
        said = read_json(path)
        return Failure(
            rank=rank,
            time=said["time"],
            kind=said["type"],
            message=said["message"],
            exit_code=said["exit_code"],
            expected=said["expected"],
        )
    return Failure(
        rank=rank,
        time=ended,
        kind="Exit",
        message=_describe_exit(status),
        exit_code=1,
        expected=False,
    )


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"the process ended with status {status} and left no message"
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return (
            "the process was killed (SIGKILL); most often the machine ran out of memory. "
            "Lower train.micro_batch_size or eval.batch_tokens, or use fewer --procs"
        )
    return f"the process was ended by {name}"


def explain(run_dir: RunDir, failures: list[Failure], procs: int) -> LaunchError:
    """One error for the whole launch: that of the rank which failed first."""
    first = min(failures, key=lambda failure: failure.time)
    if first.expected:
        return LaunchError(first.message, first.exit_code)
    logs = run_dir.rank_log(first.rank)
    others = "" if procs == 1 else f"; other ranks: {os.path.join(run_dir.logs, 'rank-*.log')}"
    return LaunchError(
        f"rank {first.rank} of {procs} failed: {first.message}\n  log: {logs}{others}",
        first.exit_code,
    )
