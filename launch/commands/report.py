"""`accrete report RUN`: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Run folder, finished or under way.", show_default=False)
    ],
) -> None:
    """Write RUN_DIR/report.html (one offline file) and print its path.

    Example: accrete report runs/quickstart
    """
    from accrete.eval.report import write_report

    typer.echo(write_report(run_dir))
