"""A recipe with everything it `extends` and the groups it chooses, merged into one tree.

Precedence, from low to high: defaults, the files of `extends` in their order, the file itself,
groups chosen by overrides, other overrides. A group that a file chooses stands just below that
file's own values. Choosing a group discards what was known about its key before, together with
all that an earlier group for the same key brought along.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from accrete.pipeline.config.library import (
    GROUPS,
    all_names,
    group_names,
    looks_like_file,
    named_file,
    shown_path,
)
from accrete.pipeline.config.problems import ProblemList, did_you_mean, nearest, show_value
from accrete.pipeline.config.read import read_file
from accrete.pipeline.config.tree import Node, Origin, merge
from accrete.pipeline.methods.registry import is_method_file, method_kinds

_OWN = ("name", "description")
"""Keys that say what a file is; whoever extends it is something else."""


@dataclass(frozen=True)
class Layer:
    """One file's (or group's) own values."""

    tree: Node
    group: str | None = None
    """The key that this layer was chosen for, if it is a group."""


def compose(file: Path, problems: ProblemList) -> list[Layer]:
    """The layers of a recipe file, lowest first."""
    return _Composer(problems).file(file, ())


def choose_group(
    layers: list[Layer], key: str, choice: Node, folder: Path, problems: ProblemList
) -> list[Layer]:
    """`layers` with the group `choice` on top and every trace of an earlier choice removed.

    Args:
        layers: What is known so far, lowest first.
        key: `model` or `method`.
        choice: The name or file, with its origin.
        folder: Where a relative file starts.
        problems: Collects mistakes.
    """
    return _Composer(problems).choose(layers, key, choice, folder, ())


def flatten(layers: list[Layer]) -> Node:
    """One tree, later layers over earlier ones."""
    tree = Node({}, Origin("defaults", "default"))
    for layer in layers:
        tree = merge(tree, layer.tree)
    return tree


class _Composer:
    def __init__(self, problems: ProblemList) -> None:
        self.problems = problems

    def file(self, file: Path, chain: tuple[Path, ...]) -> list[Layer]:
        file = file.resolve()
        tree = read_file(file, shown_path(file), self.problems)
        if tree is None:
            return []
        if not isinstance(tree.value, dict):
            given = "it is empty" if tree.value is None else show_value(tree.plain())
            self.problems.add(
                tree.origin.where, "", f"a recipe is a mapping of keys to values; {given}"
            )
            return []
        own = dict(tree.value)
        layers: list[Layer] = []
        extends = own.pop("extends", None)
        if extends is not None:
            layers = self.parents(extends, file, (*chain, file))
        for key in GROUPS:
            choice = own.get(key)
            if choice is not None and isinstance(choice.value, str):
                layers = self.choose(layers, key, choice, file.parent, (*chain, file))
                del own[key]
        return [*layers, Layer(Node(own, tree.origin))]

    def parents(self, extends: Node, file: Path, chain: tuple[Path, ...]) -> list[Layer]:
        entries = extends.items if isinstance(extends.value, list) else [extends]
        layers: list[Layer] = []
        for entry in entries:
            where = entry.origin.where
            if not isinstance(entry.value, str):
                self.problems.add(
                    where,
                    "extends",
                    f"given: {show_value(entry.plain())}; allowed: a recipe name, a file, "
                    "or a list of them",
                )
                continue
            parent = self.find(entry.value, file.parent, where)
            if parent is None:
                continue
            if parent.resolve() in chain:
                loop = [shown_path(step) for step in (*chain, parent.resolve())]
                self.problems.add(where, "extends", f"a circle: {' -> '.join(loop)}")
                continue
            for layer in self.file(parent, chain):
                kept = {k: v for k, v in layer.tree.mapping.items() if k not in _OWN}
                layers.append(Layer(Node(kept, layer.tree.origin), layer.group))
        # A parent's group supersedes the same group of the parents before it.
        return _drop_superseded(layers)

    def find(self, reference: str, folder: Path, where: str) -> Path | None:
        """The file behind an entry of `extends`."""
        if looks_like_file(reference):
            path = folder / os.path.expanduser(reference)
            if path.is_file():
                return path
            self.problems.add(where, "extends", f"no such file: {path}")
            return None
        path_or_none = named_file(reference)
        if path_or_none is None:
            self.problems.add(
                where,
                "extends",
                f"there is no shipped recipe `{reference}`",
                did_you_mean(nearest(reference, all_names()))
                or "a file is written with its ending or a leading ./",
            )
        return path_or_none

    def choose(
        self,
        layers: list[Layer],
        key: str,
        choice: Node,
        folder: Path,
        chain: tuple[Path, ...],
    ) -> list[Layer]:
        below = [_without(layer, key) for layer in layers if layer.group != key]
        name = str(choice.value)
        path = self.group_file(key, name, folder, choice.origin)
        if path is None:
            if key == "method" and (is_method_file(name) or name in method_kinds()):
                kind = Node({"kind": Node(name, choice.origin)}, choice.origin)
                return [*below, Layer(Node({key: kind}, choice.origin), key)]
            return below
        if path.resolve() in chain:
            self.problems.add(choice.origin.where, key, f"a circle: {shown_path(path)}")
            return below
        tree = flatten(self.file(path, chain))
        section = tree.get(key)
        if section is None or not isinstance(section.value, dict):
            if not self.problems.covers(key):
                self.problems.add(
                    shown_path(path), key, f"a {key} group must hold the mapping `{key}:`"
                )
            return below
        kept = {k: v for k, v in tree.mapping.items() if k not in _OWN}
        return [*below, Layer(Node(kept, tree.origin), key)]

    def group_file(self, key: str, name: str, folder: Path, origin: Origin) -> Path | None:
        """The group's file; None (with the reason noted) unless `name` is a method's kind."""
        if looks_like_file(name) and not is_method_file(name):
            path = folder / os.path.expanduser(name)
            if path.is_file():
                return path
            self.problems.add(origin.where, key, f"no such file: {path}")
            return None
        shipped = named_file(f"{GROUPS[key]}/{name}")
        if shipped is not None:
            return shipped
        known = group_names(key)
        if key == "method":
            if is_method_file(name) or name in method_kinds():
                return None
            known += [kind for kind in method_kinds() if kind not in known]
            other = "a file of your own: path/to/method.py"
        else:
            other = "another Hugging Face model: `model: {path: ...}`"
        self.problems.add(
            origin.where,
            key,
            f"given: {show_value(name)}; allowed: {', '.join(known)}, or a .yaml file",
            did_you_mean(nearest(name, known)) or other,
        )
        return None


def _without(layer: Layer, key: str) -> Layer:
    kept = {k: v for k, v in layer.tree.mapping.items() if k != key}
    return Layer(Node(kept, layer.tree.origin), layer.group)


def _drop_superseded(layers: list[Layer]) -> list[Layer]:
    for key in GROUPS:
        chosen = [index for index, layer in enumerate(layers) if layer.group == key]
        if chosen:
            last = chosen[-1]
            below = [_without(layer, key) for layer in layers[:last] if layer.group != key]
            layers = [*below, *layers[last:]]
    return layers
