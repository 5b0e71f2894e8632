"""What the doctor makes of reports: right on good ones, and a failure for each kind of fault."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from accrete.launch.cluster.contract import Place
from accrete.launch.doctor import judge, versions
from accrete.launch.doctor.checks import Check, Diagnosis, Status, failure, ok, warning
from accrete.launch.doctor.judge_folders import judge_folder
from accrete.launch.doctor.network import judge_network
from accrete.launch.doctor.place import find_place
from accrete.launch.doctor.table import print_diagnosis
from accrete.launch.doctor.team import TeamResult
from accrete.pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
TWO_NODES = Place(
    nodes=2, node_rank=0, procs_per_node=2, master_addr="127.0.0.1", master_port=29500
)
MACHINE = {
    "host": "a",
    "versions": {"python": "3.12.1", "torch": "2.13.0+cu130", "peft": "0.21.2"},
    "cores": 16,
    "cpu": "some CPU",
    "memory_gib": 64.0,
    "free_memory_gib": 60.0,
    "threads": 8,
    "driver": "580.65",
}
GPU = {"name": "H100", "memory_gib": 79.2, "free_gib": 78.7, "bf16": True}
DEVICES = {"cuda_build": "13.0", "visible": None, "gpus": [GPU, GPU], "nccl": "2.28.9"}


def status(checks: list[Check], name: str) -> Status:
    [found] = [check for check in checks if check.name == name]
    if found.status is not Status.OK:
        assert found.allowed
        assert found.action
    return found.status


# -- versions ---------------------------------------------------------------------------------


def test_tested_versions_are_those_of_the_one_file_at_the_top() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    tested = versions.tested_versions()
    assert len(tested) == len(pinned)
    assert f"torch=={tested['torch']}" in pinned
    assert "huggingface-hub" in tested


TESTED = {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"}


def test_the_tested_versions_pass_whatever_the_build() -> None:
    found = {"python": "3.11.7", "torch": "2.13.0+cpu", "peft": "0.21.2"}
    checks = versions.judge_versions(found, TESTED, ">=3.11")
    assert [check.status for check in checks] == [Status.OK, Status.OK]


def test_wrong_versions() -> None:
    found = {"python": "3.10.2", "torch": "2.12.1", "transformers": "4.57.0", "peft": "odd"}
    checks = versions.judge_versions(found, TESTED, ">=3.11")
    assert status(checks, "python") is Status.FAILURE
    assert status(checks, "libraries") is Status.WARNING  # torch: another minor version
    assert status(checks, "transformers") is Status.FAILURE
    assert status(checks, "peft") is Status.FAILURE
    [gone] = versions.missing_libraries({"torch": "2.13.0"}, TESTED, ("torch", "peft"))
    assert gone.status is Status.FAILURE
    assert "pip install 'peft==0.21.2'" in gone.action


def test_nodes_of_one_launch_have_the_same_versions() -> None:
    other = copy.deepcopy(MACHINE)
    assert judge.judge_nodes({0: MACHINE}) == []
    assert judge.judge_nodes({0: MACHINE, 1: other})[0].status is Status.OK
    other["versions"]["peft"] = "0.20.0"
    [check] = judge.judge_nodes({0: MACHINE, 1: other})
    assert check.status is Status.FAILURE
    assert "peft: 0.21.2 on node 0, 0.20.0 on node 1" in check.found


# -- devices ----------------------------------------------------------------------------------


def devices(device: str, procs: int = 2, bf16: bool = True, **changes: Any) -> list[Check]:
    machine = MACHINE | {k: v for k, v in changes.items() if k in MACHINE}
    found = DEVICES | {k: v for k, v in changes.items() if k in DEVICES}
    return judge.judge_devices({"machine": machine, "devices": found}, device, procs, bf16, "")


def test_gpus() -> None:
    good = devices("cuda")
    assert {check.status for check in good} == {Status.OK}
    for part in ("2 x H100, 79.2 GiB", "driver 580.65", "CUDA 13.0", "NCCL 2.28.9"):
        assert part in good[0].found
    assert status(devices("cuda", procs=4), "devices") is Status.FAILURE
    old = GPU | {"bf16": False}
    assert status(devices("cuda", gpus=[old, old]), "bf16 on devices") is Status.FAILURE
    assert status(devices("cuda", bf16=False, gpus=[old] * 2), "bf16 on devices") is Status.WARNING
    busy = GPU | {"free_gib": 40.0}
    assert status(devices("cuda", cores=1), "cores") is Status.WARNING
    checks = devices("cuda", gpus=[GPU, busy])
    assert status(checks, "gpu memory on devices") is Status.WARNING


def test_cores() -> None:
    none = {"cuda_build": None, "gpus": [], "driver": None}
    assert {c.status for c in devices("cpu", **none)} == {Status.OK}
    assert status(devices("cpu", threads=16, **none), "devices") is Status.WARNING
    hidden = devices("cpu", **(none | {"driver": "580.65", "visible": ""}))
    assert status(hidden, "gpu") is Status.WARNING


def test_deepspeed() -> None:
    def one(found: dict[str, str]) -> Check:
        [check] = judge.judge_deepspeed({"deepspeed": found}, "cpu", "")
        return check

    assert judge.judge_deepspeed({}, "cpu", "") == []
    assert one({"version": "0.19.8", "accelerator": "cpu"}).status is Status.OK
    assert one({"version": "0.19.8", "accelerator": "cuda"}).status is Status.FAILURE
    assert "No module" in one({"error": "ImportError: No module named x"}).found


# -- the launch -------------------------------------------------------------------------------


def launch(chief: dict[str, Any], **others: Any) -> Check:
    result = TeamResult(reports=[{"rank": 0, "node": 0, **chief}], **others)
    return judge.judge_launch(result, TWO_NODES, 60)[0]


ANSWER = {"silent": [], "errors": {}, "latency_us": 80, "gb_per_s": 11.5, "backend": "nccl"}


def test_an_all_reduce_that_works() -> None:
    check = launch({"absent": [], "all_reduce": ANSWER})
    assert check.status is Status.OK
    assert check.found == "4 ranks over nccl, 80 µs, 11.5 GB/s"


def test_those_who_do_not_answer_are_named() -> None:
    assert judge.name_ranks([2, 3], TWO_NODES) == "node 1 (ranks 2, 3)"
    assert judge.name_ranks([1, 3], TWO_NODES) == "node 0: rank 1; node 1: rank 3"
    check = launch({"absent": [2, 3]})
    assert check.status is Status.FAILURE
    assert check.found == "did not answer within 60 s: node 1 (ranks 2, 3)"
    check = launch({"absent": [], "all_reduce": {**ANSWER, "silent": [3]}})
    assert check.found == "did not come back within 60 s: node 1: rank 3"
    check = launch({"absent": [], "all_reduce": {**ANSWER, "errors": {"1": "Connection reset"}}})
    assert check.found == "node 0: rank 1: Connection reset"
    check = launch({"error": "rank 0 at x:1 cannot be served: EADDRINUSE"})
    assert "EADDRINUSE" in check.found
    check = launch({"absent": [1]}, broken={1: "ImportError: libcudart.so.13"})
    assert "rank 1 ended early: ImportError" in check.found


# -- folders ----------------------------------------------------------------------------------


def visitor(**changes: Any) -> dict[str, Any]:
    return {"seen_s": 0.1, "replaced_s": 0.2, "lock": "held", "write": None, **changes}


def folder(need: int | None = None, **changes: Any) -> list[Check]:
    found = {
        "path": "/scratch/runs",
        "base": "/scratch",
        "free": 50 << 30,
        "total": 100 << 30,
        "lock": "held",
        "silent": [],
        "others": {str(rank): visitor() for rank in (1, 2, 3)},
    }
    return judge_folder("run folder", found | changes, TWO_NODES, need)


def test_a_shared_folder() -> None:
    assert {check.status for check in folder()} == {Status.OK}
    assert {check.status for check in folder(need=49 << 30)} == {Status.OK}
    assert status(folder(need=51 << 30), "space for run folder") is Status.FAILURE
    assert status(folder(free=1 << 20), "space for run folder") is Status.FAILURE


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"seen_s": None}, "not visible to node 1: rank 3"),
        ({"replaced_s": None}, "never saw the new content"),
        ({"write": "Read-only file system"}, "rank 3 cannot write: Read-only file system"),
    ],
)
def test_a_folder_that_one_rank_sees_otherwise(answer: dict[str, Any], said: str) -> None:
    others = {"1": visitor(), "2": visitor(), "3": visitor(**answer)}
    check = folder(others=others)[0]
    assert check.status is Status.FAILURE
    assert said in check.found


def test_locks_that_do_not_hold_are_a_warning() -> None:
    others = {"1": visitor(), "2": visitor(lock="free"), "3": visitor(lock="free")}
    assert status(folder(others=others), "locks in run folder") is Status.WARNING
    assert status(folder(lock="ENOLCK"), "locks in run folder") is Status.WARNING


def test_a_folder_that_rank_0_cannot_use() -> None:
    checks = folder(error="Read-only file system (/scratch)", others={})
    assert len(checks) == 1
    assert status(checks, "run folder") is Status.FAILURE


# -- network and place ------------------------------------------------------------------------


def test_network() -> None:
    there = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}

    def named(**environment: str) -> Check:
        return judge_network(TWO_NODES, environment, "", there)[1]

    assert named(GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="eth0").status is Status.OK
    assert named(GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="^lo").status is Status.OK
    assert named(GLOO_SOCKET_IFNAME="eth").status is Status.FAILURE  # gloo takes whole names
    assert named(GLOO_SOCKET_IFNAME="eth0", NCCL_SOCKET_IFNAME="eth").status is Status.OK
    assert named(GLOO_SOCKET_IFNAME="ib0").status is Status.FAILURE
    assert named().status is Status.WARNING
    other = Place(
        nodes=2, node_rank=1, procs_per_node=2, master_addr="localhost", master_port=29500
    )
    assert judge_network(other, {}, "", there)[0].status is Status.FAILURE
    unknown = Place(
        nodes=2, node_rank=1, procs_per_node=1, master_addr="no.such.host.invalid", master_port=1
    )
    assert judge_network(unknown, {}, "", there)[0].status is Status.FAILURE


def test_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def procs() -> int:
        return 4

    assert find_place({}, procs) is None
    contract = TWO_NODES.to_environment()
    assert find_place(contract, procs) == TWO_NODES
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        find_place({k: v for k, v in contract.items() if k != "MASTER_PORT"}, procs)
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$3" = "node[3-4]" ] && printf "node3\\nnode4\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    slurm = {
        "SLURM_STEP_NODELIST": "node[3-4]",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
    }
    found = find_place(slurm, procs)
    assert found is not None
    assert (found.nodes, found.node_rank, found.procs_per_node) == (2, 1, 4)
    assert found.master_addr == "node3"
    with pytest.raises(ConfigError, match="ntasks-per-node=1"):
        find_place(slurm | {"SLURM_STEP_NUM_TASKS": "8"}, procs)
    with pytest.raises(ConfigError, match="scontrol"):
        find_place(slurm | {"SLURM_STEP_NODELIST": "odd["}, procs)


# -- what is shown ----------------------------------------------------------------------------


def test_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        ok("python", "3.12"),
        warning("devices", "busy", "free", "wait"),
        failure("cache", "/x: [read-only]", "writable", "set ACCRETE_CACHE"),
    ]
    diagnosis = Diagnosis(checks=checks)
    print_diagnosis(diagnosis)
    shown = capsys.readouterr().out
    assert "failure  cache    /x: [read-only]" in shown
    assert "to do: set ACCRETE_CACHE" in shown
    assert "1 ok, 1 warning, 1 failure\n" in shown
    content = json.loads(json.dumps(diagnosis.to_json()))
    assert (content["ok"], content["passed"], content["failures"]) == (False, 1, 1)
    assert not Diagnosis(checks=checks[:2]).failed
    print_diagnosis(Diagnosis(checks=checks, nodes=2, node_rank=1))
    shown = capsys.readouterr().out
    assert "python" not in shown
    assert "node 1: failure  cache" in shown


def test_space_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accrete.launch.doctor.folders import host_folder

    class Alone:
        """A notice board of a launch of one."""

        def post(self, key: str, value: object) -> None:
            pass

        def await_all(self, keys: list[str], limit: float) -> list[str]:
            return []

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, (1 << 40) - 5, 5))
    found = host_folder(Alone(), "run folder", tmp_path / "runs" / "x", [], 1)  # type: ignore[arg-type]
    assert (found["base"], found["free"], found["lock"]) == (str(tmp_path), 5, "held")
    assert not list(tmp_path.iterdir())
    alone = Place(nodes=1, node_rank=0, procs_per_node=1, master_addr="", master_port=1)
    assert status(judge_folder("run folder", found, alone, None), "space for run folder") is (
        Status.FAILURE
    )
