"""`accrete launch hosts`: the run on machines that ssh reaches, one torchrun on each.

`hosts.sh` starts `node.sh` on every machine and keeps a lifeline to it: stdin of the connection.
While words come along it, the node runs; when it ends or falls silent (launcher gone, link cut),
the node ends its processes by itself. So nothing is ever left behind, and no daemon is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from accrete.launch.cluster.contract import FIRST_PORT, PORTS
from accrete.launch.cluster.rendering import render_template
from accrete.launch.cluster.request import LaunchRequest, shell_line
from accrete.launch.cluster.settings import ClusterConfig
from accrete.launch.local import PARENT_VARIABLE
from accrete.pipeline.errors import ConfigError, RunFolderError

LEAVE_S = 30
"""Seconds that a node's processes have when there is nothing left to save."""
LOCK = "hosts.lock"
LOCK_HELD = 9
"""Status of `flock` where somebody else has the lock; any other one means that it cannot tell."""
PATIENCE_S = 30
"""Seconds for the other nodes to end by themselves, once one has failed."""
_HOST = re.compile(r"[\w.@:%\[\]-]+", re.ASCII)
_LINE = re.compile(r"(\S+)(?:\s+slots=(\d+))?(?:\s+max_slots=\d+)?")


def render(request: LaunchRequest) -> dict[str, str]:
    """The hostfile, and the scripts for this machine and for the others.

    Raises:
        ConfigError: No hosts, too few, or one twice.
    """
    cluster = request.cluster
    _check_hosts(cluster)
    return {
        "hostfile": "".join(
            f"{host} slots={cluster.procs_per_node}\n" for host in cluster.hosts.hosts
        ),
        "hosts.sh": _hosts_script(request),
        "node.sh": _node_script(request),
    }


def _hosts_script(request: LaunchRequest) -> str:
    cluster = request.cluster
    # The script runs here, whatever interpreter the nodes use.
    verdict = [sys.executable, *request.verdict_command()[1:]]
    return render_template(
        "hosts.sh",
        lock=LOCK,
        lock_held=LOCK_HELD,
        title=request.recipe.name,
        nodes=cluster.nodes,
        procs_per_node=cluster.procs_per_node,
        run_dir=request.run_dir,
        node_script=request.launch_dir / "node.sh",
        ssh=shell_line(_ssh_command(cluster)),
        limit_s=None if request.time_s is None else request.time_s - cluster.grace_s,
        grace_s=cluster.grace_s,
        leave_s=_leave_s(cluster),
        patience_s=PATIENCE_S,
        wait_s=cluster.hosts.wait_s,
        port=cluster.network.port or f"$(({FIRST_PORT} + RANDOM % {PORTS}))",
        verdict=shell_line(verdict),
        retries=cluster.retries,
    )


def _node_script(request: LaunchRequest) -> str:
    cluster = request.cluster
    digest = hashlib.sha256(str(request.run_dir).encode()).hexdigest()[:8]
    return render_template(
        "hosts_node.sh",
        lock_held=LOCK_HELD,
        procs_per_node=cluster.procs_per_node,
        working_dir=Path.cwd(),
        setup=cluster.setup,
        python=request.python,
        lock_name=f"{request.job_name}-{digest}",
        command=shell_line(request.node_command()),
        grace_s=cluster.grace_s,
        leave_s=_leave_s(cluster),
        silence_s=cluster.hosts.silence_s,
    )


def _leave_s(cluster: ClusterConfig) -> int:
    return min(LEAVE_S, cluster.grace_s)


