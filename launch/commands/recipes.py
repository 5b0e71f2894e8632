"""`accrete recipes ls | show | copy`: the shipped recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show and copy recipes.", no_args_is_help=True)


@app.command("ls")
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the shipped recipes.

    Example: accrete recipes ls
    """
    from accrete.pipeline.config.catalog import list_recipes

    cards = list_recipes()
    if as_json:
        import json

        rows = [
            {
                "name": card.name,
                "description": card.description,
                "tasks": card.tasks,
                "path": str(card.path),
            }
            for card in cards
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    from accrete.launch.commands.tables import print_table

    print_table(
        ("recipe", "tasks", "what it is"),
        [(card.name, str(card.tasks), card.description) for card in cards],
    )


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name or file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, as a.b=v.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The file as it is written.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Also the defaults of every single task.")
    ] = False,
) -> None:
    """Print every value of a recipe with the place that it comes from.

    Example: accrete recipes show standard_cl/order1 model=smollm2_135m
    """
    if raw:
        if overrides:
            raise typer.BadParameter("--raw prints the file itself; leave out the overrides")
        from accrete.pipeline.config.catalog import recipe_text

        typer.echo(recipe_text(recipe), nl=False)
        return
    from accrete.pipeline.config.load import load_recipe

    typer.echo(load_recipe(recipe, overrides or []).to_yaml(brief=not every), nl=False)


@app.command("copy")
def copy(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="New file, or a folder.", show_default=False)],
) -> None:
    """Copy a recipe, to change it into one of your own.

    Example: accrete recipes copy standard_cl/order1 mine.yaml
    """
    from accrete.pipeline.config.catalog import copy_recipe

    typer.echo(copy_recipe(recipe, dest))
