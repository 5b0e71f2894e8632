"""What a node gets from its launcher, and what it gives to its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accrete.launch.cluster import attempts, contract, node
from accrete.launch.cluster.contract import (
    Place,
    choose_port,
    node_environment,
    read_place,
    torchrun_options,
)
from accrete.launch.cluster.join import join_launch
from accrete.launch.cluster.network import find_interface, interface_addresses
from accrete.launch.cluster.request import (
    make_request,
    read_request,
    require_launchable,
    write_files,
)
from accrete.launch.cluster.settings import ClusterConfig, NetworkConfig, StorageConfig
from accrete.pipeline.errors import ConfigError, DistributedError, RunFolderError
from accrete.pipeline.run_dir import RunDir

PLACE = Place(nodes=2, node_rank=1, procs_per_node=4, master_addr="node1", master_port=20001)


def test_a_place_survives_the_environment() -> None:
    assert read_place(PLACE.to_environment()) == PLACE
    assert PLACE.world == 8
    assert not PLACE.is_first


def test_a_place_that_is_not_said() -> None:
    variables = PLACE.to_environment()
    del variables["MASTER_ADDR"]
    with pytest.raises(ConfigError, match="lacks MASTER_ADDR"):
        read_place(variables)
    with pytest.raises(ConfigError, match="NODE_RANK is 2 of NNODES=2; allowed: 0 to 1"):
        read_place({**PLACE.to_environment(), "NODE_RANK": "2"})
    with pytest.raises(ConfigError, match="MASTER_PORT is 'x'"):
        read_place({**PLACE.to_environment(), "MASTER_PORT": "x"})


def test_every_node_gets_the_same_switches_and_caches_of_its_own(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        device="cpu",
        env={"NCCL_IB_HCA": "mlx5", "OMP_NUM_THREADS": "3"},
        storage=StorageConfig(local=str(tmp_path), cache="/shared/cache", hf_home="/shared/hf"),
    )
    found = node_environment(PLACE, cluster, "ib0", {"HOME": "/root", "OMP_NUM_THREADS": "1"})
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "ib0"
    assert found["ACCRETE_WORLD_SIZE"] == "8"
    assert found["HF_HUB_OFFLINE"] == found["TRANSFORMERS_OFFLINE"] == "1"
    assert found["DS_ACCELERATOR"] == "cpu"
    assert (found["ACCRETE_CACHE"], found["HF_HOME"]) == ("/shared/cache", "/shared/hf")
    # The cluster's own variables win over the launcher's, and those over ours.
    assert (found["OMP_NUM_THREADS"], found["NCCL_IB_HCA"]) == ("3", "mlx5")
    for name in ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TMPDIR"):
        assert Path(found[name]).is_relative_to(tmp_path)


def test_an_interface_that_was_exported_is_kept() -> None:
    """As the doctor advises it; the cluster's settings win over it, a guess does not."""
    exported = {"HOME": "/root", "NCCL_SOCKET_IFNAME": "^docker0", "GLOO_SOCKET_IFNAME": ""}

    def interfaces(network: NetworkConfig, interface: str | None) -> tuple[str, str]:
        found = node_environment(PLACE, ClusterConfig(network=network), interface, exported)
        return found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]

    assert interfaces(NetworkConfig(), "eth0") == ("eth0", "^docker0")
    assert interfaces(NetworkConfig(interface="ib0"), "ib0") == ("ib0", "ib0")
    assert interfaces(NetworkConfig(), None) == ("", "^docker0")