def _ssh_command(cluster: ClusterConfig) -> list[str]:
    """The command without the host. The user's options come first, because ssh takes the first."""
    interval = max(1, cluster.hosts.silence_s // 5)
    ours = {
        "BatchMode": "yes",
        "ConnectTimeout": "10",
        "ServerAliveInterval": str(interval),
        "ServerAliveCountMax": "4",
    }
    return [
        *("ssh", "-T"),
        *(word for option in cluster.hosts.ssh_options for word in shlex.split(option)),
        *(word for name, value in ours.items() for word in ("-o", f"{name}={value}")),
    ]


def _check_hosts(cluster: ClusterConfig) -> None:
    hosts = cluster.hosts.hosts
    if not hosts:
        raise ConfigError(
            "accrete launch hosts needs machines: --hosts node1,node2, --hostfile FILE (lines of "
            "`node1 slots=8`), or `hosts: {hosts: [node1, node2]}` in the file of --cluster."
        )
    wrong = [host for host in hosts if _HOST.fullmatch(host) is None or host.startswith("-")]
    if wrong:
        raise ConfigError(
            f"hosts: {', '.join(map(repr, wrong))} is no name of a machine; allowed: name, "
            "address or user@name."
        )
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise ConfigError(f"hosts: {', '.join(twice)} is listed twice; every machine once.")
    if len(hosts) < cluster.nodes:
        raise ConfigError(
            f"{cluster.nodes} nodes are asked for, but only {len(hosts)} hosts are listed: "
            f"{', '.join(hosts)}. List more, or lower --nodes."
        )


def with_placeholders(cluster: ClusterConfig) -> tuple[ClusterConfig, str | None]:
    """The settings for a look at the scripts: where no machine is listed, with names made up.

    Returns:
        The settings, and what to set before a start, if anything.
    """
    if cluster.hosts.hosts:
        return cluster, None
    names = [f"node{number}" for number in range(1, cluster.nodes + 1)]
    return replace(cluster, hosts=replace(cluster.hosts, hosts=names)), (
        f"no machines are listed, so the files say {', '.join(names)}. Before a start name them: "
        "--hosts, --hostfile, or `hosts: {hosts: [...]}` in the file of --cluster."
    )


def with_hosts(
    cluster: ClusterConfig,
    hosts: str | None,
    hostfile: Path | None,
    *,
    nodes: int | None,
    procs_per_node: int | None,
) -> ClusterConfig:
    """The settings with the hosts of the command line in them.

    Args:
        cluster: Settings of `--cluster`.
        hosts: `--hosts`: names, separated by commas.
        hostfile: `--hostfile`: a file of `NAME slots=N` lines, as DeepSpeed and MPI read it.
        nodes: `--nodes`, or what the cluster's file says; None: all of these hosts.
        procs_per_node: `--procs-per-node`; None: the slots of the hostfile.

    Raises:
        ConfigError: Both are given, or the file is wrong.
    """
    if hosts is not None and hostfile is not None:
        raise ConfigError("--hosts and --hostfile both name the machines; give one of them.")
    if hosts is not None:
        names = [name.strip() for name in hosts.split(",") if name.strip()]
    elif hostfile is not None:
        slots = read_hostfile(hostfile)
        names = list(slots)
        procs_per_node = _common_slots(hostfile, slots, procs_per_node) or cluster.procs_per_node
    else:
        names = cluster.hosts.hosts
    if not names:
        return cluster
    return replace(
        cluster,
        hosts=replace(cluster.hosts, hosts=names),
        nodes=nodes or len(names),
        procs_per_node=procs_per_node or cluster.procs_per_node,
    )


def read_hostfile(path: Path) -> dict[str, int | None]:
    """The machines of a hostfile, in order, with their slots where the file says them.

    Raises:
        ConfigError: It cannot be read, or a line is wrong; the message names the line.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({error}).") from None
    found: dict[str, int | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or match[2] == "0":
            raise ConfigError(
                f"{path}:{number}: given: {text!r}; allowed: `node1 slots=8` (8: processes on that "
                "machine), or a name alone."
            )
        if match[1] in found:
            raise ConfigError(f"{path}:{number}: {match[1]} is listed twice; every machine once.")
        found[match[1]] = None if match[2] is None else int(match[2])
    if not found:
        raise ConfigError(f"{path}: no machine is listed; allowed: lines of `node1 slots=8`.")
    return found


def _common_slots(path: Path, slots: dict[str, int | None], asked: int | None) -> int | None:
    """Processes on each machine: what is asked for, if the slots suffice, or the slots."""
    known = {host: count for host, count in slots.items() if count is not None}
    if asked is not None:
        few = [f"{host} ({count})" for host, count in known.items() if count < asked]
        if few:
            raise ConfigError(
                f"{path}: --procs-per-node is {asked}, but {', '.join(few)} has fewer slots."
            )
        return asked
    if len(set(known.values())) > 1:
        raise ConfigError(
            f"{path}: the machines have different numbers of slots "
            f"({', '.join(f'{host}: {count}' for host, count in known.items())}), and every node "
            f"runs as many processes. Give --procs-per-node {min(known.values())}."
        )
    return next(iter(known.values()), None)


def require_idle(request: LaunchRequest) -> None:
    """Make sure that no `hosts.sh` is at work on this run.

    Raises:
        RunFolderError: One is.
    """
    path = request.launch_dir / LOCK
    if not path.exists():
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"{request.run_dir}: a hosts.sh is at work on this run already. Wait for it, or "
                "stop it (Ctrl-C, or SIGTERM)."
            ) from None
        except OSError:
            pass  # a file system without locks: hosts.sh warns of it


def start(request: LaunchRequest) -> int:
    """Run `hosts.sh` to its end; returns its status. SIGINT and SIGTERM are passed on to it."""
    script = ["bash", str(request.launch_dir / "hosts.sh")]
    status = _run(script, {**os.environ, PARENT_VARIABLE: str(os.getpid())})
    if status == 0:
        print(f"report: {request.folder.report}")
    return status


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    # A group of its own, or a Ctrl-C would reach it twice.
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    previous = {kind: signal.signal(kind, forward) for kind in kinds}
    try:
        return process.wait()
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
