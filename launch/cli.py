"""The `accrete` command. Nothing heavy is imported before a command has begun its work."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from accrete.launch.commands import launch, methods, recipes
from accrete.launch.commands.branch import branch
from accrete.launch.commands.compare import compare
from accrete.launch.commands.doctor import doctor
from accrete.launch.commands.export import export
from accrete.launch.commands.fetch import fetch
from accrete.launch.commands.plan import plan
from accrete.launch.commands.report import report
from accrete.launch.commands.resume import resume
from accrete.launch.commands.run import run
from accrete.launch.commands.schema import schema
from accrete.launch.commands.score import score
from accrete.pipeline.errors import AccreteError

_ROOM = "Free space, or give another folder (--run-dir, --out, ACCRETE_CACHE)."
_RIGHTS = "Ask for the right to it, or give another file or folder."
_REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    errno.ENAMETOOLONG: "Give a shorter one.",
}
"""What the machine refuses, and what to do: no fault of the program, so no traceback."""

app = typer.Typer(
    name="accrete",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"accrete {version('accrete')}")
        raise typer.Exit


@app.callback()
def accrete(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Continual instruction tuning of large language models.

    Start with `accrete run quickstart`.
    """


for command in (run, resume, branch, plan, score, compare, report, export, schema, doctor, fetch):
    app.command()(command)
app.add_typer(launch.app, name="launch")
app.add_typer(recipes.app, name="recipes")
app.add_typer(methods.app, name="methods")


def main() -> None:
    """Run the command line: errors meant for the user are one message and an exit status."""
    try:
        app()
    except AccreteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        advice = _REFUSALS.get(error.errno or 0)
        if advice is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror}. {advice}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
