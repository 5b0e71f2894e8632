"""`accrete export RUN --out DIR`: hand a finished stage over."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from accrete.launch.completion import complete_run


class Form(StrEnum):
    """What to write."""

    merged = "merged"
    adapter = "adapter"


class Precision(StrEnum):
    """Of a merged model."""

    fp32 = "fp32"
    bf16 = "bf16"


def export(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder.", autocompletion=complete_run, show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="New folder to write.", show_default=False)],
    stage: Annotated[
        int | None, typer.Option(min=0, help="Stage from 0; default: the last finished one.")
    ] = None,
    form: Annotated[
        Form, typer.Option(help="An ordinary model folder, or one peft adapter.")
    ] = Form.merged,
    dtype: Annotated[Precision, typer.Option(help="Of a merged model.")] = Precision.fp32,
) -> None:
    """Write the model of a finished stage as a Hugging Face folder or as one peft adapter.

    Example: accrete export runs/ewc --stage 3 --out models/after-agnews --dtype bf16
    """
    from accrete.launch.export import export_stage

    typer.echo(export_stage(run_dir, out, stage, form.value, dtype.value))
