"""Score a finished stage again, in one plain process, possibly in another mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accrete.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from accrete.pipeline.scoring import TaskScore

ALLOWED = ("eval.", "data.max_target_tokens", "model.dtype", "engine.device", "adapter.past")


def rescore(
    run_dir: Path,
    stage: int | None = None,
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> tuple[int, list[TaskScore]]:
    """Score tasks with the model as it stood after `stage`.

    Args:
        run_dir: A run folder.
        stage: Stage number from 0; None: the last finished one.
        tasks: Names of tasks of the sequence, also later ones; default: all up to the stage.
        overrides: Changes of `eval.*` (such as `eval.mode=generate`), `model.dtype`,
            `engine.device`, `adapter.past`.

    Returns:
        The stage and one score per task.

    Raises:
        ConfigError: An unknown task, or an override of something that is fixed by the run.
        RunFolderError: The folder is no run, or the stage is not finished.
    """
    from accrete.launch.rebuild import rebuild

    wrong = [text for text in overrides if not text.startswith(ALLOWED)]
    if wrong:
        raise ConfigError(
            f"`accrete score` cannot change {', '.join(wrong)}: it scores what the run made. "
            f"Allowed: {', '.join(name + '*' if name[-1] == '.' else name for name in ALLOWED)}."
        )
    runner = rebuild(run_dir, stage, overrides)
    handles = runner.parts.tasks
    names = [handle.name for handle in handles]
    unknown = [name for name in tasks if name not in names]
    if unknown:
        raise ConfigError(
            f"{run_dir} has no task {', '.join(unknown)}; its tasks are {', '.join(names)}."
        )
    chosen = [h for h in handles if h.name in tasks] if tasks else handles[: runner.opened + 1]
    return runner.opened, runner.evaluate(chosen)
