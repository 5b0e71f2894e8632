"""`a.b=v` from the command line, applied to a recipe's tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accrete.pipeline.config.library import GROUPS
from accrete.pipeline.config.problems import ProblemList, did_you_mean, nearest, show_value
from accrete.pipeline.config.read import read_value
from accrete.pipeline.config.tree import Node, Origin, merge


@dataclass(frozen=True)
class Override:
    """One parsed `a.b=v`."""

    path: tuple[str, ...]
    node: Node

    @property
    def is_group(self) -> bool:
        """Whether it swaps a whole group: `model=NAME` or `method=NAME`."""
        return len(self.path) == 1 and self.path[0] in GROUPS and isinstance(self.node.value, str)


def parse_overrides(texts: Sequence[str], problems: ProblemList) -> list[Override]:
    """Overrides in the order given; the value is everything after the first `=`, as YAML 1.2."""
    parsed = []
    for text in texts:
        origin = Origin(f"override {text}", "override")
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.add(
                origin.where,
                "",
                "an override is written `key=value` or `section.key=value`",
                "for example train.learning_rate=1e-4",
            )
            continue
        node = read_value(value, origin, problems)
        if node is not None:
            parsed.append(Override(path, node))
    return parsed


def expand_task_names(tree: Node) -> None:
    """Turn every plain name in `tasks` into `{name: ...}`, in place."""
    tasks = tree.get("tasks")
    for task in tasks.items if tasks is not None else []:
        if isinstance(task.value, str):
            task.value = {"name": Node(task.value, task.origin)}


def apply_override(tree: Node, override: Override, problems: ProblemList) -> None:
    """Set one value in `tree`, in place; sections that are not there yet are made."""
    where = override.node.origin.where
    node = tree
    for depth, key in enumerate(override.path):
        last = depth == len(override.path) - 1
        if isinstance(node.value, list):
            if last and key == str(len(node.value)):  # one more, such as a branch's new task
                node.value.append(override.node.copy())
                return
            index = _list_index(node, key, override, depth, problems)
            if index is None:
                return
            if last:
                node.value[index] = merge(node.value[index], override.node)
            node = node.value[index]
            continue
        if node.value is None:
            node.value = {}
        if not isinstance(node.value, dict):
            problems.add(
                where,
                ".".join(override.path),
                f"{'.'.join(override.path[:depth])} is {show_value(node.plain())}; "
                "there is nothing inside it",
            )
            return
        if last:
            old = node.value.get(key)
            node.value[key] = override.node.copy() if old is None else merge(old, override.node)
        else:
            node = node.value.setdefault(key, Node({}, override.node.origin))


def _list_index(
    node: Node, key: str, override: Override, depth: int, problems: ProblemList
) -> int | None:
    """Position in a list, by number or by the `name` of an entry."""
    names = [item.get("name") for item in node.items]
    known = [str(name.value) for name in names if name is not None]
    if key in known:
        return [None if name is None else str(name.value) for name in names].index(key)
    count = len(node.items)
    if key.isdecimal() and int(key) < count:
        return int(key)
    listed = ".".join(override.path[:depth])
    allowed = f"0 to {count - 1}" if count else "none: the list is empty"
    if known:
        allowed += f", or a name: {', '.join(known)}"
    problems.add(
        override.node.origin.where,
        ".".join(override.path),
        f"{listed} has no entry `{key}`; allowed: {allowed}",
        did_you_mean(nearest(key, known)),
    )
    return None
