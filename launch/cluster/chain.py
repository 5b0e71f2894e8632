"""Jobs that follow others under Slurm: `python -m accrete.launch.cluster.chain`.

`next`: where a site forbids `scontrol requeue`, a new job goes on with the run, and the old one
ends well. So the end of a parent's job is not yet the end of the parent, and a branch of a sweep
asks before it begins, by `await`. Its status is 0: begin; 75: a new job of the branch waits in its
place; 1: the parent will not come any further by itself.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accrete.launch.cluster import attempts, slurm
from accrete.launch.cluster.join import VISIBLE_S
from accrete.launch.cluster.request import REQUEST_FILE, Branch
from accrete.pipeline.errors import AccreteError, RunFolderError
from accrete.pipeline.run_dir import RunDir, read_json

BEGIN, WAITS = 0, 75


def submit_next(folder: RunDir, options: Sequence[str]) -> str:
    """Queue the run's script once more, and note the job; its number.

    Args:
        folder: The run folder.
        options: What it depends on, for `sbatch`.

    Raises:
        SlurmError: Slurm refuses it.
    """
    job = slurm.submit(folder.launch / slurm.SCRIPT, options)
    attempts.note_queued(folder, job)
    return job


def go_on(folder: RunDir) -> int:
    """A new job for the run, after the one that this is called in."""
    job = submit_next(folder, [f"--dependency=afterany:{_this_job()}"])
    _say(f"requeueing is forbidden here: job {job} goes on")
    return BEGIN


def _this_job() -> str:
    """The job that this is called in; an element of an array by its place.

    By its number alone Slurm takes one of the elements for the whole array.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def await_parent(folder: RunDir, seconds: float = VISIBLE_S) -> int:
    """Whether a branch can begin; if a job still works on its parent, a new one waits for that.

    Args:
        folder: The branch's run folder.
        seconds: How long the parent's files may take to show up here, and Slurm to answer.

    Raises:
        RunFolderError: The parent lacks the stage, and no job works on it.
        SlurmError: Slurm does not answer, or refuses the new job.
    """
    content = read_json(folder.launch / REQUEST_FILE)["branch"]
    branch = Branch(parent=Path(content["parent"]), stage=content["stage"])
    parent = RunDir(branch.parent)
    if folder.is_run() or attempts.has_finished(parent):
        return BEGIN
    job = attempts.queued_job(parent)
    if job is not None and _is_held(job, seconds):
        options = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{job}"]
        mine = submit_next(folder, options)
        _say(f"{parent.path} goes on in job {job}; job {mine} waits for it, in place of this one")
        return WAITS
    _require_stage(parent, branch.stage, seconds)
    return BEGIN


def _is_held(job: str, seconds: float) -> bool:
    """Whether Slurm holds a job; a slurmctld that is busy is asked again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return slurm.job_state(job) is not None
        except slurm.SlurmError:
            if time.monotonic() > deadline:
                raise
        time.sleep(5)


def _require_stage(parent: RunDir, stage: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (parent.checkpoints / f"stage-{stage}" / "checkpoint.json").is_file():
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{parent.path}: this run branches off there after stage {stage} (from 0), which "
                "is not finished, and no job works on it. Give the command of the sweep again: it "
                "goes on with all runs that are not finished."
            )
        time.sleep(1)


def main() -> None:
    """One of the two steps, for a job's script."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("step", choices=("next", "await"))
    parser.add_argument("--run-dir", type=Path, required=True)
    options = parser.parse_args()
    steps = {"next": go_on, "await": await_parent}
    try:
        status = steps[options.step](RunDir(options.run_dir))
    except AccreteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(status)


def _say(line: str) -> None:
    print(f"accrete: {line}", flush=True)


if __name__ == "__main__":
    main()
