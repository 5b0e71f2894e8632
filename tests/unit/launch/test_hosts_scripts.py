"""Hostfiles and host lists, their mistakes, and the scripts rendered from them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.launch.cluster import hosts
from accrete.launch.cluster.request import LaunchRequest, make_request
from accrete.launch.cluster.settings import ClusterConfig, HostsConfig
from accrete.pipeline.errors import ConfigError

CLUSTER = ClusterConfig(
    nodes=2,
    procs_per_node=4,
    device="cpu",
    grace_s=120,
    python="/opt/venv/bin/python",
    setup=["module load cuda"],
    hosts=HostsConfig(hosts=["node1", "me@node2", "node3"], ssh_options=["-p 2222", "-F 'a b'"]),
)


def request_for(cluster: ClusterConfig, run_dir: str = "/shared/runs/one") -> LaunchRequest:
    return make_request("quickstart", [], Path(run_dir), cluster)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node1 slots=8\nnode2 slots=8\n", {"node1": 8, "node2": 8}),
        (
            "# two\n\nnode1   slots=2  # fast\n10.0.0.7\tslots=4 max_slots=8\n",
            {"node1": 2, "10.0.0.7": 4},
        ),
        ("node1\nme@node2\n", {"node1": None, "me@node2": None}),
    ],
)
def test_a_hostfile(tmp_path: Path, text: str, found: dict[str, int | None]) -> None:
    (tmp_path / "hostfile").write_text(text)
    assert hosts.read_hostfile(tmp_path / "hostfile") == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1 slots=8\nnode2 slot=8\n", ":2: given: 'node2 slot=8'"),
        ("node1 slots=0\n", ":1: given: 'node1 slots=0'"),
        ("node1 slots=two\n", ":1: given"),
        ("node1 slots=1\n\nnode1 slots=1\n", ":3: node1 is listed twice"),
        ("# nobody\n", "no machine is listed"),
    ],
)
def test_a_wrong_hostfile(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError, match=r"hostfile") as caught:
        hosts.read_hostfile(tmp_path / "hostfile")
    assert said in str(caught.value)


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        hosts.read_hostfile(tmp_path / "none")


def test_hosts_of_the_command_line(tmp_path: Path) -> None:
    def given(names=None, file=None, nodes=None, procs=None):
        found = hosts.with_hosts(ClusterConfig(), names, file, nodes=nodes, procs_per_node=procs)
        return found.hosts.hosts, found.nodes, found.procs_per_node

    assert given("a, b,c") == (["a", "b", "c"], 3, 1)
    assert given("a,b,c", nodes=2, procs=8) == (["a", "b", "c"], 2, 8)
    assert given() == ([], 1, 1)
    file = tmp_path / "hostfile"
    file.write_text("a slots=8\nb slots=8\n")
    assert given(file=file) == (["a", "b"], 2, 8)
    assert given(file=file, procs=4) == (["a", "b"], 2, 4)
    with pytest.raises(ConfigError, match="fewer slots"):
        given(file=file, procs=9)
    file.write_text("a slots=8\nb slots=4\n")
    with pytest.raises(ConfigError, match="--procs-per-node 4"):
        given(file=file)
    with pytest.raises(ConfigError, match="one of them"):
        given("a", file)


def test_hosts_of_the_clusters_file() -> None:
    """All of them, where nobody says how many."""
    cluster = ClusterConfig(procs_per_node=4, hosts=HostsConfig(hosts=["a", "b", "c"]))
    found = hosts.with_hosts(cluster, None, None, nodes=None, procs_per_node=None)
    assert (found.nodes, found.procs_per_node) == (3, 4)
    assert hosts.with_hosts(CLUSTER, None, None, nodes=2, procs_per_node=None) == CLUSTER


def test_what_setup_sources_has_no_arguments(tmp_path: Path) -> None:
    """`source miniconda3/bin/activate` takes its shell's arguments where it gets none."""
    said = tmp_path / "said"
    (tmp_path / "activate").write_text(f'echo "activate $*" >>{said}\n')
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$NODE_RANK of $NNODES" >>{said}\n')
    python.chmod(0o755)
    cluster = replace(CLUSTER, python=str(python), setup=[f". {tmp_path}/activate"])
    script = hosts.render(request_for(cluster))["node.sh"]
    (tmp_path / "node.sh").write_text(script)
    words = ["bash", str(tmp_path / "node.sh"), "node2", "1", "2", "node1", "29500", "first"]
    subprocess.run(words, stdin=subprocess.DEVNULL, env={"TMPDIR": str(tmp_path)}, timeout=60)
    assert said.read_text() == "activate \n1 of 2\n"


