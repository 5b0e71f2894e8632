"""`accrete doctor` with real processes: two nodes on one machine, absent and silent ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from accrete.launch.cluster.contract import Place
from accrete.launch.doctor.judge import judge_launch
from accrete.launch.doctor.team import PROBE, TeamResult, run_team
from accrete.launch.local import worker_environment

ACCRETE = Path(sys.executable).with_name("accrete")

SILENT_RANK = """
import os, sys, time
from accrete.launch.cluster.contract import read_place
from accrete.launch.doctor.exchange import Board, meet
from accrete.launch.worker import die_with_parent
die_with_parent()
board = Board(read_place(os.environ), int(os.environ["RANK"]), 60)
meet(board, 60, tuple)
time.sleep(120)
"""
"""A rank that says that it is there, and then hangs."""


def place(node: int, port: int, nodes: int = 2, procs: int = 1) -> Place:
    return Place(
        nodes=nodes,
        node_rank=node,
        procs_per_node=procs,
        master_addr="127.0.0.1",
        master_port=port,
    )


def team(
    where: Place,
    out: Path,
    folders: Sequence[Path] = (),
    limit: float = 60,
    command: Sequence[str] = PROBE,
) -> TeamResult:
    out.mkdir()
    environment = worker_environment(1, "cpu", {**os.environ, "OMP_NUM_THREADS": "1"})
    arguments = ["--device", "cpu"]
    for folder in folders:
        arguments += ["--folder", f"cache={folder}"]
    return run_team(where, arguments, environment, out, limit, command)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


def test_two_nodes_find_each_other(tmp_path: Path, port: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    results: dict[int, TeamResult] = {}

    def run(node: int) -> None:
        results[node] = team(place(node, port), tmp_path / f"out-{node}", [shared])

    threads = [threading.Thread(target=run, args=(node,)) for node in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    [check] = judge_launch(results[0], place(0, port), 60)
    assert check.status == "ok", check
    assert check.found.startswith("2 ranks over gloo, ")
    assert [report["node"] for report in results[0].reports] == [0, 1]
    assert all(report["machine"]["versions"]["torch"] for report in results[0].reports)
    found = results[0].reports[0]["folders"]["cache"]
    assert found["others"]["1"]["lock"] == "held"
    assert judge_launch(results[1], place(1, port), 60) == []
    assert list(shared.iterdir()) == []


def test_a_node_that_never_answers_is_named(tmp_path: Path, port: int) -> None:
    result = team(place(0, port, nodes=3), tmp_path / "out", limit=1)
    [check] = judge_launch(result, place(0, port, nodes=3), 1)
    assert check.status == "failure"
    assert check.found == "did not answer within 1 s: node 1 (rank 1); node 2 (rank 2)"


def test_a_first_node_that_never_answers(tmp_path: Path, port: int) -> None:
    where = place(1, port)
    [check] = judge_launch(team(where, tmp_path / "out", limit=1), where, 1)
    assert check.status == "failure"
    assert f"rank 0 at 127.0.0.1:{port} did not answer within 1 s" in check.found


def test_a_rank_that_hangs_in_the_all_reduce_is_named(tmp_path: Path, port: int) -> None:
    where = place(1, port)
    environment = {**os.environ, **where.to_environment(), "RANK": "1", "LOCAL_RANK": "0"}
    silent = subprocess.Popen([sys.executable, "-c", SILENT_RANK], env=environment)
    try:
        result = team(place(0, port), tmp_path / "out", limit=10)
    finally:
        silent.kill()
        silent.wait()
    [check] = judge_launch(result, place(0, port), 10)
    assert check.status == "failure"
    assert check.found == "did not come back within 10 s: node 1 (rank 1)"


def test_a_process_that_dies_is_not_waited_for(tmp_path: Path, port: int) -> None:
    began = time.monotonic()
    code = (
        "import os, sys; from accrete.launch.doctor import probe\n"
        "if os.environ['RANK'] == '1': sys.exit('libnccl.so: cannot open shared object file')\n"
        "probe.main()"
    )
    where = place(0, port, nodes=1, procs=2)
    result = team(where, tmp_path / "out", limit=500, command=[sys.executable, "-c", code])
    [check] = judge_launch(result, where, 500)
    assert check.status == "failure"
    assert "rank 1 ended early: libnccl.so: cannot open" in check.found
    assert time.monotonic() - began < 200


def doctor(cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [ACCRETE, "doctor", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_healthy_machine(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", "--procs", "2", ACCRETE_CACHE=str(tmp_path / "cache"))
    content = json.loads(done.stdout)
    found = {check["name"]: check for check in content["checks"]}
    assert done.returncode == (0 if content["ok"] else 1)
    for name in ("python", "deepspeed", "all-reduce", "run folder", "cache"):
        assert found[name]["status"] == "ok", found[name]
    assert found["all-reduce"]["found"].startswith("2 ranks over ")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "extends: quickstart\nname: mine\nengine: {kind: plain, procs: 1, device: cpu}\n"
    )
    done = doctor(tmp_path, "mine.yaml", ACCRETE_CACHE="/sys/accrete")
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failure")]
    assert "/sys/accrete" in line
    assert "to do: set ACCRETE_CACHE to another folder" in done.stdout
    assert "tiny_t5: not made yet" in done.stdout


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["no_such_recipe"], {}, "no_such_recipe"),
        ([], {"NNODES": "2", "NODE_RANK": "0"}, "lacks NPROC_PER_NODE"),
        (["--cluster", "no_such_cluster"], {}, "known clusters"),
    ],
)
def test_bad_input(tmp_path: Path, words: list[str], variables: dict[str, str], said: str) -> None:
    done = doctor(tmp_path, *words, **variables)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr
