"""Slurm: one job that saves, queues itself again and resumes until the sequence is finished."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from accrete.launch.cluster import attempts
from accrete.launch.cluster.contract import FIRST_PORT, PORTS
from accrete.launch.cluster.rendering import render_template
from accrete.launch.cluster.request import LaunchRequest, shell_line
from accrete.launch.cluster.settings import SlurmConfig
from accrete.pipeline.errors import InputError, RunFolderError

SCRIPT = "job.sbatch"
CHAIN_MODULE = "accrete.launch.cluster.chain"
PATIENCE_S = 60.0
"""For Slurm's own commands."""
_GPU = re.compile(r"(^|,)gpu([:(,]|$)")
"""One of the resources that a node has: `lscratch:800,gpu:a100:8(S:0,1)`."""
_PARTITION = re.compile(r"^\s*(?:--partition[=\s]|-p)\s*[\"']?([^\s\"'#]+)", re.MULTILINE)
_OF_THIS_JOB = re.compile(r"SLURM_(ARRAY_|RESTART_COUNT$)")
_NO_SUCH_JOB = "Invalid job id"
"""What Slurm says of a job that it no longer knows, with the status that any failure has."""
_SET_ASIDE = 'become=("$@"); set --'
"""A script that `setup` sources without arguments would take the shell's own for its own."""
_BECOME_NODE = 'export NODE_RANK="$SLURM_NODEID"; exec "${become[@]}"'


class SlurmError(InputError):
    """Slurm is missing, or refused the job; nothing was queued."""


def render(request: LaunchRequest) -> dict[str, str]:
    """The job's script, ready for `sbatch`."""
    output = request.launch_dir / "slurm-%j.out"
    return {SCRIPT: render_script(request, sbatch_options(request, output))}


def start(request: LaunchRequest) -> int:
    """Submit the job.

    Raises:
        SlurmError: There is no Slurm here, or it refuses the job.
    """
    require_slurm(request.launch_dir / SCRIPT)
    require_enough_nodes(request)
    script = request.launch_dir / SCRIPT
    job = submit(script)
    attempts.note_queued(request.folder, job)
    print(f"job {job}: {request.run_dir}")
    print(f"output: {request.launch_dir}/slurm-{job}.out; end it with `scancel {job}`")
    return 0


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Queue a script; the job's number.

    Raises:
        SlurmError: There is no Slurm here, or it refuses the job.
    """
    done = _call(["sbatch", "--parsable", *options, str(script)], _own_environment())
    if done.returncode != 0:
        raise SlurmError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def _own_environment() -> dict[str, str]:
    """What a new job gets of this one's environment: not its place in an array, nor its restarts.

    sbatch hands them on, and Slurm sets them anew only for an element, or where a job was requeued.
    """
    return {name: value for name, value in os.environ.items() if not _OF_THIS_JOB.match(name)}


def require_slurm(script: Path) -> None:
    """Make sure that jobs can be submitted here.

    Raises:
        SlurmError: There is no Slurm.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch is not on this machine. Run the command on a login node of the cluster, or "
            f"use --dry-run and hand {script.name} to sbatch yourself."
        )


def require_idle(request: LaunchRequest) -> None:
    """Make sure that Slurm does not hold a job of this run.

    Raises:
        RunFolderError: It does.
        SlurmError: Slurm does not say.
    """
    if shutil.which("squeue") is None:
        return
    job = attempts.queued_job(request.folder)
    if job is None:
        return
    state = job_state(job)
    if state is not None:
        raise RunFolderError(
            f"{request.run_dir}: job {job} of this run is {state.lower()} "
            f"already. Wait for it, or end it with `scancel {job}`."
        )


def job_state(job: str) -> str | None:
    """The state of a job that Slurm holds, such as RUNNING; None once it has ended.

    Raises:
        SlurmError: Slurm does not answer.
    """
    done = _call(["squeue", "--noheader", "--jobs", job, "--format", "%T"])
    if done.returncode != 0 and _NO_SUCH_JOB not in done.stderr:
        raise SlurmError(
            f"squeue does not say whether job {job} is still there: {done.stderr.strip()}. Try "
            "again when Slurm answers."
        )
    return next(iter(done.stdout.split()), None)


