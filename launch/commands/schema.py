"""`accrete schema`: what a recipe may say, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.commands.options import new_file


def schema(
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write to this file, not the terminal.", callback=new_file),
    ] = None,
) -> None:
    """Print the JSON Schema of recipe files, for completion and checks in an editor.

    Example: accrete schema --out recipe.schema.json
    """
    import json

    from accrete.pipeline.config.schema import recipe_schema
    from accrete.pipeline.run_dir import write_text

    text = json.dumps(recipe_schema(), ensure_ascii=False, indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        typer.echo(out)
