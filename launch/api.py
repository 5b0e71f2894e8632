"""accrete from Python: load a recipe, run it, read the result.

    from accrete.launch.api import load_recipe, run
    result = run(load_recipe("quickstart", "seed=1"), "runs/one")
    print(result.metrics["backward_transfer"])

The command line does its work through these functions as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accrete.launch.cluster.attempts import take_over
from accrete.launch.environment import choose_device, choose_procs
from accrete.launch.folder import (
    is_usable,
    note_resume,
    replace_prepared,
    write_start,
)
from accrete.launch.local import launch_local
from accrete.launch.prepare import Say, prepare
from accrete.pipeline.errors import AccreteError, ConfigError, InputError, RunFolderError
from accrete.pipeline.run_dir import RunDir, read_json

if TYPE_CHECKING:
    from accrete.pipeline.config.load import LoadedRecipe

RESUMABLE = ("engine", "log", "checkpoint")
"""Sections that a resumed run may change: they do not touch what is learned."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run has come to, finished or not."""

    path: Path
    """The run folder."""
    tasks: list[str]
    """Names of the tasks, in order."""
    matrix: list[list[float | None]]
    """`matrix[t][i]`: percent on task i after stage t, i <= t; one row per finished stage."""
    metrics: dict[str, float | None]
    """Average performance, backward transfer and the others of matrix.json, in points."""

    @property
    def finished(self) -> bool:
        """Whether every stage is scored."""
        return len(self.matrix) == len(self.tasks)

    @property
    def report(self) -> Path:
        """The run's HTML report."""
        return RunDir(self.path).report


def load_recipe(name_or_path: str | Path, *overrides: str) -> LoadedRecipe:
    """A recipe by name (`standard_cl/order1`) or file, with `a.b=v` overrides.

    Raises:
        ConfigError: All mistakes of the recipe and the overrides at once.
    """
    from accrete.pipeline.config.load import load_recipe as load

    return load(name_or_path, overrides)


def run(
    recipe: LoadedRecipe,
    run_dir: str | Path,
    procs: int | None = None,
    say: Say | None = None,
) -> RunResult:
    """Run a recipe from start to end in a new folder.

    Args:
        recipe: As `load_recipe` gives it.
        run_dir: A folder that does not exist or is empty.
        procs: Processes on this machine; default: what the recipe says, else all GPUs, or 2.
        say: Called with lines about the preparation; default: print to stderr.

    Raises:
        InputError: Bad input; no run folder is left behind.
        LaunchError: A worker failed; `resume` goes on from the last checkpoint.
    """
    if procs is not None:
        recipe = load_recipe(recipe.file, *recipe.overrides, f"engine.procs={procs}")
    folder = _folder(run_dir)
    folder.check_free()
    prepared = prepare(recipe.config, say or _say)
    folder.create()
    ours = False
    try:
        with folder.lock() as lock:
            ours = True  # without the lock it is another's, who started at the same moment
            write_start(folder, recipe, prepared)
            _launch(folder, (), prepared.procs, prepared.device, lock)
    except BaseException as error:
        # Bad input leaves no folder behind, and a start that was cut short no half of one.
        if ours and (_is_bad_input(error) or not folder.is_run()):
            folder.remove_if_empty_run()
        raise
    return _conclude(folder)


def resume(
    run_dir: str | Path,
    *overrides: str,
    procs: int | None = None,
    say: Say | None = None,
) -> RunResult:
    """Go on with a run from its newest checkpoint; a finished run is only read.

    Args:
        run_dir: The run folder.
        overrides: Changes of `engine.*`, `log.*` and `checkpoint.*`.
        procs: Processes on this machine, as `engine.procs`.
        say: Called with lines about the preparation; default: print to stderr.

    Raises:
        ConfigError: Another key is overridden.
        DataError: The rows are not those that the run started with.
        LaunchError: A worker failed.
    """
    if procs is not None:
        overrides = (*overrides, f"engine.procs={procs}")
    folder = _folder(run_dir)
    folder.require_run()
    check_resumable(overrides)
    recipe = load_recipe(folder.recipe, *overrides)
    with folder.lock() as lock:
        if not is_finished(folder):
            device = choose_device(recipe.config.engine)
            count = choose_procs(recipe.config.engine, device)
            if not is_usable(folder):
                replace_prepared(folder, prepare(recipe.config, say or _say))
            note_resume(folder, overrides, count, device)
            _launch(folder, overrides, count, device, lock)
    return _conclude(folder)


