"""A finished stage's model in one plain process, for scoring, export and a look from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accrete.pipeline.stage_runner import StageRunner


def rebuild(run_dir: Path, stage: int | None, overrides: Sequence[str] = ()) -> StageRunner:
    """The model as it stood after `stage`, without any process group.

    Args:
        run_dir: A run folder.
        stage: Stage number from 0; None: the last finished one.
        overrides: `a.b=v` changes, such as `eval.mode=generate`.

    Raises:
        RunFolderError: The folder is no run, or the stage is not finished.
    """
    import torch

    from accrete.launch.execute import build
    from accrete.pipeline.checkpoint import positions
    from accrete.pipeline.distributed.comm import Ranks
    from accrete.pipeline.records import Recorder
    from accrete.pipeline.stage_runner import StageRunner

    run = RunDir(run_dir)
    run.require_run()
    finished = [p.stage for p in positions(run.path) if p.step is None]
    if not finished:
        raise RunFolderError(f"{run_dir}: no stage is finished yet. Go on with `accrete resume`.")
    chosen = max(finished) if stage is None else stage
    if chosen not in finished:
        raise RunFolderError(
            f"{run_dir}: stage {chosen} is not finished; finished are {min(finished)} to "
            f"{max(finished)} (stages count from 0)."
        )
    config = load_recipe(run.recipe, ("engine.kind=plain", "engine.procs=1", *overrides)).config
    # A run that was made on a GPU is looked at wherever its folder is.
    on_gpu = config.engine.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    parts = build(run, config, Ranks(0, 1, device), record=False)
    runner = StageRunner(replace(parts, recorder=Recorder(None)))
    runner.open_stage(chosen)
    return runner
