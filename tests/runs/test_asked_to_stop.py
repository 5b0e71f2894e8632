"""Two processes, one of which is asked to stop: both save after the same step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CHECKPOINT = "checkpoint.every_steps=null"


def worker_of(launcher: int, rank: int) -> int:
    """Process of a rank, told by its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        wanted = (f"ACCRETE_LAUNCHER_PID={launcher}".encode(), f"RANK={rank}".encode())
        if all(word in variables for word in wanted):
            return int(path.parent.name)
    raise AssertionError(f"no worker with rank {rank}")


def test_one_rank_is_asked_and_all_save(recipe, environment, accrete, whole, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accrete.launch.cli", "run", recipe, CHECKPOINT]
    launcher = subprocess.Popen(
        [*command, "--run-dir", run],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while '"event": "step"' not in (
            (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""
        ):
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.02)
        os.kill(worker_of(launcher.pid, 1), signal.SIGUSR1)
        _, complaint = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 75
    assert "interrupted by" in complaint
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (saved,) = (event for event in events if event["event"] == "checkpoint")
    assert events[-1] == saved
    last = [event for event in events if event["event"] == "step"][-1]
    assert (saved["stage"], saved["step"]) == (last["stage"], last["step"])
    accrete("resume", run)
    for stage in ("0", "1", "2"):
        name = f"stages/{stage}/adapter/adapter_model.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    matrices = [json.loads((folder / "matrix.json").read_text()) for folder in (run, whole)]
    assert matrices[0]["matrix"] == matrices[1]["matrix"]
