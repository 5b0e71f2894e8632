"""Where this `accrete doctor` stands: alone on its machine, or on one node of a launch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping

from accrete.launch.cluster.contract import PLACE, Place, choose_port, read_place
from accrete.pipeline.errors import ConfigError

STEPS_PER_JOB = 7
"""Ports between two jobs' rendezvous, so that two steps of a job rarely share one."""


def find_place(environment: Mapping[str, str], procs: Callable[[], int]) -> Place | None:
    """The place that a launcher or Slurm gave this node; None on a machine of its own.

    Args:
        environment: Variables of this process.
        procs: Gives the processes on each node, for Slurm does not say how many it is to run.

    Raises:
        ConfigError: Some of the launcher's variables are there and others are not, or Slurm
            starts more than one of these commands on a node.
    """
    if any(environment.get(name) for name in PLACE[:3]):
        return read_place(environment)
    if "SLURM_STEP_NODELIST" in environment and "SLURM_NODEID" in environment:
        return _slurm_place(environment, procs)
    return None


def _slurm_place(environment: Mapping[str, str], procs: Callable[[], int]) -> Place:
    """The place inside a job step: `srun --ntasks-per-node=1 accrete doctor ...`."""
    nodes = int(environment["SLURM_STEP_NUM_NODES"])
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if tasks != nodes:
        raise ConfigError(
            f"srun starts {tasks} tasks on {nodes} nodes; the doctor starts a node's processes by "
            f"itself. Use `srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 accrete "
            "doctor ... --procs PROCESSES`."
        )
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID") or 0)
    return Place(
        nodes=nodes,
        node_rank=int(environment["SLURM_NODEID"]),
        procs_per_node=procs(),
        master_addr=_first_host(environment["SLURM_STEP_NODELIST"]),
        master_port=choose_port(job * STEPS_PER_JOB + step % STEPS_PER_JOB),
    )


def _first_host(nodes: str) -> str:
    """The first of Slurm's node names, such as `node[3-5,9]`."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ConfigError(
            f"Slurm's node list {nodes!r} cannot be read with scontrol: {error}. Set "
            f"{', '.join(PLACE)} on each node instead."
        ) from error
