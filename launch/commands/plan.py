"""`accrete plan RECIPE [a.b=v ...]`: what a run would do."""

from __future__ import annotations

from typing import Annotated

import typer

from accrete.launch.completion import complete_recipe


def plan(
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every value with its origin, and the stages, steps and tokens, without training.

    Checks and tokenises every row of every task, exactly as `accrete run` does first.

    Example: accrete plan quickstart adapter.rank=16
    """
    from accrete.launch.api import load_recipe
    from accrete.launch.plan import plan_json, plan_view
    from accrete.launch.prepare import prepare

    loaded = load_recipe(recipe, *(overrides or ()))
    prepared = prepare(loaded.config, lambda line: typer.echo(line, err=True))
    content = plan_json(loaded.config, loaded.resolved(), loaded.origins, prepared)
    if as_json:
        import json

        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
        return
    from rich.console import Console

    Console().print(plan_view(content))
