"""Starts one launch per world size, runs all its cases there, and names the case that hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One row of a launch."""

    name: str
    kind: str
    params: dict[str, Any] = field(default_factory=dict)


class Launch:
    """The results of all cases of one world size."""

    def __init__(
        self, world: int, cases: list[Case], out: Path, seconds: float, device: str = "cpu"
    ) -> None:
        self.world = world
        self.device = device
        self.out = out
        self.hung: str | None = None
        out.mkdir(parents=True)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        (out / "cases.json").write_text(json.dumps([case.__dict__ for case in cases]))
        self._run(seconds)

    def _run(self, seconds: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = []
        for rank in range(self.world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": self.device,
            }
            log = (self.out / f"log-{rank}.txt").open("wb")
            workers.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "worker.py"), str(self.out), self.device],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        deadline = time.monotonic() + seconds
        while any(worker.poll() is None for worker in workers):
            if time.monotonic() > deadline:
                current = [
                    (self.out / f"current-{r}").read_text()
                    for r in range(self.world)
                    if (self.out / f"current-{r}").exists()
                ]
                self.hung = ", ".join(sorted(set(current))) or "start-up"
                for worker in workers:
                    worker.kill()
            time.sleep(0.1)

    def result(self, name: str) -> list[dict[str, Any]]:
        """What each rank returned for a case; fails with the rank's own traceback."""
        folder = self.out / name
        for rank in range(self.world):
            error = folder / f"error-{rank}.txt"
            assert not error.exists(), f"{name}, rank {rank}:\n{error.read_text()}"
        missing = [r for r in range(self.world) if not (folder / f"values-{r}.json").exists()]
        tail = "\n".join((self.out / f"log-{r}.txt").read_text()[-2000:] for r in missing[:1])
        assert not missing, (
            f"{name}: ranks {missing} gave no result"
            + (f"; the launch was stopped while in: {self.hung}" if self.hung else "")
            + f"\n{tail}"
        )
        return [
            {
                **json.loads((folder / f"values-{rank}.json").read_text()),
                **load_file(folder / f"tensors-{rank}.safetensors"),
            }
            for rank in range(self.world)
        ]
