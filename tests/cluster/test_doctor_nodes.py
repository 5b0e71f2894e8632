"""`srun accrete doctor` over two nodes of a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import author_folders as made
import pytest
from documented import lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
DOCUMENTED = [words for page, words in lines() if page == "doctor.md" and words[0] != "accrete"]
ACCRETE = (sys.executable, "-m", "accrete.launch.cli")
SRUN = ("srun", "-N2", "-n2", "--ntasks-per-node=1", "--label")


def doctor(vcluster: Any, environment: dict[str, str], *words: object, **more: str) -> Any:
    command = [*SRUN, *ACCRETE, "doctor", "--json", "--procs", 1]
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


def test_the_documented_lines(
    vcluster: Any, environment: dict[str, str], recipe: Path, tmp_path: Path
) -> None:
    """As they stand, with one process on each node, made-up rows and a tiny model."""
    by_slurm, by_hand = DOCUMENTED
    made.make_olora(tmp_path / "data")
    (tmp_path / "here").mkdir()
    inside = ["sh", "-c", 'cd "$0" && "$@"', tmp_path / "here"]
    at = by_slurm.index("accrete")
    words = ["1" if word == "8" else word for word in by_slurm[at + 1 :]]
    tiny = [f"model.path={recipe.parent / 'model'}", "data.benchmark=null"]
    done = vcluster.run(
        "ctl",
        [*inside, by_slurm[0], "-N2", *by_slurm[1:at], *ACCRETE, *words, *tiny],
        env=environment,
        timeout=250,
    )
    assert "2 ranks over gloo" in done.stdout
    assert "read by 1 other rank" in done.stdout
    assert "warning  tokens" in done.stdout

    *variables, _, command = by_hand
    own = dict(word.split("=", 1) for word in variables)
    assert own["MASTER_ADDR"] == "node1"
    nodes = [
        vcluster.popen(
            name,
            [*inside, *ACCRETE, command],
            env={**environment, **own, "NPROC_PER_NODE": "1", "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, name in enumerate(("node1", "node2"))
    ]
    said = [node.communicate(timeout=250)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "18 ok, 0 warnings, 0 failures" in said[0]
