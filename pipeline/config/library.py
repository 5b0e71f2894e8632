"""The recipes that ship with accrete: names, files, and how a file is called in messages."""

from __future__ import annotations

import importlib
import os
import re
from functools import lru_cache
from pathlib import Path

GROUPS = {"model": "models", "method": "methods"}
"""Recipe keys that a group file can fill, and the folder of the shipped group files."""

_SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_PARTS = {*GROUPS.values(), "clusters", "sources"}


@lru_cache(maxsize=1)
def recipes_folder() -> Path:
    """The installed folder `accrete/recipes` (data only, so a namespace package)."""
    package = importlib.import_module("accrete.recipes")
    return Path(next(iter(package.__path__))).resolve()


def looks_like_file(text: str) -> bool:
    """Whether a reference means a file (`x.yaml`, `./x`, `~/x`) and not a shipped name."""
    return text.endswith(_SUFFIXES) or text.startswith(("./", "../", "~", os.sep))


def named_file(name: str) -> Path | None:
    """The file of a shipped recipe, base or group (`standard_cl/order1`, `models/t5_large`)."""
    if _NAME.fullmatch(name) is None:
        return None
    path = recipes_folder() / f"{name}.yaml"
    return path if path.is_file() else None


def recipe_names() -> list[str]:
    """Names of the shipped recipes that can be run: not bases, groups, clusters or sources."""
    return [
        name
        for name in all_names()
        if name.split("/")[0] not in _PARTS and name.split("/")[-1] != "base"
    ]


def group_names(kind: str) -> list[str]:
    """Names of the shipped group files for the recipe key `kind`."""
    folder = f"{GROUPS[kind]}/"
    return [name.removeprefix(folder) for name in all_names() if name.startswith(folder)]


def all_names() -> list[str]:
    """Names of all shipped YAML files; files at the top come first."""
    folder = recipes_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: (name.count("/"), name))


def shown_path(path: Path) -> str:
    """A file's name in messages.

    Relative to the working directory if it lies below it, `accrete/recipes/...` for other shipped
    files, else the whole path.
    """
    path = path.resolve()
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    if path.is_relative_to(recipes_folder()):
        return f"accrete/recipes/{path.relative_to(recipes_folder()).as_posix()}"
    return str(path)
