"""Recipes: YAML, `extends` and overrides in, one typed and checked configuration out."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accrete.pipeline.config.checks import check_together
from accrete.pipeline.config.compose import choose_group, compose, flatten
from accrete.pipeline.config.fields import yaml_name
from accrete.pipeline.config.hub_tasks import take_hub_tasks
from accrete.pipeline.config.library import (
    looks_like_file,
    named_file,
    recipe_names,
    recipes_folder,
)
from accrete.pipeline.config.overrides import apply_override, expand_task_names, parse_overrides
from accrete.pipeline.config.paths import expand_paths
from accrete.pipeline.config.problems import ProblemList, did_you_mean, nearest
from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.config.tree import Node, Origin, dotted
from accrete.pipeline.config.tree import Path as TreePath
from accrete.pipeline.config.typed import build
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.run_dir import write_text


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, ready to run."""

    config: RunConfig
    """All values, typed and checked."""
    origins: dict[str, str]
    """Dotted path of every value -> `file:line`, `override` or `default`."""
    file: Path
    """The recipe's own file."""
    overrides: tuple[str, ...] = field(default=())
    """As given."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.config.name

    def resolved(self) -> dict[str, Any]:
        """Every value as plain JSON-able data under the names that recipes use."""
        return {
            yaml_name(item.name): to_plain(getattr(self.config, item.name))
            for item in dataclasses.fields(self.config)
        }

    def to_yaml(self, *, origins: bool = True, brief: bool = False) -> str:
        """The resolved recipe as YAML that loads to the same configuration.

        Args:
            origins: Add the origin of every value as a comment.
            brief: Leave out what tasks do not say themselves (the defaults of `TaskConfig`).
        """
        return _render(self, origins, brief)

    def dump_yaml(self, path: Path) -> None:
        """Write `to_yaml()` to a file, atomically."""
        write_text(path, self.to_yaml())


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe by its name (`standard_cl/order1`) or file, and apply `a.b=v` overrides.

    Relative paths inside recipes and overrides start at the working directory; those in
    `extends:` and group files (`model: x.yaml`) at the file that names them.

    Raises:
        ConfigError: There is no such recipe.
        RecipeError: The recipe or an override is wrong; all mistakes are listed.
    """
    file, name = find_recipe(recipe)
    problems = ProblemList()
    layers = compose(file, problems)
    parsed = parse_overrides(overrides, problems)
    for override in parsed:
        if override.is_group:
            layers = choose_group(layers, override.path[0], override.node, Path.cwd(), problems)
    tree = flatten(layers)
    if not layers:  # the file could not be read
        problems.raise_if_any(name)
    tree.value.setdefault("name", Node(name, Origin(tree.origin.where, "default")))  # type: ignore[union-attr]
    expand_task_names(tree)
    for override in parsed:
        if not override.is_group:
            apply_override(tree, override, problems)
            expand_task_names(tree)  # the next one may speak of a task that this one names
    take_hub_tasks(tree, problems)
    check_together(tree, problems)
    config = build(tree, problems)
    problems.raise_if_any(name)
    assert config is not None
    config = expand_paths(config)
    return LoadedRecipe(config, _origins(config, tree), file, tuple(overrides))


def find_recipe(recipe: str | Path) -> tuple[Path, str]:
    """The file and the default name of a recipe given by name or file.

    Raises:
        ConfigError: Neither a shipped recipe nor a file.
    """
    text = str(recipe)
    path = Path(os.path.expanduser(text))
    if not isinstance(recipe, Path) and not looks_like_file(text):
        shipped = named_file(text)
        if shipped is not None:
            return shipped, text
    if path.is_file():
        inside = path.resolve()
        if inside.is_relative_to(recipes_folder()):
            return inside, inside.relative_to(recipes_folder()).with_suffix("").as_posix()
        return path, path.stem
    known = recipe_names()
    word = text.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    near = [word] if word in known else nearest(word, known, count=3)
    listed = f"known recipes: {', '.join(known)}" if known else "no recipes are installed"
    what = f"no such file: {path}" if looks_like_file(text) else f"there is no recipe `{text}`"
    guess = f"\n    -> {did_you_mean(near)}" if near else ""
    raise ConfigError(f"{what}; {listed}; or the path of a .yaml file{guess}")


def to_plain(value: Any) -> Any:
    """Dataclasses as mappings under the names that recipes use; tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {
            yaml_name(item.name): to_plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _leaves(value: Any, path: TreePath = ()) -> Iterator[TreePath]:
    """Paths of single values; a list of plain values counts as one."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path


def _origins(config: RunConfig, tree: Node) -> dict[str, str]:
    origins = {}
    for path in _leaves(to_plain(config)):
        node = tree.get(*path)
        origins[dotted(path)] = "default" if node is None else node.origin.label
    return origins


def _render(recipe: LoadedRecipe, origins: bool, brief: bool) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    def convert(value: Any, path: TreePath) -> Any:
        if isinstance(value, dict) and value:
            mapping = CommentedMap()
            for key, item in value.items():
                below = (*path, key)
                origin = recipe.origins.get(dotted(below))
                if brief and path[:1] == ("tasks",) and _all_default(recipe, below):
                    continue
                mapping[key] = convert(item, below)
                if origins and origin is not None:
                    mapping.yaml_add_eol_comment(origin, key, column=48)
            return mapping
        if isinstance(value, list):
            sequence = CommentedSeq(convert(item, (*path, i)) for i, item in enumerate(value))
            if dotted(path) in recipe.origins:
                sequence.fa.set_flow_style()
            return sequence
        return value

    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    yaml.representer.add_representer(str, _represent_text)
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(convert(recipe.resolved(), ()), text)
    return text.getvalue()


def _represent_text(dumper: Any, text: str) -> Any:
    # ruamel writes these two plain, and reads them as a space and as a key.
    style = '"' if "\x85" in text or text.startswith("?") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _all_default(recipe: LoadedRecipe, path: TreePath) -> bool:
    prefix = dotted(path)
    return all(
        origin == "default"
        for key, origin in recipe.origins.items()
        if key == prefix or key.startswith(f"{prefix}.")
    )
