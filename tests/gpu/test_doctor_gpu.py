"""`accrete doctor` and NCCL on one CUDA GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]


def test_the_gpu_is_described_and_adds_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "accrete.launch.cli", "doctor", "--json", "--procs", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["devices"]["status"] == "ok", found["devices"]
    for part in (torch.cuda.get_device_name(0), "driver ", "NCCL "):
        assert part in found["devices"]["found"]
    assert found["all-reduce"]["found"].startswith("1 rank over nccl"), found["all-reduce"]
    assert found["deepspeed"]["found"].split(", ")[1].startswith("accelerator cuda")