def test_a_dry_run_makes_names_up() -> None:
    filled, missing = hosts.with_placeholders(ClusterConfig(nodes=2))
    assert filled.hosts.hosts == ["node1", "node2"]
    assert missing is not None
    assert "--hostfile" in missing
    assert hosts.with_placeholders(CLUSTER) == (CLUSTER, None)


@pytest.mark.parametrize(
    ("words", "nodes"),
    [([], 2), (["--nodes", "3"], 3), (["--cluster", "{empty}"], 3)],
)
def test_spares_stay_spares(words: list[str], nodes: int, tmp_path: Path) -> None:
    """`nodes` of the cluster's file holds, unless the command says otherwise."""
    (tmp_path / "two.yaml").write_text("nodes: 2\n")
    (tmp_path / "empty.yaml").write_text("procs_per_node: 1\n")
    run = tmp_path / "run"
    options = ["--hosts", "a,b,c", "--cluster", str(tmp_path / "two.yaml"), "--run-dir", str(run)]
    more = [word.format(empty=tmp_path / "empty.yaml") for word in words]
    command = ["launch", "hosts", "quickstart", *options, *more, "--dry-run"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert f"\nnodes={nodes}\n" in (run / "launch" / "hosts.sh").read_text()
    assert len((run / "launch" / "hostfile").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "--hosts node1,node2"),
        (["a", "b", "a"], "a is listed twice"),
        (["a"], "2 nodes are asked for, but only 1 hosts"),
        (["a", "b; rm -rf x"], "no name of a machine"),
        (["a", "-oProxyCommand=x"], "no name of a machine"),
    ],
)
def test_wrong_hosts(names: list[str], said: str) -> None:
    cluster = replace(CLUSTER, hosts=HostsConfig(hosts=names))
    with pytest.raises(ConfigError) as caught:
        hosts.render(request_for(cluster))
    assert said in str(caught.value)


def test_deepspeed_reads_the_hostfile() -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    lines = hosts.render(request_for(CLUSTER))["hostfile"].splitlines()
    assert dict(_parse_hostfile(lines)) == {"node1": 4, "me@node2": 4, "node3": 4}


def test_what_the_scripts_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    files = hosts.render(request_for(CLUSTER))
    assert files == hosts.render(request_for(CLUSTER))
    script, node = files["hosts.sh"], files["node.sh"]
    # ssh takes the first value of an option: the user's stand before ours.
    assert "ssh=(ssh -T -p 2222 -F 'a b' -o BatchMode=yes" in script
    assert "ServerAliveInterval=6" in script
    assert "port=$((20000 + RANDOM % 12000))" in script
    assert "limit" not in script.partition("watch_nodes() {")[2].partition("\n}")[0]
    assert "NPROC_PER_NODE=4" in node
    assert f"cd {tmp_path}" in node
    assert node.index("module load cuda") < node.index("accrete.launch.cluster.node")
    command = "/opt/venv/bin/python -m accrete.launch.cluster.node --run-dir /shared/runs/one"
    assert command in node
    timed = replace(CLUSTER, time="02:00:00", network=replace(CLUSTER.network, port=29501))
    script = hosts.render(request_for(timed))["hosts.sh"]
    assert '"$SECONDS" -ge 7080' in script
    assert "port=29501" in script


def test_runs_do_not_share_a_lock() -> None:
    def lock(run_dir: str) -> str:
        node = hosts.render(request_for(CLUSTER, run_dir))["node.sh"]
        return next(line for line in node.splitlines() if line.startswith("exec 9>"))

    assert lock("/shared/a/one") != lock("/shared/b/one")


@pytest.mark.parametrize("run_dir", ["/shared/runs/one", '/shared/it\'s "a" $HOME/run'])
def test_the_scripts_are_sound_shell(tmp_path: Path, run_dir: str) -> None:
    for name, text in hosts.render(request_for(CLUSTER, run_dir)).items():
        if not name.endswith(".sh"):
            continue
        (tmp_path / name).write_text(text)
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "-S", "warning", str(tmp_path / name)], check=True)
