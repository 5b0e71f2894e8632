"""`accrete run RECIPE [a.b=v ...]`: learn a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.completion import complete_recipe


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name (`accrete recipes ls`) or file of a recipe.",
            autocompletion=complete_recipe,
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=v", help="Values that differ.", show_default=False),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="New folder of the run; default: runs/NAME-TIME."),
    ] = None,
    procs: Annotated[
        int | None,
        typer.Option("--procs", min=1, help="Processes; default: all GPUs, or 2 on a CPU."),
    ] = None,
) -> None:
    """Train on every task in turn and score all tasks so far after each.

    Example: accrete run standard_cl/order1 data.root=../data method=ewc_lora --run-dir runs/ewc
    """
    from accrete.launch import api
    from accrete.launch.commands.conclusion import print_result

    loaded = api.load_recipe(recipe, *(overrides or ()))
    print_result(api.run(loaded, run_dir or default_folder(loaded.name), procs))


def default_folder(name: str) -> Path:
    """Where a run of this recipe goes if nobody says."""
    from datetime import datetime

    return Path("runs") / f"{name.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
