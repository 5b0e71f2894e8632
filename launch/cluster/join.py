"""How a worker that torchrun started finds its place in a launch over several nodes."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack

from accrete.launch.cluster.attempts import TOKEN_VARIABLE
from accrete.launch.cluster.contract import EXPECTED_WORLD
from accrete.pipeline.errors import DistributedError, RunFolderError
from accrete.pipeline.fence import read_owner
from accrete.pipeline.run_dir import RunDir

VISIBLE_S = 60.0
"""Seconds that a folder may take to show up on another node of a shared file system."""
LOCKED_S = 30.0
"""Seconds that processes of an earlier attempt, fenced off by now, have to let go of the folder."""

_held = ExitStack()


def join_launch(folder: RunDir, rank: int) -> str | None:
    """Check this worker's place; returns the attempt's token, None outside of a cluster launch.

    Rank 0 keeps the launcher's output to itself; the others write to `logs/rank-<r>.log`.

    Raises:
        DistributedError: Not all processes of the launch are in one process group.
        RunFolderError: The run folder is not visible here.
    """
    expected = os.environ.get(EXPECTED_WORLD)
    if expected is None:
        return None
    wait_for_folder(folder)
    folder.logs.mkdir(parents=True, exist_ok=True)
    if rank != 0:
        log = os.open(folder.rank_log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    world = os.environ.get("WORLD_SIZE")
    if world != expected:
        raise DistributedError(
            f"this process sees {world} ranks, and the launch has {expected}: its nodes do not "
            "know of each other. Start all of them through `accrete launch`."
        )
    if rank == 0:
        _hold_lock(folder)
    return os.environ.get(TOKEN_VARIABLE) or read_owner(folder.owner)


def wait_for_folder(folder: RunDir, seconds: float = VISIBLE_S) -> None:
    """Wait until the run folder is visible here.

    Raises:
        RunFolderError: It is not, which most often means that it is not on a shared file system.
    """
    deadline = time.monotonic() + seconds
    while not folder.is_run():
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{folder.path}: not visible on this node after {seconds:.0f} s. The run folder "
                "must be on a file system that all nodes share."
            )
        time.sleep(0.2)


def _hold_lock(folder: RunDir) -> None:
    """Keep `accrete resume` by hand away, for as long as this process lives.

    The fencing token, not the lock, keeps earlier attempts from writing: one that still holds the
    lock, on a machine that nobody reaches any more, does not keep the run from going on.
    """
    deadline = time.monotonic() + LOCKED_S
    while True:
        try:
            _held.enter_context(folder.lock())
            return
        except RunFolderError as error:
            if time.monotonic() > deadline:
                print(f"warning: {error} The run goes on without the lock.", file=sys.stderr)
                return
        time.sleep(0.5)
