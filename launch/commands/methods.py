"""`accrete methods ls`: the methods that a recipe can choose."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List continual-learning methods.", no_args_is_help=True)


@app.callback()
def methods() -> None:
    """List continual-learning methods."""


@app.command("ls")
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the known methods: accrete's own and those of installed packages.

    Example: accrete methods ls
    """
    from accrete.pipeline.methods.registry import method_class, method_kinds

    cards = []
    for kind in method_kinds():
        method = method_class(kind)
        cards.append({"kind": kind, "summary": method.summary, "source": method.source})
    if as_json:
        import json

        typer.echo(json.dumps(cards, ensure_ascii=False, indent=2))
        return
    from accrete.launch.commands.tables import print_table

    print_table(
        ("method", "what it does", "source"),
        [(card["kind"], card["summary"], card["source"]) for card in cards],
    )
