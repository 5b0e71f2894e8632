"""`accrete branch RUN --from-stage T [a.b=v ...]`: another continuation of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.completion import complete_run


def branch(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder.", autocompletion=complete_run, show_default=False),
    ],
    from_stage: Annotated[
        int, typer.Option(min=0, help="Last stage (from 0) that is shared.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[a.b=v]...",
            help="What differs from then on, such as method=ewc_lora.",
            show_default=False,
        ),
    ] = None,
    new_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="New folder; default: RUN-stageT-TIME."),
    ] = None,
    procs: Annotated[int | None, typer.Option("--procs", min=1, help="Processes.")] = None,
) -> None:
    """Copy a run up to a finished stage and go on from there with other settings.

    Example: accrete branch runs/seq --from-stage 1 method=ewc_lora --run-dir runs/seq-then-ewc
    """
    from datetime import datetime

    from accrete.launch import api
    from accrete.launch.commands.conclusion import print_result

    parent = run_dir if run_dir.name.strip(".") else run_dir.resolve()  # `.` has no name
    folder = new_dir or parent.with_name(
        f"{parent.name}-stage{from_stage}-{datetime.now():%Y%m%d-%H%M%S}"
    )
    print_result(api.branch(run_dir, from_stage, folder, *(overrides or ()), procs=procs))