def require_enough_nodes(request: LaunchRequest) -> None:
    """Make sure that the partition has as many nodes as are asked for.

    Slurm itself queues such a job as a rule, and it waits for ever. Where the partition is named
    past `slurm.partition` nothing is asked: such words may say more than one.

    Raises:
        SlurmError: It has not.
    """
    wanted = request.cluster.slurm.partition
    if _partition(request.cluster.slurm) != wanted:
        return
    where = ["--partition", wanted] if wanted else []
    done = _call(["sinfo", "--noheader", "--format", "%P %D", *where])
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        name, _, count = line.rpartition(" ")
        if wanted or name.endswith("*"):  # the default one
            found[name] = found.get(name, 0) + int(count)
    if found and max(found.values()) < request.nodes:
        largest, size = max(found.items(), key=lambda item: item[1])
        raise SlurmError(
            f"{request.nodes} nodes are asked for, and Slurm's partition {largest.rstrip('*')} has "
            f"{size}. Use fewer --nodes, or another slurm.partition."
        )


def sbatch_options(request: LaunchRequest, output: Path) -> list[str]:
    """What the script asks Slurm for: one option a line, as after `#SBATCH`."""
    slurm, cluster = request.cluster.slurm, request.cluster
    found = [
        f"--job-name={request.job_name}",
        f"--nodes={request.nodes}",
        "--ntasks-per-node=1",
    ]
    if slurm.cpus_per_proc is not None:
        found.append(f"--cpus-per-task={slurm.cpus_per_proc * request.procs_per_node}")
    gpus = _gpus(request)
    if gpus is not None:
        found.append(f"--gpus-per-node={gpus}")
    named = {
        "mem": slurm.memory,
        "time": cluster.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    found += [f"--{name}={value}" for name, value in named.items() if value is not None]
    if slurm.exclusive:
        found.append("--exclusive")
    return [
        *found,
        f"--signal=B:USR1@{cluster.grace_s}",
        "--requeue",
        "--open-mode=append",
        f"--output={_escape(output)}",
        *slurm.options,
    ]


def _escape(path: Path) -> str:
    """A path behind `#SBATCH`: quoted unless it is plain, for there a `#` begins a comment.

    Args:
        path: A file; in its name Slurm's `%j` and the like stand, in its folder `%` is itself.
    """
    folder = str(path.parent).replace("%", "%%")
    text = f"{folder}/{path.name}"
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _gpus(request: LaunchRequest) -> str | None:
    """GPUs to ask for on each node."""
    if request.cluster.slurm.gpus is not None:
        return request.cluster.slurm.gpus
    device = request.recipe.config.engine.device
    if device == "cuda" or (device == "auto" and _has_gpus(_partition(request.cluster.slurm))):
        return str(request.procs_per_node)
    return None


def _partition(slurm: SlurmConfig) -> str | None:
    """The partition in force: sbatch takes its variable before what a script says, and there the
    last word; None: the default one.
    """
    found = _PARTITION.findall("\n".join(slurm.options))
    return os.environ.get("SBATCH_PARTITION") or (found[-1] if found else slurm.partition)


def _has_gpus(partition: str | None) -> bool:
    """Whether Slurm knows of GPUs on any node of a partition; False without Slurm here.

    Args:
        partition: Its name, or several with commas; None: the default one.
    """
    if shutil.which("sinfo") is None:
        return False
    where = ["--partition", partition] if partition else []
    done = _call(["sinfo", "--noheader", "--format", "%P %G", *where])
    lines = [line.split() for line in done.stdout.splitlines()]
    return any(
        _GPU.search(words[-1]) is not None
        for words in lines
        if len(words) == 2 and (partition or words[0].endswith("*"))
    )


def render_script(request: LaunchRequest, options: Sequence[str]) -> str:
    """A run's script with these `#SBATCH` options."""
    run_dir = ("--run-dir", "$run_dir")
    node, verdict = request.node_command(), request.verdict_command()
    chain = ["$python", "-m", CHAIN_MODULE]
    return render_template(
        SCRIPT,
        recipe=request.recipe.name,
        nodes=request.nodes,
        procs=request.procs_per_node,
        options=options,
        run_dir=request.run_dir,
        script=request.launch_dir / SCRIPT,
        python=request.python,
        time_s=request.time_s or 0,
        setup=request.cluster.setup,
        on_node="\n".join([_SET_ASIDE, *request.cluster.setup, _BECOME_NODE]),
        port=request.cluster.network.port,
        first_port=FIRST_PORT,
        ports=PORTS,
        node_command=shell_line(["$python", *node[1:3], *run_dir]),
        verdict_command=shell_line(["$python", *verdict[1:3], *run_dir]),
        next_command=shell_line([*chain, "next", *run_dir]),
        await_command=shell_line([*chain, "await", *run_dir]) if request.branch else None,
        retries=request.cluster.retries,
    )


def _call(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} has not answered within {PATIENCE_S:.0f} s; is slurmctld running?"
        ) from None
