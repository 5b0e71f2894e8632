"""A sweep under Slurm: an array of the runs that stand alone, and a chain of those that branch."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from accrete.launch.cluster import attempts, slurm
from accrete.launch.cluster.rendering import render_template
from accrete.launch.cluster.request import LaunchRequest, scheduler_name

ARRAY_SCRIPT = "sweep.sbatch"
SUBMIT_SCRIPT = "submit.sh"


def render(requests: Sequence[LaunchRequest], folder: Path) -> dict[str, str]:
    """The scripts that start the whole sweep; every run's own script comes from `slurm.render`.

    Args:
        requests: All runs, parents before branches.
        folder: The sweep's folder, above the runs'.
    """
    launch = folder / "launch"
    roots = [request for request in requests if request.branch is None]
    jobs = [_job(requests, number) for number in range(len(requests))]
    limit = requests[0].cluster.slurm.array_limit
    array = f"--array=0-{len(roots) - 1}" + (f"%{limit}" if limit else "")
    options = slurm.sbatch_options(roots[0], launch / "slurm-%A_%a.out")
    named = [x for x in options if not x.startswith("--job-name=")]
    return {
        ARRAY_SCRIPT: render_template(
            ARRAY_SCRIPT,
            runs=[str(request.run_dir) for request in roots],
            options=[f"--job-name={scheduler_name(folder)}", array, *named],
            submit=launch / SUBMIT_SCRIPT,
        ),
        SUBMIT_SCRIPT: render_template(
            SUBMIT_SCRIPT,
            script=launch / SUBMIT_SCRIPT,
            array=launch / ARRAY_SCRIPT,
            roots=[job for job in jobs if job["parent"] is None],
            branches=[job for job in jobs if job["parent"] is not None],
        ),
    }


def _job(requests: Sequence[LaunchRequest], number: int) -> dict[str, object]:
    request = requests[number]
    folders = [other.run_dir for other in requests]
    branch = request.branch
    return {
        "number": number,
        "name": request.run_dir.name,
        "run_dir": request.run_dir,
        "script": request.launch_dir / slurm.SCRIPT,
        "parent": None if branch is None else folders.index(branch.parent),
        "stage": None if branch is None else branch.stage,
    }


def start(requests: Sequence[LaunchRequest], folder: Path) -> int:
    """Submit everything; a line for each run says its job.

    Raises:
        SlurmError: There is no Slurm here, or it refuses a job.
    """
    slurm.require_slurm(folder / "launch" / ARRAY_SCRIPT)
    slurm.require_enough_nodes(requests[0])
    done = subprocess.run(
        ["bash", str(folder / "launch" / SUBMIT_SCRIPT)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise slurm.SlurmError(f"sbatch refused a job of the sweep: {done.stderr.strip()}")
    by_folder = {str(request.run_dir): request for request in requests}
    for line in done.stdout.splitlines():
        job, _, name = line.partition(" ")
        attempts.note_queued(by_folder[name].folder, job)
        print(f"job {job}: {name}")
    return 0
