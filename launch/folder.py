"""What the launcher writes into a run folder: how the run began, and how it went on."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accrete.launch.environment import command_line, git_state, hardware, versions
from accrete.pipeline.errors import DataError
from accrete.pipeline.run_dir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from accrete.launch.prepare import Prepared
    from accrete.pipeline.config.load import LoadedRecipe


def write_start(folder: RunDir, recipe: LoadedRecipe, prepared: Prepared) -> None:
    """Write prepared.json, recipe.yaml and run.json of a new run."""
    write_json(folder.prepared, prepared.to_json())
    recipe.dump_yaml(folder.recipe)
    # Written last: a folder with run.json is a run.
    write_json(
        folder.run,
        {
            "name": recipe.name,
            "method": recipe.config.method.kind,
            "seed": recipe.config.seed,
            "command": command_line(),
            "started": _now(),
            "recipe_file": str(recipe.file),
            "overrides": list(recipe.overrides),
            "procs": prepared.procs,
            "device": prepared.device,
            "versions": versions(),
            "hardware": hardware(prepared.device),
            "origins": recipe.origins,
            "git": git_state(),
            "resumes": [],
        },
    )


def note_resume(folder: RunDir, overrides: Sequence[str], procs: int, device: str) -> None:
    """Add a resume to run.json."""
    content = read_json(folder.run)
    content["resumes"] = [
        *content.get("resumes", []),
        {
            "command": command_line(),
            "started": _now(),
            "overrides": list(overrides),
            "procs": procs,
            "device": device,
            "versions": versions(),
        },
    ]
    write_json(folder.run, content)


def is_usable(folder: RunDir) -> bool:
    """Whether the cache still holds what the run was prepared with."""
    if not folder.prepared.is_file():
        return False
    content = read_json(folder.prepared)
    folders = [task[key] for task in content["tasks"] for key in ("train_dir", "eval_dir")]
    model = Path(content["model_path"])
    # A model that is no absolute path is a hub id, which transformers looks up by itself.
    return all(Path(p).is_dir() for p in folders) and (model.is_dir() or not model.is_absolute())


def replace_prepared(folder: RunDir, prepared: Prepared) -> None:
    """Take what was prepared anew, if it is the same as before.

    Raises:
        DataError: The rows have changed.
    """
    if folder.prepared.is_file():
        require_same_rows(folder, prepared, len(prepared.tasks))
    write_json(folder.prepared, prepared.to_json())


def require_same_rows(folder: RunDir, prepared: Prepared, num_tasks: int) -> None:
    """Make sure that the first `num_tasks` tasks are those that the run in `folder` started with.

    Raises:
        DataError: Rows, prompts or tokenizer of a task have changed.
    """
    before = {t["name"]: t["fingerprint"] for t in read_json(folder.prepared)["tasks"]}
    changed = [
        task.name
        for task in prepared.tasks[:num_tasks]
        if before.get(task.name) != task.fingerprint
    ]
    if changed:
        raise DataError(
            f"{folder.path}: the rows, prompts or tokenizer of {', '.join(changed)} are not "
            "those that the run started with. Restore them, or start a new run."
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
