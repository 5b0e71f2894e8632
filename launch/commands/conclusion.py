"""The last lines of `accrete run` and `accrete resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from accrete.launch.api import RunResult


def print_result(result: RunResult) -> None:
    """The metrics and the path of the report."""
    width = max(len(name) for name in result.metrics)
    for name, value in result.metrics.items():
        shown = "n/a" if value is None else f"{value:.1f}"
        typer.echo(f"{name.replace('_', ' '):<{width}}  {shown:>6}")
    typer.echo(f"report: {result.report}")
