"""`accrete fetch RECIPE [a.b=v ...]`: fill the caches where there is network."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from accrete.launch.completion import complete_recipe


def fetch(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name or file of a recipe.", autocompletion=complete_recipe, show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="a.b=v", help="Values that differ.", show_default=False),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Name or file of a cluster: fill its caches."),
    ] = None,
) -> None:
    """Put model, data sets and tokenised tasks of a recipe into the caches.

    Run it on a login node; afterwards the recipe runs with HF_HUB_OFFLINE=1, and
    `accrete doctor RECIPE --offline` says so.

    Example: accrete fetch standard_cl/order1 model=t5_large data.root=../data
    """
    from accrete.launch import api
    from accrete.launch.cluster.settings import load_cluster
    from accrete.launch.doctor.examine import use_storage
    from accrete.launch.doctor.fetch import fetch as fetch_recipe

    use_storage(load_cluster(cluster))
    if not sys.stderr.isatty():  # progress bars would fill a log
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    words = " ".join([recipe, *(overrides or ())])
    fetch_recipe(
        api.load_recipe(recipe, *(overrides or ())), words, lambda line: typer.echo(line, err=True)
    )
    typer.echo(f"Everything is here. Check it: accrete doctor {words} --offline")
