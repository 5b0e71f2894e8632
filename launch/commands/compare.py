"""`accrete compare RUN...`: many runs in one table."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.commands.options import new_file


class Format(StrEnum):
    """What `--format` takes."""

    TEXT = "text"
    MARKDOWN = "markdown"
    CSV = "csv"
    JSON = "json"


def compare(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="Run folders to compare.", show_default=False)
    ],
    format: Annotated[Format, typer.Option("--format", help="Form of the table.")] = Format.TEXT,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write to this file, not the terminal.", callback=new_file),
    ] = None,
) -> None:
    """Compare finished runs: mean and spread over seeds, paired tests between methods.

    Runs that were scored on other rows or tasks are shown, but not ranked.

    Example: accrete compare runs/ewc-* runs/seq-* --format markdown --out table.md
    """
    import shutil

    from accrete.eval.compare import compare_runs
    from accrete.eval.compare_output import FORMATS, to_text
    from accrete.pipeline.run_dir import write_text

    comparison = compare_runs(run_dirs)
    if format is Format.TEXT and out is None:
        text = to_text(comparison, width=shutil.get_terminal_size((120, 24)).columns)
    else:
        text = FORMATS[format.value](comparison)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        typer.echo(out)
