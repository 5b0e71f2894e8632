"""What several commands' options have in common."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def new_file(path: Path | None) -> Path | None:
    """The file that `--out` names; refused before any work is done if it cannot be written.

    Raises:
        typer.BadParameter: It is a folder or a device, or its folder is missing or read-only.
    """
    if path is None:
        return None
    path = Path(os.path.expanduser(path))
    # It is written aside and renamed: that would put a plain file in the place of /dev/null.
    if path.exists() and not path.is_file():
        raise typer.BadParameter(f"{path} is there and is no file; name a file")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"nothing can be written in {path.parent}; name another folder")
    return path
