"""Starts one launch per world size, runs all its cases there, and names the case that hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
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
        env = {
            **os.environ,
            "WORLD_SIZE": str(self.world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": self.device,
        }
        with (self.out / "log.txt").open("wb") as log:
            team = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(self.out), self.device],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            team.wait(seconds)
        except subprocess.TimeoutExpired:
            current = [path.read_text() for path in self.out.glob("current-*")]
            self.hung = ", ".join(sorted(set(current))) or "start-up"
        finally:
            if team.poll() is None:
                os.killpg(team.pid, signal.SIGKILL)
                team.wait()

    def result(self, name: str) -> list[dict[str, Any]]:
        """What each rank returned for a case; fails with the rank's own traceback."""
        folder = self.out / name
        for rank in range(self.world):
            error = folder / f"error-{rank}.txt"
            assert not error.exists(), f"{name}, rank {rank}:\n{error.read_text()}"
        missing = [r for r in range(self.world) if not (folder / f"values-{r}.json").exists()]
        logs = [self.out / "log.txt", *(self.out / f"log-{r}.txt" for r in missing[:1])]
        tail = "\n".join(log.read_text()[-2000:] for log in logs if log.exists())
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
