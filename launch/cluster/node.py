"""What runs once on each node: `python -m accrete.launch.cluster.node --run-dir DIR`.

Reads the place that the launcher gave (see `contract`), makes the run folder ready where that is
left to the first node, takes the fencing token, and becomes torchrun with one worker per process.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accrete.launch.cluster import attempts, contract
from accrete.launch.cluster.network import find_interface
from accrete.launch.cluster.request import (
    KeptRequest,
    OtherRunError,
    read_request,
    require_same_recipe,
)
from accrete.launch.local import PARENT_VARIABLE
from accrete.pipeline.errors import AccreteError, RunFolderError
from accrete.pipeline.run_dir import RunDir

NOT_OURS = 3
"""Exit status where the folder holds another run, whose owner and markers stay as they are."""
PREPARED_S = {"submit": 300.0, "node": 7200.0}
"""Seconds within which the first node opens the run folder, by where the run is prepared."""


def main() -> None:
    """Get ready, then become torchrun."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(
        "--request", type=Path, help="folder with request.json; default: RUN/launch"
    )
    parser.add_argument(
        "--wait", type=float, help="seconds that the first node has to open the run folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=v", help="changes of a resumed run")
    options = parser.parse_args()
    try:
        command, environment = get_ready(
            options.run_dir, options.request, options.overrides, options.wait
        )
    except AccreteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, OtherRunError):
            sys.exit(NOT_OURS)
        _leave_word(options.run_dir, error)
        sys.exit(error.exit_code)
    print(f"accrete: {shlex.join(command)}", flush=True)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def get_ready(
    run_dir: Path,
    request_dir: Path | None,
    overrides: Sequence[str],
    wait_s: float | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Everything before torchrun.

    Args:
        run_dir: The run folder.
        request_dir: Folder with request.json; None: `RUN/launch`.
        overrides: Changes of a resumed run.
        wait_s: Seconds that the first node has to open the folder; None: see `PREPARED_S`.

    Returns:
        The command of torchrun on this node, and its environment.

    Raises:
        AccreteError: The place, the request or the run folder is not what it must be.
    """
    place = contract.read_place(os.environ)
    folder = RunDir(run_dir.absolute())
    request = read_request(request_dir or folder.launch)
    overrides = [*request.changes, *overrides]
    interface = request.cluster.network.interface
    if interface is None and place.nodes > 1:
        interface = find_interface(place.master_addr)
    environment = contract.node_environment(place, request.cluster, interface, os.environ)
    contract.make_local_folders(request.cluster, environment, os.environ)
    os.environ.update(environment)
    attempt = environment.setdefault(contract.ATTEMPT, f"by-hand-{int(time.time())}")
    if place.is_first:
        _require_ours(folder, request)
        require_progress(folder, request.cluster.retries)
        _open_folder(folder, request, overrides, place)
        token = attempts.begin_attempt(
            folder, attempt, {"nodes": place.nodes, "world": place.world}
        )
        environment[attempts.TOKEN_VARIABLE] = token
    else:
        environment.pop(attempts.TOKEN_VARIABLE, None)
        _await_first_node(folder, wait_s or PREPARED_S[request.cluster.prepare])
    # torchrun takes this process over, and with it its number: a worker dies with its agent.
    environment[PARENT_VARIABLE] = str(os.getpid())
    shutdown = max(5, request.cluster.grace_s - 10)
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *contract.torchrun_options(place, shutdown),
        *("-m", "accrete.launch.worker", "--run-dir", str(folder.path), *overrides),
    ], environment


def _require_ours(folder: RunDir, request: KeptRequest) -> None:
    """Make sure of what nobody has compared where the submitting machine does not see the folder.

    Raises:
        OtherRunError: It holds a run of another recipe.
    """
    from accrete.pipeline.config.load import load_recipe

    if folder.is_run():
        require_same_recipe(folder, load_recipe(request.recipe))


def _open_folder(
    folder: RunDir, request: KeptRequest, overrides: Sequence[str], place: contract.Place
) -> None:
    """On the first node: make the run folder if there is none yet, or note the resume."""
    from accrete.launch.folder import is_usable, note_resume, replace_prepared
    from accrete.launch.prepare import prepare
    from accrete.pipeline.config.load import load_recipe

    if not folder.is_run():
        make_folder(folder, request)
        return
    recipe = load_recipe(folder.recipe, overrides)
    if not is_usable(folder):
        # Another cache than where the run was made ready: the rows must come out the same.
        replace_prepared(folder, prepare(recipe.config, _say, elsewhere=True))
    if folder.events.exists():
        note_resume(folder, overrides, place.procs_per_node, recipe.config.engine.device)


def require_progress(folder: RunDir, retries: int) -> None:
    """Make sure that a scheduler which starts the job again and again gets somewhere.

    Raises:
        RunFolderError: More than `retries` + 1 attempts, which nothing judged, all stood still.
    """
    still = attempts.standstill(folder)
    if len(still) > retries:
        raise RunFolderError(
            f"{folder.path}: {len(still)} attempts in a row have brought nothing "
            f"({attempts.read_progress(folder)}). Look into {folder.launch}, then launch it again."
        )


def make_folder(folder: RunDir, request: KeptRequest) -> None:
    """Prepare the run here: model, rows, recipe.yaml, run.json; or branch off another run.

    Raises:
        InputError: The recipe, the model or the rows are wrong.
    """
    from accrete.launch.branch import start_branch
    from accrete.launch.folder import write_start
    from accrete.launch.prepare import prepare
    from accrete.pipeline.config.load import load_recipe

    recipe = load_recipe(request.recipe)
    prepared = prepare(recipe.config, _say, elsewhere=True)
    if request.branch is not None:
        parent = RunDir(request.branch.parent)
        start_branch(parent, request.branch.stage, folder, recipe, prepared)
        return
    folder.create()
    write_start(folder, recipe, prepared)


def _await_first_node(folder: RunDir, seconds: float) -> None:
    """On the other nodes: wait until the first one has made the folder ready, for the first time.

    At later attempts torchrun's own rendezvous is all there is to wait for.

    Raises:
        RunFolderError: It has not.
    """
    deadline = time.monotonic() + seconds
    while not any(line["event"] == "begun" for line in attempts.read_attempts(folder)):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{folder.path}: the first node has not opened this run folder within "
                f"{seconds:.0f} s. Either it never started, or the folder is not on a file system "
                "that all nodes share."
            )
        time.sleep(0.3)


def _leave_word(run_dir: Path, error: AccreteError) -> None:
    """Let `verdict` know that the attempt failed for a reason of its own."""
    from accrete.launch.failures import report_failure

    folder = RunDir(run_dir)
    rank = int(os.environ.get("NODE_RANK") or 0) * int(os.environ.get("NPROC_PER_NODE") or 1)
    attempt = os.environ.get(contract.ATTEMPT)
    try:
        if rank == 0 and attempt and attempts.begun(folder, attempt) is None:
            attempts.begin_attempt(folder, attempt, {})
        report_failure(folder, rank, error)
    except OSError as problem:
        print(f"error: {run_dir}: {problem}", file=sys.stderr)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
