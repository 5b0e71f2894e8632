"""What `--cluster` means to the doctor: on a login node and on a node of a launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accrete.launch import environment
from accrete.launch.cli import app
from accrete.launch.cluster.contract import PLACE, Place
from accrete.launch.cluster.settings import ClusterConfig, StorageConfig, load_cluster
from accrete.launch.doctor import examine, offline
from accrete.launch.doctor.checks import Diagnosis
from accrete.pipeline.config.load import load_recipe


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACE, "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    have_gpus(monkeypatch, 0)


def have_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(environment, "count_gpus", lambda: count)


def question(cluster: ClusterConfig, *words: str, **changes: Any) -> examine.Question:
    asked = examine.Question(
        recipe=load_recipe("quickstart", words) if words else None,
        words="quickstart",
        run_dir=Path("runs/one"),
        offline=True,
        procs=None,
        limit=60,
        cluster=cluster,
        for_cluster=True,
    )
    return replace(asked, **changes)


def look(asked: examine.Question) -> tuple[str, int, list[tuple[str, str]]]:
    """Device, processes on this node, and the checks so far."""
    stand = examine._take_stand(asked)
    checks = [(check.name, str(check.status)) for check in stand.checks]
    return stand.device, stand.place.procs_per_node, checks


def test_a_login_node_without_gpus() -> None:
    cluster = load_cluster("one_node_8")
    assert look(question(cluster)) == ("cpu", 1, [("device", "warning")])
    assert look(question(cluster, procs=3)) == ("cpu", 3, [("device", "warning")])
    plain = ("engine.kind=plain", "engine.procs=1", "engine.device=cuda")
    assert look(question(cluster, *plain, procs=8))[2] == [
        ("device", "warning"),
        ("processes", "failure"),
    ]


def test_a_login_node_with_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(monkeypatch, 2)
    assert look(question(load_cluster("one_node_8"))) == ("cuda", 1, [("processes", "warning")])


def test_a_node_of_a_launch_lacks_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Place(
        nodes=1, node_rank=0, procs_per_node=8, master_addr="127.0.0.1", master_port=29500
    )
    for name, value in place.to_environment().items():
        monkeypatch.setenv(name, value)
    storage = StorageConfig(local=str(tmp_path))
    cluster = replace(load_cluster("one_node_8"), storage=storage)
    assert look(question(cluster)) == ("cpu", 8, [("device", "failure")])


def test_this_machine_itself_lacks_the_gpus_of_a_recipe() -> None:
    asked = question(ClusterConfig(), "engine.device=cuda", "engine.procs=2", for_cluster=False)
    assert look(asked) == ("cpu", 2, [("device", "failure")])


def test_processes_of_the_cluster() -> None:
    cluster = ClusterConfig(procs_per_node=3, device="cpu")
    assert look(question(cluster)) == ("cpu", 3, [])
    assert look(question(cluster, for_cluster=False))[1] == environment.CPU_PROCESSES


@pytest.mark.parametrize(
    ("words", "procs", "device"),
    [
        (["--cluster", "two_nodes_8"], 8, "cuda"),
        (["engine.procs=4", "engine.device=cpu", "--cluster", "two_nodes_8"], 4, "cpu"),
        (["--cluster", "two_nodes_8", "--procs", "2"], 2, "cuda"),
        (["engine.procs=1"], 1, "auto"),
    ],
)
def test_the_recipe_is_the_one_that_would_be_launched(
    words: list[str], procs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[examine.Question] = []

    def answer(question: examine.Question, say: object) -> Diagnosis:
        asked.append(question)
        return Diagnosis(checks=[])

    monkeypatch.setattr(examine, "examine", answer)
    monkeypatch.setattr(examine, "use_storage", lambda cluster: None)
    monkeypatch.setattr(offline, "go_offline", lambda: False)
    done = CliRunner().invoke(app, ["doctor", "quickstart", *words], catch_exceptions=False)
    assert done.exit_code == 0
    assert (asked[0].engine.procs, asked[0].engine.device) == (procs, device)
    assert asked[0].for_cluster == ("--cluster" in words)
