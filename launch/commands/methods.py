"""`accrete methods ls | show`: the methods that a recipe can choose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from accrete.launch.completion import complete_method

if TYPE_CHECKING:
    from accrete.pipeline.config.method_card import MethodCard

app = typer.Typer(help="List and show continual-learning methods.", no_args_is_help=True)


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


@app.command("show")
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="Name (`accrete methods ls`), or a file of your own: file.py or file.py:Class.",
            autocompletion=complete_method,
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show a method's card: where it comes from, what it keeps, costs and guarantees, its settings.

    Example: accrete methods show ewc_lora
    """
    from accrete.pipeline.config.method_card import method_card

    card = method_card(name)
    if as_json:
        import json

        typer.echo(json.dumps(card.to_json(), ensure_ascii=False, indent=2))
        return
    _print_card(card)


def _print_card(card: MethodCard) -> None:
    import textwrap

    from accrete.pipeline.config.library import shown_path

    typer.echo(f"{card.kind}: {card.summary or 'no summary'}")
    lines = {
        "source": card.source or "not given",
        "code": card.code,
        "recipe": "none" if card.recipe is None else shown_path(card.recipe),
        "flags": ", ".join(f"{key} {_word(value)}" for key, value in card.flags.items()),
    }
    for key, text in lines.items():
        typer.echo(f"  {key:12}{text}")
    for key in ("kept", "cost", "guarantee", "deviations"):
        text = getattr(card, key) or "not given"
        wrapped = textwrap.wrap(text, 84, break_on_hyphens=False)
        typer.echo(f"  {key:12}" + f"\n{'':14}".join(wrapped))
    if not card.settings:
        typer.echo("It has no settings.")
        return
    for setting in card.settings:
        default = "required" if setting.required else f"default {_word(setting.default)}"
        typer.echo(f"\nmethod.{setting.name}: {setting.type}; {default}")
        for line in textwrap.wrap(setting.description, 90):
            typer.echo(f"    {line}")


def _word(value: Any) -> str:
    """A value as a recipe spells it."""
    import json

    return value if isinstance(value, str) else json.dumps(value)
