"""`accrete resume RUN [a.b=v ...]`: go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.completion import complete_run


def resume(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder.", autocompletion=complete_run, show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="a.b=v",
            help="Changes of engine.*, log.* and checkpoint.*.",
            show_default=False,
        ),
    ] = None,
    procs: Annotated[
        int | None, typer.Option("--procs", min=1, help="Processes, if others than before.")
    ] = None,
) -> None:
    """Go on from the newest sound checkpoint, as if the run had never stopped.

    Example: accrete resume runs/ewc engine.zero_stage=3 --procs 4
    """
    from accrete.launch import api
    from accrete.launch.commands.conclusion import print_result

    print_result(api.resume(run_dir, *(overrides or ()), procs=procs))
