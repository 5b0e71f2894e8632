"""What every launcher gives a node, and every node its processes: variables of the environment.

A launcher (Slurm, ssh, Kubernetes) sets the five variables of `Place` and `ACCRETE_ATTEMPT` on each
node and runs `python -m accrete.launch.cluster.node --run-dir DIR`. That command adds the rest,
which is the same everywhere, and becomes torchrun.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accrete.launch.cluster.settings import ClusterConfig
from accrete.pipeline.errors import ConfigError

PLACE = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
"""What the launcher says to each node."""
ATTEMPT = "ACCRETE_ATTEMPT"
"""Name of this start of the run, another one at every start. The same on all nodes of Slurm and
ssh; a pod has its own uid, for only the first node's names the attempt."""
EXPECTED_WORLD = "ACCRETE_WORLD_SIZE"
"""Processes in all: a worker that finds another WORLD_SIZE was started wrongly, and ends."""
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""What torchrun passes on to the workers: SIGUSR1 and SIGTERM make them save and leave."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The network interface, in the words of the two libraries."""
FIRST_PORT, PORTS = 20000, 12000
"""Rendezvous ports: below those that Linux gives to outgoing connections."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one node stands in the run."""

    nodes: int
    node_rank: int
    procs_per_node: int
    master_addr: str
    master_port: int

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.procs_per_node

    @property
    def is_first(self) -> bool:
        """Whether rank 0 runs here."""
        return self.node_rank == 0

    def to_environment(self) -> dict[str, str]:
        """The five variables of the contract."""
        values = (
            self.nodes,
            self.node_rank,
            self.procs_per_node,
            self.master_addr,
            self.master_port,
        )
        return {name: str(value) for name, value in zip(PLACE, values, strict=True)}


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that a launcher gave this node.

    Raises:
        ConfigError: A variable is missing or is no number.
    """
    missing = [name for name in PLACE if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"This node lacks {', '.join(missing)}, which the launcher sets. Start it through "
            "`accrete launch`, or set them by hand: NNODES=2 NODE_RANK=0 NPROC_PER_NODE=8 "
            "MASTER_ADDR=<first node> MASTER_PORT=29500."
        )
    numbers = {}
    for name in ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ConfigError(f"{name} is {environment[name]!r}; allowed: a whole number.")
        numbers[name] = int(environment[name])
    if numbers["NODE_RANK"] >= numbers["NNODES"]:
        raise ConfigError(
            f"NODE_RANK is {numbers['NODE_RANK']} of NNODES={numbers['NNODES']}; "
            f"allowed: 0 to {numbers['NNODES'] - 1}."
        )
    return Place(
        nodes=numbers["NNODES"],
        node_rank=numbers["NODE_RANK"],
        procs_per_node=numbers["NPROC_PER_NODE"],
        master_addr=environment["MASTER_ADDR"],
        master_port=numbers["MASTER_PORT"],
    )


def choose_port(number: int) -> int:
    """A rendezvous port that follows from a job's number: two jobs on a node rarely share one."""
    return FIRST_PORT + number % PORTS


def node_environment(
    place: Place, cluster: ClusterConfig, interface: str | None, base: Mapping[str, str]
) -> dict[str, str]:
    """Everything the processes of one node find in their environment.

    Args:
        place: The node's place.
        cluster: The cluster's settings.
        interface: The network interface to bind to, if it is known.
        base: What the launcher left there. An interface that it names is kept unless the cluster's
            settings name one; their own `env` wins over everything.
    """
    found = {**base, **place.to_environment()}
    found[EXPECTED_WORLD] = str(place.world)
    found.update(_library_switches(cluster, place.procs_per_node, base))
    found.update(node_local_folders(cluster, base))
    if interface is not None:
        chosen = cluster.network.interface is not None
        kept = [] if chosen else [name for name in INTERFACES if base.get(name)]
        found.update({name: interface for name in INTERFACES if name not in kept})
    return {**found, **cluster.storage.cache_variables(), **cluster.env}


def _library_switches(
    cluster: ClusterConfig, procs: int, base: Mapping[str, str]
) -> dict[str, str]:
    found = {
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        # The cores shared out among the processes, unless someone has said otherwise.
        "OMP_NUM_THREADS": str(max(1, usable_cores() // procs)),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    found = {name: base.get(name, value) for name, value in found.items()}
    if cluster.storage.offline:
        found.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if cluster.device == "cpu":
        found["DS_ACCELERATOR"] = "cpu"
    return found


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process can use: those it may run on, or a container's quota if less.

    Args:
        cgroup: Where the control groups are mounted; in a container it shows the container's own.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group may spend; None where nothing limits it."""
    files = (
        [cgroup / "cpu.max"],
        [cgroup / "cpu" / f"cpu.cfs_{x}_us" for x in ("quota", "period")],
    )
    for version in files:
        try:
            words = " ".join(file.read_text(encoding="ascii") for file in version).split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # another version of the groups, or no limit: `max`
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None


def node_local_folders(cluster: ClusterConfig, base: Mapping[str, str]) -> dict[str, str]:
    """Caches that several nodes must not share: their locks do not hold across machines.

    Nodes that do not ask the hub keep the common cache of `datasets`, where `accrete fetch` has put
    the rows: nothing is written there.
    """
    local = os.path.expandvars(os.path.expanduser(cluster.storage.local or ""))
    root = Path(local or base.get("TMPDIR") or "/tmp") / f"accrete-{_user()}"
    folders = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TORCH_EXTENSIONS_DIR": "torch_extensions",
        "TMPDIR": "tmp",
    }
    if not cluster.storage.offline:
        folders["HF_DATASETS_CACHE"] = "datasets"
    return {name: str(root / folder) for name, folder in folders.items()}


def make_local_folders(
    cluster: ClusterConfig, environment: Mapping[str, str], base: Mapping[str, str]
) -> None:
    """Make this node's own folders.

    Args:
        cluster: The cluster's settings.
        environment: What `node_environment` gave.
        base: What the launcher left there.

    Raises:
        ConfigError: One of them cannot be made.
    """
    for name in node_local_folders(cluster, base):
        try:
            Path(environment[name]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{name}: {environment[name]} cannot be made on {socket.gethostname()} "
                f"({error.strerror}). Set storage.local in the cluster's settings to a folder that "
                "every node can write to."
            ) from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        return str(os.getuid())


def torchrun_options(place: Place, shutdown_s: int) -> list[str]:
    """How torchrun is told the place: static rendezvous, no restarts of its own.

    A restart inside the attempt would leave the ranks' caches and the step count to chance; the
    launcher starts the whole attempt again, from the checkpoint.

    Args:
        place: The node's place.
        shutdown_s: Seconds that the workers have to save, after a signal, before they are killed.
    """
    return [
        f"--nnodes={place.nodes}",
        f"--node-rank={place.node_rank}",
        f"--nproc-per-node={place.procs_per_node}",
        "--rdzv-backend=static",
        f"--master-addr={place.master_addr}",
        f"--master-port={place.master_port}",
        "--max-restarts=0",
        f"--signals-to-handle={','.join(STOP_SIGNALS)}",
        f"--shutdown-timeout={shutdown_s}",
    ]
