"""`srun accrete doctor` over two nodes of a real Slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
SRUN = ("srun", "-N2", "-n2", "--ntasks-per-node=1", "--label")


def doctor(vcluster: Any, environment: dict[str, str], *words: object, **more: str) -> Any:
    command = [*SRUN, sys.executable, "-m", "accrete.launch.cli", "doctor", "--json", "--procs", 1]
    done = vcluster.run(
        "ctl", [*command, *words], env={**environment, **more}, check=False, timeout=250
    )
    said = {}
    for node in ("0", "1"):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{node}: ")]
        content = json.loads("\n".join(line.partition(": ")[2] for line in lines))
        said[node] = {check["name"]: check for check in content["checks"]}
    return done.returncode, said


def test_two_nodes_that_share_everything(
    vcluster: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    status, said = doctor(vcluster, environment, "--run-dir", tmp_path / "run")
    assert said["0"]["all-reduce"]["found"].startswith("2 ranks over gloo")
    assert said["0"]["interface on node 0"]["found"].startswith("eth0 ")
    assert "read by 1 other rank" in said["0"]["run folder"]["found"]
    assert said["1"]["first node on node 1"]["status"] == "ok"
    assert status == 0


def test_a_run_folder_of_each_nodes_own(vcluster: Any, environment: dict[str, str]) -> None:
    folder = vcluster.local / "runs" / "x"
    status, said = doctor(vcluster, environment, "--run-dir", folder, "--timeout", 15)
    assert status == 1
    assert said["0"]["run folder"]["status"] == "failure"
    assert "not visible to node 1 (rank 1)" in said["0"]["run folder"]["found"]
    assert said["0"]["cache"]["status"] == "ok"


def test_an_interface_that_is_not_there(vcluster: Any, environment: dict[str, str]) -> None:
    status, said = doctor(vcluster, environment, GLOO_SOCKET_IFNAME="ib7")
    assert status == 1
    assert said["1"]["interface on node 1"]["status"] == "failure"
    assert "ib7" in said["0"]["all-reduce"]["found"]