def test_threads_follow_a_containers_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod sees all cores of its node, and may use the time of a few."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert contract.usable_cores(tmp_path) == 64
    limit = tmp_path / "cpu.max"
    for text, cores in (("max 100000", 64), ("850000 100000", 8), ("50000 100000", 1)):
        limit.write_text(f"{text}\n")
        assert contract.usable_cores(tmp_path) == cores
    limit.write_text("9900000 100000\n")
    assert contract.usable_cores(tmp_path) == 64
    limit.unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for text, cores in (("-1", 64), ("1600000", 16)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{text}\n")
        assert contract.usable_cores(tmp_path) == cores
    monkeypatch.setattr(contract, "usable_cores", lambda: 16)
    assert node_environment(PLACE, ClusterConfig(), None, {})["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("offline", [True, False])
def test_nodes_without_network_read_the_rows_that_were_fetched(tmp_path: Path, offline) -> None:
    """`accrete fetch` fills the cache of `datasets` on the login node; a node that may ask the hub
    writes to a cache of its own instead."""
    cluster = ClusterConfig(storage=StorageConfig(local=str(tmp_path), offline=offline))
    fetched = {"HOME": "/root", "HF_DATASETS_CACHE": "/shared/datasets"}
    found = Path(node_environment(PLACE, cluster, None, fetched)["HF_DATASETS_CACHE"])
    assert (found == Path("/shared/datasets")) is offline
    assert found.is_relative_to(tmp_path) is not offline


def test_torchrun_knows_every_option() -> None:
    """The options are real: torchrun's own parser takes them."""
    from torch.distributed.run import get_args_parser

    words = torchrun_options(PLACE, 50)
    parsed, unknown = get_args_parser().parse_known_args([*words, "-m", "some.module"])
    assert unknown == []
    assert parsed.rdzv_backend == "static"
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", 1, "4")
    assert parsed.max_restarts == 0
    assert "SIGUSR1" in parsed.signals_to_handle.split(",")
    assert parsed.shutdown_timeout == 50


def test_ports_stay_below_those_of_outgoing_connections() -> None:
    assert choose_port(7) != choose_port(8)
    assert all(20000 <= choose_port(number) < 32768 for number in (0, 11999, 12000, 10**9))


def test_the_interface_is_one_of_this_machine() -> None:
    found = find_interface("10.255.255.254")
    assert found is None or found in interface_addresses()
    assert find_interface("localhost") != "lo"


@pytest.fixture
def prepared(tmp_path: Path) -> RunDir:
    """A run folder as `accrete launch` leaves it, without a run in it."""
    cluster = ClusterConfig(
        nodes=2,
        device="cpu",
        grace_s=60,
        network=NetworkConfig(interface="eth9"),
        storage=StorageConfig(local=str(tmp_path / "local")),
    )
    request = make_request("quickstart", ["log.every_steps=3"], tmp_path / "run", cluster)
    write_files(request, {})
    return request.folder


def test_a_node_becomes_torchrun(prepared: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(nodes=2, node_rank=0, procs_per_node=1, master_addr="node1", master_port=20001)
    for name, value in {**place.to_environment(), "ACCRETE_ATTEMPT": "slurm-7.0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(node, "_open_folder", lambda *arguments: None)
    command, environment = node.get_ready(prepared.path, None, ["checkpoint.keep=1"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--shutdown-timeout=50" in command
    worker = ["--run-dir", str(prepared.path), "engine.procs=1", "engine.device=cpu"]
    assert command[command.index("--run-dir") :] == [
        *worker,
        "log.every_steps=3",
        "checkpoint.keep=1",
    ]
    assert environment["GLOO_SOCKET_IFNAME"] == "eth9"
    assert prepared.owner.read_text().strip() == environment["ACCRETE_TOKEN"]
    assert environment["ACCRETE_TOKEN"].startswith("slurm-7.0-")


def test_a_worker_that_is_alone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu` on two nodes ends well, as two runs of one process each."""
    folder = RunDir(tmp_path)
    folder.recipe.touch()
    folder.run.touch()
    monkeypatch.setenv("ACCRETE_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(DistributedError, match="sees 1 ranks, and the launch has 2"):
        join_launch(folder, 0)
    monkeypatch.delenv("ACCRETE_WORLD_SIZE")
    assert join_launch(folder, 0) is None


def test_the_first_node_that_never_comes(prepared: RunDir) -> None:
    with pytest.raises(RunFolderError, match="not on a file system that all nodes share"):
        node._await_first_node(prepared, 0.0)


def test_the_launcher_says_how_long_to_wait(
    prepared: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image pulls of pods take longer than anything that a run folder made ready needs."""
    waited = []
    place = Place(nodes=2, node_rank=1, procs_per_node=1, master_addr="node1", master_port=20001)
    monkeypatch.setattr(os, "environ", {**os.environ, **place.to_environment()})
    monkeypatch.setattr(node, "_await_first_node", lambda folder, seconds: waited.append(seconds))
    node.get_ready(prepared.path, None, [])
    node.get_ready(prepared.path, None, [], 7200.0)
    assert waited == [300.0, 7200.0]


def test_a_node_that_cannot_start_leaves_word(prepared: RunDir, tmp_path: Path) -> None:
    """The folder of the model is gone: the attempt fails for a reason of its own, and says it."""
    from accrete.launch.cluster.verdict import Outcome, judge

    place = Place(nodes=1, node_rank=0, procs_per_node=1, master_addr="localhost", master_port=2001)
    (prepared.launch / "recipe.yaml").write_text("extends: quickstart\nmodel: {path: /nowhere}\n")
    variables = {**os.environ, **place.to_environment(), "ACCRETE_ATTEMPT": "by-hand"}
    done = subprocess.run(
        [sys.executable, "-m", "accrete.launch.cluster.node", "--run-dir", str(prepared.path)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    verdict = judge(prepared, "by-hand", retries=2)
    assert verdict.outcome is Outcome.FAILED
    assert "rank 0 failed" in verdict.reason
    # Mended, the same command goes on in this folder.
    require_launchable(make_request("quickstart", [], prepared.path, ClusterConfig()))


def test_the_first_node_makes_a_folder_that_has_logs_already(
    prepared: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hosts.sh opens the nodes' logs before the first node makes the run ready."""
    from accrete.launch import folder, prepare

    prepared.logs.mkdir()
    (prepared.logs / "node-0.log").write_text("== hosts-1 on one\n")
    written = []
    monkeypatch.setattr(prepare, "prepare", lambda *arguments, **options: "prepared")
    monkeypatch.setattr(folder, "write_start", lambda *arguments: written.append(arguments[2]))
    node.make_folder(prepared, read_request(prepared.launch))
    assert written == ["prepared"]
    assert prepared.stages.is_dir()
    assert (prepared.logs / "node-0.log").is_file()


@pytest.mark.parametrize("still", [0, 3])
def test_a_folder_of_another_run_stays_with_its_owner(
    prepared: RunDir, monkeypatch: pytest.MonkeyPatch, still: int
) -> None:
    """Runs of one name from two machines meet on a claim, which neither of these sees."""
    for number in range(still):  # the other run may be on its way to a first checkpoint
        progress = attempts.read_progress(prepared).to_list()
        line = {"event": "begun", "attempt": f"theirs-{number}", "progress": progress}
        attempts.note(prepared, line)
    other = make_request("quickstart", ["seed=7"], prepared.path, ClusterConfig(device="cpu"))
    other.recipe.dump_yaml(prepared.recipe)
    prepared.run.write_text("{}")
    prepared.owner.write_text("somebody")
    place = Place(nodes=1, node_rank=0, procs_per_node=1, master_addr="localhost", master_port=2001)
    monkeypatch.setattr(os, "environ", {**os.environ, **place.to_environment()})
    monkeypatch.setattr(sys, "argv", ["node", "--run-dir", str(prepared.path)])
    monkeypatch.setattr(os, "execvpe", lambda *arguments: pytest.fail("became torchrun"))
    with pytest.raises(SystemExit) as ended:
        node.main()
    assert ended.value.code == node.NOT_OURS
    assert prepared.owner.read_text() == "somebody"
    assert not prepared.logs.exists()


def test_a_node_that_cannot_make_its_own_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cluster = ClusterConfig(storage=StorageConfig(local=str(tmp_path / "file")))
    environment = node_environment(PLACE, cluster, None, {})
    with pytest.raises(
        ConfigError, match=r"cannot be made on .* \(Not a directory\).*storage.local"
    ):
        contract.make_local_folders(cluster, environment, {})


def test_a_nodes_own_disk_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/7")
    cluster = ClusterConfig(storage=StorageConfig(local="$SCRATCH/mine"))
    assert node_environment(PLACE, cluster, None, {})["TMPDIR"].startswith("/scratch/7/mine/")


def test_a_folder_with_anything_else_is_not_free(prepared: RunDir) -> None:
    (prepared.path / "run.json").touch()
    with pytest.raises(RunFolderError, match="not empty and is not a run"):
        prepared.create()
