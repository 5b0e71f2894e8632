"""Starts the processes of a run on this machine and looks after them."""

from __future__ import annotations

import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import IO

from accrete.launch.cluster.contract import usable_cores
from accrete.launch.failures import Failure, LaunchError, explain, read_failure
from accrete.pipeline.interruption import SIGNALS
from accrete.pipeline.run_dir import RunDir

PARENT_VARIABLE = "ACCRETE_LAUNCHER_PID"
WORKER = (sys.executable, "-m", "accrete.launch.worker")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds that the launcher waits."""

    after_failure: float = 5.0
    """For the other ranks to end by themselves and say why, once one has failed."""
    after_signal: float = 15.0
    """Between asking a worker to end and killing it."""
    after_stop: float = 900.0
    """The same after a signal upon which the run saves after the step it is in."""


def worker_environment(procs: int, device: str, base: Mapping[str, str]) -> dict[str, str]:
    """What all workers of a launch share, on top of `base`.

    Args:
        procs: Processes on this machine.
        device: `cpu` or `cuda`.
        base: The launcher's own environment.
    """
    environment = dict(base)
    environment.update(
        WORLD_SIZE=str(procs),
        LOCAL_WORLD_SIZE=str(procs),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
        TOKENIZERS_PARALLELISM="false",
        # Libraries' own progress bars would break into ours.
        TQDM_DISABLE="1",
    )
    environment[PARENT_VARIABLE] = str(os.getpid())
    # PyTorch would start one thread per core in every process, and they would fight for the cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // procs)))
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch_local(
    run_dir: RunDir,
    arguments: Sequence[str],
    *,
    procs: int,
    device: str,
    lock: int | None = None,
    command: Sequence[str] = WORKER,
    patience: Patience | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run `command arguments` as `procs` processes and wait until all have succeeded.

    Rank 0 keeps the terminal (its stderr is also copied to its log); the others write to
    `logs/rank-<r>.log`. SIGINT, SIGTERM and SIGUSR1 are passed on. The workers die with this
    process.

    Args:
        run_dir: Folder for logs and error files.
        arguments: Arguments of every worker.
        procs: Number of processes.
        device: `cpu` or `cuda`.
        lock: Descriptor of the folder's lock, which the workers inherit and so keep.
        command: What to start.
        patience: Waiting times.
        variables: Further environment variables of the workers.

    Raises:
        LaunchError: A worker failed; the message is that of the first one, `exit_code` its status.
            Interrupted by a signal: 128 + its number.
    """
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    for old in run_dir.logs.glob("error-*.json"):
        old.unlink()
    environment = worker_environment(procs, device, {**os.environ, **(variables or {})})
    workers = _Workers(run_dir, patience or Patience())
    try:
        with workers.forward_signals():
            for rank in range(procs):
                workers.start(rank, [*command, *arguments], environment, lock)
            failures = workers.wait()
    finally:
        workers.kill()
        if sys.stdout.isatty():
            # A worker that was killed under its live display leaves the cursor hidden.
            os.write(1, b"\x1b[?25h")
    if workers.signal is not None:
        raise LaunchError(
            f"stopped by {workers.signal.name}; continue with `accrete resume {run_dir.path}`",
            128 + workers.signal,
        )
    if failures:
        raise explain(run_dir, failures, procs)


class _Phase(IntEnum):
    """How far the end of a launch has come."""

    RUNNING = 0
    FAILED = 1
    """A rank has failed; the others may still end by themselves."""
    ASKED = 2
    """The workers have been sent a signal."""
    KILLED = 3


class _Workers:
    """The processes of one launch."""

    def __init__(self, run_dir: RunDir, patience: Patience) -> None:
        self.signal: signal.Signals | None = None
        """The signal that ended the launch, if one did."""
        self._run_dir = run_dir
        self._patience = patience
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: queue.SimpleQueue[tuple[int, int, float]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._phase = _Phase.RUNNING
        self._deadline = math.inf

    def start(
        self, rank: int, command: Sequence[str], environment: Mapping[str, str], lock: int | None
    ) -> None:
        """Start one rank in a process group of its own: a Ctrl-C reaches it through us, once."""
        log = self._run_dir.rank_log(rank).open("ab")
        process = subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else log,
            stderr=subprocess.PIPE if rank == 0 else log,
            pass_fds=() if lock is None else (lock,),
            process_group=0,
        )
        self._processes[rank] = process
        if process.stderr is not None:
            self._watch(_copy_to_terminal, process.stderr, log)
        else:
            log.close()
        self._watch(self._await_end, rank, process)

    def wait(self) -> list[Failure]:
        """Wait for the end of all ranks; returns those that failed by themselves."""
        failures: list[Failure] = []
        running = set(self._processes)
        while running:
            try:
                # Short waits, because a signal handler runs only between them.
                rank, status, ended = self._ended.get(timeout=0.2)
            except queue.Empty:
                pass
            else:
                running.discard(rank)
                told = self._run_dir.error_file(rank).exists()
                if self._phase is _Phase.ASKED:
                    # All leave together: who is still here is stuck.
                    soon = time.monotonic() + self._patience.after_signal
                    self._deadline = min(self._deadline, soon)
                if status != 0 and (told or self._phase < _Phase.ASKED):
                    failures.append(read_failure(self._run_dir, rank, status, ended))
            self._escalate(failed=bool(failures))
        for thread in self._threads:
            thread.join(timeout=5)
        return failures

    def _escalate(self, *, failed: bool) -> None:
        """Go on to the next, less patient phase when it is time."""
        now = time.monotonic()
        if self.signal is not None and self._phase < _Phase.ASKED:
            saves = self.signal in SIGNALS
            patience = self._patience.after_stop if saves else self._patience.after_signal
            self._phase, self._deadline = _Phase.ASKED, now + patience
        elif failed and self._phase is _Phase.RUNNING:
            self._phase, self._deadline = _Phase.FAILED, now + self._patience.after_failure
        elif now > self._deadline and self._phase is _Phase.FAILED:
            self._phase, self._deadline = _Phase.ASKED, now + self._patience.after_signal
            self._send(signal.SIGTERM)
        elif now > self._deadline and self._phase is _Phase.ASKED:
            self._phase = _Phase.KILLED
            self.kill()

    @contextmanager
    def forward_signals(self) -> Iterator[None]:
        """Pass signals on to the workers; a second one kills them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, *SIGNALS)
        previous = {kind: signal.signal(kind, self._on_signal) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in previous.items():
                signal.signal(kind, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.kill()
            return
        self.signal = signal.Signals(number)
        self._send(self.signal)

    def kill(self) -> None:
        """End whoever is left, at once."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue

    def _watch(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _await_end(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        self._ended.put((rank, status, time.time()))


def _copy_to_terminal(source: IO[bytes], log: IO[bytes]) -> None:
    with source, log:
        while chunk := os.read(source.fileno(), 65536):
            log.write(chunk)
            log.flush()
            try:
                os.write(2, chunk)
            except OSError:
                # The terminal is gone; the log still takes everything.
                continue
