"""The processes of one method: started together, told what to do, listened to."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class TeamError(Exception):
    """A worker ended or fell silent."""


class Team:
    """`spec["procs"]` workers of one method; idle until they are told to go on."""

    def __init__(
        self, spec: dict[str, Any], seconds: float, worker: str = "bench_worker.py"
    ) -> None:
        self.name = spec["method"]
        self.seconds = seconds
        self._workers: list[subprocess.Popen[bytes]] = []
        self._rests = [b""] * spec["procs"]
        self._logs = tempfile.TemporaryDirectory(prefix="accrete-bench-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(spec["procs"]):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(spec["procs"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(spec["threads"]),
                # An idle team must leave the cores to the one that is measured.
                "OMP_WAIT_POLICY": "PASSIVE",
                "DS_ACCELERATOR": spec["device"],
            }
            with (Path(self._logs.name) / str(rank)).open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, str(HERE / worker), json.dumps(spec)],
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            self._workers.append(process)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    stream.close()
        self._logs.cleanup()

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        """Send a command to every rank and wait for every answer."""
        for worker in self._workers:
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps(command).encode() + b"\n")
                worker.stdin.flush()
            except BrokenPipeError:
                raise TeamError(self._trouble(worker)) from None
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        """The next line of every rank."""
        deadline = time.monotonic() + self.seconds
        return [self._line(rank, deadline) for rank in range(len(self._workers))]

    def _line(self, rank: int, deadline: float) -> dict[str, Any]:
        worker = self._workers[rank]
        assert worker.stdout is not None
        descriptor = worker.stdout.fileno()
        while b"\n" not in self._rests[rank]:
            ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(descriptor, 65536) if ready else b""
            if not chunk:
                raise TeamError(self._trouble(worker, silent=not ready))
            self._rests[rank] += chunk
        line, _, self._rests[rank] = self._rests[rank].partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _trouble(self, worker: subprocess.Popen[bytes], silent: bool = False) -> str:
        """What happened, with the end of the rank's own output."""
        rank = self._workers.index(worker)
        what = f"said nothing for {self.seconds:.0f} s"
        if not silent:
            # -9 without a word of its own: the system took it, most often for want of memory.
            what = f"ended with status {worker.wait(10)}"
        tail = (Path(self._logs.name) / str(rank)).read_text(errors="replace")[-3000:]
        return f"{self.name}, rank {rank} {what}:\n{tail}"
