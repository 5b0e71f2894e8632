"""`accrete score RUN`: score a finished stage again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.commands.options import new_file
from accrete.launch.completion import complete_run


def score(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder.", autocompletion=complete_run, show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[eval.b=v]...", help="Such as eval.mode=generate.", show_default=False
        ),
    ] = None,
    stage: Annotated[
        int | None, typer.Option(min=0, help="Stage from 0; default: the last finished one.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task to score (repeatable); default: all so far.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write one JSON line per row to this file.", callback=new_file),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the model of a finished stage again, in one process; the run folder is not changed.

    Example: accrete score runs/ewc --stage 2 eval.mode=generate
    """
    from accrete.launch.rescore import rescore

    number, scores = rescore(run_dir, stage, task or (), overrides or ())
    if out is not None:
        from dataclasses import asdict

        from accrete.pipeline.run_dir import write_text

        lines = [json.dumps(asdict(r), ensure_ascii=False) for s in scores for r in s.rows]
        write_text(out, "\n".join(lines) + "\n")
    if as_json:
        found = [
            {"task": s.task, "score": s.score, "rows": len(s.rows), "outside": s.outside}
            for s in scores
        ]
        typer.echo(json.dumps({"stage": number, "scores": found}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{run_dir} after stage {number}")  # as text: a name may look like markup
    table = Table("task", "score", "rows", "no label", title=title)
    for item in scores:
        outside = "" if item.outside is None else f"{item.outside:.1f} %"
        table.add_row(Text(item.task), f"{item.score:.1f}", str(len(item.rows)), outside)
    Console().print(table)
