"""Listing, reading and copying the shipped recipes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from accrete.pipeline.config.compose import Layer, compose, flatten
from accrete.pipeline.config.library import named_file, recipe_names
from accrete.pipeline.config.load import find_recipe
from accrete.pipeline.config.problems import ProblemList
from accrete.pipeline.errors import InputError
from accrete.pipeline.run_dir import write_text


@dataclass(frozen=True, kw_only=True)
class RecipeCard:
    """What `accrete recipes ls` shows of one recipe."""

    name: str
    description: str
    tasks: int
    """Length of its sequence."""
    path: Path


def list_recipes() -> list[RecipeCard]:
    """The shipped recipes that can be run, without checking them."""
    return [_card(name) for name in recipe_names()]


def recipe_text(name: str) -> str:
    """The raw text of a shipped recipe, base or group file, or of a file.

    Raises:
        ConfigError: There is no such recipe.
    """
    return find_recipe(name)[0].read_text(encoding="utf-8")


def copy_recipe(name: str, dest: Path) -> Path:
    """Copy a shipped recipe to a file (or into a folder) and return the new file.

    The copy is a recipe of its own: the names in its `extends` still mean the shipped files.

    Raises:
        ConfigError: There is no such recipe.
        InputError: The file exists already, or its folder does not.
    """
    source, _ = find_recipe(name)
    dest = Path(os.path.expanduser(dest))
    if dest.is_dir():
        dest = dest / source.name
    if dest.suffix not in (".yaml", ".yml"):
        raise InputError(f"{dest}: a recipe's file ends in .yaml; or name an existing folder.")
    if dest.exists():
        raise InputError(f"{dest}: exists already; choose another name or delete it first.")
    if not dest.parent.is_dir():
        raise InputError(f"{dest}: there is no folder {dest.parent}; create it first.")
    write_text(dest, recipe_text(name))
    return dest


def _card(name: str) -> RecipeCard:
    path = named_file(name)
    assert path is not None
    layers: list[Layer] = compose(path, ProblemList())
    tree = flatten(layers)
    tasks, description = tree.get("tasks"), tree.get("description")
    return RecipeCard(
        name=name,
        description="" if description is None else str(description.value),
        tasks=0 if tasks is None else len(tasks.items),
        path=path,
    )
