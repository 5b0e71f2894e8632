"""One rank of a run: `python -m accrete.launch.worker --run-dir DIR [a.b=v ...]`.

Started by `accrete run` on this machine, or by torchrun and srun, which set the same variables.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from accrete.launch.cluster.attempts import TOKEN_VARIABLE, mark_interrupted
from accrete.launch.cluster.join import join_launch
from accrete.launch.failures import report_failure
from accrete.launch.local import PARENT_VARIABLE
from accrete.pipeline.fence import FencedError
from accrete.pipeline.interruption import InterruptionError, StopSignal
from accrete.pipeline.run_dir import RunDir

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the launcher ends, however it ends (Linux)."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The launcher may have died before the call: then no signal comes any more.
    if os.getppid() != int(parent):
        os._exit(1)


def main() -> None:
    """Run one rank and end the process with its status."""
    die_with_parent()
    stop = StopSignal()
    stop.listen()
    faulthandler.enable()
    # Between libraries; nobody who runs a recipe can do anything about them.
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    parser = argparse.ArgumentParser(prog="python -m accrete.launch.worker")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="a.b=v", help="changes of a resumed run")
    arguments = parser.parse_args()
    try:
        status = _work(RunDir(arguments.run_dir), tuple(arguments.overrides), stop)
    except BaseException:
        # Not even word of a failure could be left, as on a full disk.
        with suppress(OSError):
            traceback.print_exc()
        status = 1
    _leave(status)


def _work(folder: RunDir, overrides: tuple[str, ...], stop: StopSignal) -> int:
    """Run this rank and leave word of a failure; returns the exit status."""
    rank = int(os.environ.get("RANK", "0"))
    token = None
    try:
        token = join_launch(folder, rank) or os.environ.get(TOKEN_VARIABLE)
        from accrete.launch.execute import execute

        execute(folder.path, overrides, stop, token if rank == 0 else None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except FencedError as error:
        # The folder belongs to somebody else: this line of a log is all that is left there.
        with folder.rank_log(rank).open("a", encoding="utf-8") as log:
            log.write(f"error: {error}\n")
        return error.exit_code
    except BaseException as error:
        # A library may have made something else of the exception that the signal raised.
        cause = InterruptionError(stop.reason) if stop.leaving else error
        if isinstance(cause, InterruptionError) and token is not None:
            mark_interrupted(folder, token, str(cause))
        return report_failure(folder, rank, cause)
    return 0


def _leave(status: int) -> None:
    """End without the interpreter's farewell: it can wait for ever in a broken process group, and
    libraries' threads have been seen to abort in it, after a run was finished.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more, or its disk is full
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
