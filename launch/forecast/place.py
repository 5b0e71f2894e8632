"""Where a planned run would take place: this machine, a cluster's settings, a GPU of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accrete.launch.cluster.contract import usable_cores
from accrete.launch.environment import choose_device, choose_procs
from accrete.launch.forecast.calibrate import calibrate
from accrete.launch.forecast.speed import (
    ASSUMED_MFU,
    AssumedSpeed,
    Gpu,
    Speed,
    assumed_gpu,
    find_gpu,
    gpu_here,
    quick_cpu,
)
from accrete.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from accrete.launch.forecast.run import Forecaster
    from accrete.pipeline.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """Machines and their speed, as far as the plan knows them."""

    device: str
    """`cpu` or `cuda`."""
    nodes: int
    procs: int
    """Processes of a node."""
    here: bool
    """This machine is the place."""
    gpu: Gpu | None
    """A GPU of the table; None: unknown, or no GPU."""
    gib: float | None = None
    """Memory of a GPU, in the table or not; None: unknown, or no GPU."""
    mfu: float = ASSUMED_MFU
    network: float | None = None
    """Bytes per second between nodes; None: unknown."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.procs

    def link(self) -> float | None:
        """Bytes per second of a rank's collectives, by the slowest way."""
        inside = None if self.gpu is None else self.gpu.link
        if self.nodes > 1 and self.network is not None:
            # All processes of a node share its way out.
            outside = self.network / self.procs
            return outside if inside is None else min(inside, outside)
        return inside

    def notes(self) -> list[str]:
        """What the seconds of traffic assume where the network is not given."""
        if self.nodes == 1 or self.network is not None:
            return []
        fast = "as free" if self.gpu is None else f"at {self.gpu.link / 1e9:g} GB/s, as inside one"
        return [
            f"traffic between the {self.nodes} nodes is counted {fast}: a network is slower; give "
            "its GB/s with --network"
        ]


def choose_place(
    config: RunConfig,
    *,
    cluster: str | None = None,
    nodes: int | None = None,
    procs_per_node: int | None = None,
    gpu: str | None = None,
    mfu: float | None = None,
    network: float | None = None,
) -> Place:
    """The place that the options of `accrete plan` name; without any of them, this machine.

    Args:
        config: The recipe.
        cluster: Name or file of a cluster's settings.
        nodes: Machines.
        procs_per_node: Processes on each.
        gpu: A GPU of the table.
        mfu: Share of its peak.
        network: Bytes per second between nodes.

    Raises:
        ConfigError: An unknown GPU or cluster, or what this machine does not have.
    """
    named = find_gpu(gpu) if gpu is not None else None
    if cluster is None and nodes is None and procs_per_node is None and named is None:
        device = choose_device(config.engine)
        known, gib = gpu_here() if device == "cuda" else (None, None)
        return Place(
            device=device,
            nodes=1,
            procs=choose_procs(config.engine, device),
            here=True,
            gpu=known,
            gib=gib,
            mfu=mfu or ASSUMED_MFU,
        )
    from accrete.launch.cluster.settings import load_cluster

    settings = load_cluster(cluster, nodes=nodes, procs_per_node=procs_per_node)
    procs = settings.procs_per_node
    if cluster is None and procs_per_node is None:
        procs = config.engine.procs or 1
    device = config.engine.device if settings.device == "auto" else settings.device
    if device == "auto":
        device = "cuda" if named is not None or cluster is not None else "cpu"
    if device == "cpu" and named is not None:
        raise ConfigError(
            f"--gpu {gpu}: the run is to use the CPU (engine.device or the cluster says so). "
            "Leave one of them out."
        )
    if config.engine.kind == "plain" and settings.nodes * procs > 1:
        raise ConfigError(
            f"engine.kind plain is one process, {settings.nodes * procs} are asked for. "
            "Use engine.kind=deepspeed."
        )
    return Place(
        device=device,
        nodes=settings.nodes,
        procs=procs,
        here=False,
        gpu=named,
        gib=None if named is None else named.gib,
        mfu=mfu or ASSUMED_MFU,
        network=network,
    )


def choose_speed(
    place: Place, forecaster: Forecaster, say: Callable[[str], None], *, measure: bool
) -> Speed | None:
    """The best basis for seconds that is at hand.

    Args:
        place: Where the run would take place.
        forecaster: Of the run.
        say: Told what takes time.
        measure: Run a calibration if none is in the cache.

    Returns:
        None if nothing is known about the place's speed.

    Raises:
        ConfigError: A calibration of another place is asked for.
        CalibrationError: It failed.
    """
    speed = _without_measuring(place, forecaster)
    if place.here:
        found = calibrate(
            forecaster.plan,
            forecaster.tracer,
            place.procs,
            forecaster.probes(),
            say,
            measure=measure,
        )
        if found is not None:
            return found if speed is None else replace(found, beside=speed)
    elif measure:
        raise ConfigError(
            "--calibrate measures this machine; leave --cluster, --nodes, --procs-per-node and "
            "--gpu out (engine.procs chooses the processes)."
        )
    return speed


def _without_measuring(place: Place, forecaster: Forecaster) -> AssumedSpeed | None:
    """The GPU of the table, or a moment on this CPU; None for a GPU that is not in the table."""
    if place.gpu is not None:
        return assumed_gpu(place.gpu, forecaster.plan.arithmetic, place.mfu, place.link())
    if place.device == "cuda":
        return None
    threads = max(1, usable_cores() // place.procs)
    speed = replace(quick_cpu(threads), link=place.link())
    return speed if place.here else replace(speed, basis=f"as if of this machine: {speed.basis}")
