"""What a cluster is like: `recipes/clusters/NAME.yaml`, typed; the command line overrides it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from accrete.pipeline.config.library import (
    looks_like_file,
    named_file,
    recipes_folder,
    shown_path,
)
from accrete.pipeline.config.problems import ProblemList, did_you_mean, nearest
from accrete.pipeline.config.read import read_file
from accrete.pipeline.config.tree import Node, in_file
from accrete.pipeline.config.typed import build_as
from accrete.pipeline.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """How the processes find each other."""

    interface: str | None = None
    """Network interface of the cluster, such as `eth0` or `ib0` (`GLOO_SOCKET_IFNAME`,
    `NCCL_SOCKET_IFNAME`); null: the one through which the first node is reached."""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Rendezvous port on the first node; null: one that follows from the job's number."""
    timeout_s: Annotated[int, Field(ge=10)] | None = None
    """A collective that waits longer ends the attempt; null: `engine.timeout_s` of the recipe."""


CACHES = {"cache": "ACCRETE_CACHE", "hf_home": "HF_HOME"}
"""What `storage` says of the caches -> the variable that says it to a process."""
HUB_PARTS = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
"""Variables that move a part of `HF_HOME`: models, and rows."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Which folders the nodes use. The run folder itself is always shared by all nodes."""

    cache: str | None = None
    """accrete's cache of models and tokenised rows (`ACCRETE_CACHE`), shared by all nodes and by
    the submitting machine, where that prepares the run; null: as on the submitting machine (on
    Kubernetes a folder of the claim)."""
    local: str | None = None
    """A folder on each node's own disk for compiled kernels and temporary files, `~` and `$NAME` as
    the node has them; null: the node's `$TMPDIR`, or /tmp."""
    hf_home: str | None = None
    """Hugging Face cache (`HF_HOME`), filled beforehand; null: as on the submitting machine (on
    Kubernetes a folder of the claim)."""
    offline: bool = True
    """Nodes do not ask the Hugging Face hub."""

    def cache_variables(self) -> dict[str, str]:
        """The caches that are named, as environment variables."""
        named = {variable: getattr(self, name) for name, variable in CACHES.items()}
        return {variable: folder for variable, folder in named.items() if folder is not None}


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What `sbatch` is told."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, such as `a100`."""
    cpus_per_proc: Count | None = None
    """Cores for each process; null: what the cluster gives, which may be one for the whole node."""
    memory: str | None = None
    """Memory of a node, such as `200G`; `0`: all of it; null: what the cluster gives."""
    gpus: str | None = None
    """GPUs of a node, in Slurm's words (`8`, `a100:8`); null: one for each process where
    `device` is cuda, or where it is auto and the partition has GPUs."""
    exclusive: bool = False
    """Take whole nodes."""
    array_limit: Count | None = None
    """Jobs of a sweep that run at once; null: as many as the cluster starts."""
    options: list[str] = field(default_factory=list)
    """Further options, one `#SBATCH` line each, such as `--mail-type=END`."""


@dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Machines reached over ssh."""

    hosts: list[str] = field(default_factory=list)
    """Names or addresses, the first one leads; an entry may say `user@host`. More of them than
    `nodes` are spares for those that do not answer."""
    ssh_options: list[str] = field(default_factory=list)
    """Further options of ssh, such as `-p 2222`."""
    silence_s: Annotated[int, Field(ge=5)] = 30
    """A link over which nothing has come for so many seconds counts as cut, on both sides."""
    wait_s: Annotated[int, Field(ge=0)] = 600
    """Seconds to wait for machines that no longer answer, after an attempt has lost one."""


@dataclass(frozen=True, kw_only=True)
class K8sConfig:
    """What the Kubernetes manifest says."""

    image: str | None = None
    """Container image with accrete installed."""
    namespace: str | None = None
    """Namespace; null: that of the current context."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) that holds the run folder, the caches and the data."""
    mount: str = "/mnt/accrete"
    """Where the claim is mounted."""
    cpu: str | None = None
    """Cores of a pod, such as `32`."""
    memory: str | None = None
    """Memory of a pod, such as `200Gi`."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the GPU resource."""
    backoff_limit: Annotated[int, Field(ge=0)] = 20
    """Pods that may die without a word (out of memory, a lost container) and be replaced. Evicted
    pods, and those that left in good order, do not count."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: list[dict[str, str | int]] = field(default_factory=list)
    """Taints that the pods bear, in Kubernetes' words."""
    resources: dict[str, str] = field(default_factory=dict)
    """Further resources of a pod, such as `rdma/hca: "1"`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of the job, such as the queue of Kueue."""
    priority_class: str | None = None
    """Priority of the pods."""
    pull_secrets: list[str] = field(default_factory=list)
    """Secrets to pull the image with."""
    user: Annotated[int, Field(ge=1)] | None = None
    """User id of the processes, which then have no further rights, as Kubernetes' `restricted`
    standard for pods wants it; null: what the image says, often root."""
    group: Annotated[int, Field(ge=1)] | None = None
    """Group id of the processes and of the files that they write; null: that of the image."""
    capabilities: list[str] = field(default_factory=list)
    """Capabilities that a container has beyond its others, such as `IPC_LOCK` for InfiniBand. They
    are root's: the processes of a `user` do not get them."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Everything `accrete launch` needs to know about a place."""

    description: str = ""
    """One sentence."""
    nodes: Count = 1
    """Nodes of a run."""
    procs_per_node: Count = 1
    """Processes on each node; one for each GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`engine.device` of the runs; auto leaves it to the recipe."""
    time: str | None = None
    """Time limit of one job, as Slurm writes it: minutes, `HH:MM:SS` or `D-HH:MM:SS`."""
    grace_s: Annotated[int, Field(ge=10)] = 300
    """Seconds before the time limit at which the run saves and leaves: more than one training
    step and one checkpoint take."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Attempts in a row that may end without progress, where the cluster is the likely cause,
    before the run counts as failed."""
    prepare: Literal["submit", "node"] = "submit"
    """Where model and rows are made ready: on the submitting machine, before anything is queued,
    or on the first node."""
    python: str | None = None
    """Interpreter on the nodes; null: the path of the one that submits (`python` in pods)."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the start on each node, such as `module load cuda`. Slurm's script, which
    decides what follows, runs them as well: twice on the first node."""
    env: dict[str, str] = field(default_factory=dict)
    """Further environment variables on all nodes, such as `NCCL_IB_HCA`."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    k8s: K8sConfig = field(default_factory=K8sConfig)


_TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


def time_in_seconds(text: str) -> int:
    """Seconds of a Slurm time: `90` (minutes), `30:00`, `12:00:00`, `2-00`, `2-12:30:00`.

    Raises:
        ValueError: It is no such time.
    """
    if _TIME.fullmatch(text) is None:
        raise ValueError(text)
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    if len(parts) == 2:
        return parts[0] * 60 + parts[1]
    return (parts[0] * 60 + parts[1]) * 60 + parts[2]


def load_cluster(
    name: str | Path | None,
    *,
    nodes: int | None = None,
    procs_per_node: int | None = None,
    time: str | None = None,
) -> ClusterConfig:
    """The settings of a cluster, by the name of a shipped file (`two_nodes_8`) or by path.

    Args:
        name: Name or file; None: the defaults.
        nodes: `--nodes`.
        procs_per_node: `--procs-per-node`.
        time: `--time`.

    Raises:
        ConfigError: There is no such file, or it is wrong; all mistakes are listed.
    """
    given = {"nodes": nodes, "procs_per_node": procs_per_node, "time": time}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    title = "command line" if name is None else str(name)
    problems = ProblemList()
    tree = Node({}, in_file(title, 1))
    if name is not None:
        file = find_cluster(name)
        read = read_file(file, shown_path(file), problems)
        problems.raise_if_any(title, "cluster")
        assert read is not None
        tree = Node({}, read.origin) if read.value is None else read
    config = build_as(ClusterConfig, tree, problems, "cluster settings")
    problems.raise_if_any(title, "cluster")
    assert config is not None
    config = replace(config, **options)
    _check(config, tree, time, problems)
    problems.raise_if_any(title, "cluster")
    return config


def nodes_in_file(name: str | Path | None) -> int | None:
    """`nodes` of a cluster's file that is known to be sound; None if it does not say them."""
    if name is None:
        return None
    file = find_cluster(name)
    read = read_file(file, shown_path(file), ProblemList())
    node = None if read is None else read.get("nodes")
    return node.value if node is not None and isinstance(node.value, int) else None


def _check(config: ClusterConfig, tree: Node, option: str | None, problems: ProblemList) -> None:
    """What types alone do not say."""
    if config.time is not None:
        node = tree.get("time")
        where = "option --time" if option or node is None else node.origin.where
        try:
            seconds = time_in_seconds(config.time)
        except ValueError:
            problems.add(
                where,
                "time",
                f"given: {config.time!r}; allowed: minutes, HH:MM:SS or D-HH:MM:SS",
                "for example 12:00:00",
            )
            return
        if seconds <= config.grace_s:
            problems.add(
                where,
                "time",
                f"given: {config.time} ({seconds} s); grace_s is {config.grace_s} s, so the run "
                "would be told to save before it has begun",
                "take a longer time, or a smaller grace_s",
            )


def find_cluster(name: str | Path) -> Path:
    """The file of a cluster.

    Raises:
        ConfigError: Neither a shipped name nor a file.
    """
    text = str(name)
    if not isinstance(name, Path) and not looks_like_file(text):
        shipped = named_file(f"clusters/{text.removeprefix('clusters/')}")
        if shipped is not None:
            return shipped
    path = Path(text).expanduser()
    if path.is_file():
        return path
    known = sorted(file.stem for file in (recipes_folder() / "clusters").glob("*.yaml"))
    near = did_you_mean(nearest(path.stem, known))
    raise ConfigError(
        f"--cluster {text}: there is no such file; known clusters: {', '.join(known) or 'none'}; "
        "or the path of a .yaml file" + (f"\n    -> {near}" if near else "")
    )