def branch(
    run_dir: str | Path,
    stage: int,
    new_dir: str | Path,
    *overrides: str,
    procs: int | None = None,
    say: Say | None = None,
) -> RunResult:
    """Copy a run up to a finished stage and go on from there with other settings.

    Args:
        run_dir: The run to branch from; it is not changed.
        stage: Last stage that is shared, from 0.
        new_dir: Folder of the branch, new or empty.
        overrides: What differs from then on, such as `method=ewc_lora`.
        procs: Processes on this machine, as `engine.procs`.
        say: Called with lines about the preparation; default: print to stderr.

    Raises:
        InputError: The stage is not finished, an override changes what is shared, the rows of the
            shared tasks have changed, or the new folder is taken.
        LaunchError: A worker failed.
    """
    from accrete.launch.branch import branch_recipe, start_branch

    if procs is not None:
        overrides = (*overrides, f"engine.procs={procs}")
    parent, child = _folder(run_dir), _folder(new_dir)
    recipe = branch_recipe(parent, stage, overrides)
    child.check_free()
    prepared = prepare(recipe.config, say or _say)
    start_branch(parent, stage, child, recipe, prepared)
    ours = False
    try:
        with child.lock() as lock:
            ours = True
            _launch(child, (), prepared.procs, prepared.device, lock)
    except BaseException as error:
        if ours and _is_bad_input(error) and not child.stage(stage + 1).path.exists():
            child.discard()
        raise
    return _conclude(child)


def read_result(run_dir: str | Path) -> RunResult:
    """What a run folder says, finished or not.

    Raises:
        RunFolderError: It is no run folder, or no stage has been scored yet.
    """
    folder = _folder(run_dir)
    folder.require_run()
    if not folder.matrix.is_file():
        raise RunFolderError(
            f"{folder.path}: no stage has been scored yet. Go on with "
            f"`accrete resume {folder.path}`."
        )
    content = read_json(folder.matrix)
    return RunResult(
        path=folder.path,
        tasks=content["tasks"],
        matrix=content["matrix"],
        metrics=content["metrics"],
    )


def is_finished(folder: RunDir) -> bool:
    """Whether every stage of the run is scored."""
    return folder.matrix.is_file() and read_result(folder.path).finished


def check_resumable(overrides: Sequence[str]) -> None:
    """Make sure that overrides of a resumed run leave alone what is learned.

    Raises:
        ConfigError: One of them does not.
    """
    wrong = [text for text in overrides if text.partition(".")[0] not in RESUMABLE]
    if wrong:
        raise ConfigError(
            f"A resumed run cannot change {', '.join(wrong)}: its first stages were made without. "
            f"Allowed: {', '.join(f'{section}.*' for section in RESUMABLE)}. "
            "For other settings start a new run."
        )


def _folder(path: str | Path) -> RunDir:
    """A run folder as it was named; a shell leaves the `~` of `--run-dir=~/x` to us."""
    return RunDir(os.path.expanduser(path))


def _is_bad_input(error: BaseException) -> bool:
    return isinstance(error, AccreteError) and error.exit_code == InputError.exit_code


def _launch(folder: RunDir, overrides: Sequence[str], procs: int, device: str, lock: int) -> None:
    launch_local(
        folder,
        ["--run-dir", str(folder.path.resolve()), *overrides],
        procs=procs,
        device=device,
        lock=lock,
        variables=take_over(folder),
    )


def _conclude(folder: RunDir) -> RunResult:
    from accrete.eval.report import refresh_report

    refresh_report(folder.path)
    return read_result(folder.path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


__all__ = ["RunResult", "branch", "load_recipe", "read_result", "resume", "run"]
