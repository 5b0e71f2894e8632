"""A recipe as a tree that remembers, for every value, where it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written."""

    where: str
    """For messages: `recipes/x.yaml:14`, `override a.b=v`."""
    label: str
    """For listings: `recipes/x.yaml:14`, `override`, `default`."""


def in_file(file: str, line: int) -> Origin:
    """The origin of a value in line `line` (from 1) of `file`."""
    place = f"{file}:{line}"
    return Origin(place, place)


@dataclass(slots=True)
class Node:
    """A value with its origin; children of mappings and lists are nodes themselves."""

    value: Scalar | dict[str, Node] | list[Node]
    origin: Origin

    def copy(self) -> Node:
        """A deep copy."""
        if isinstance(self.value, dict):
            return Node({key: child.copy() for key, child in self.value.items()}, self.origin)
        if isinstance(self.value, list):
            return Node([child.copy() for child in self.value], self.origin)
        return Node(self.value, self.origin)

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def get(self, *path: str | int) -> Node | None:
        """The node at `path` below this one, or None."""
        node = self
        for key in path:
            if isinstance(node.value, dict) and isinstance(key, str) and key in node.value:
                node = node.value[key]
                continue
            if isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                continue
            return None
        return node

    @property
    def mapping(self) -> dict[str, Node]:
        """The children of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The children of a list; empty for anything else."""
        return self.value if isinstance(self.value, list) else []


def merge(lower: Node, upper: Node) -> Node:
    """`upper` over `lower`: mappings merge key by key, everything else replaces. Copies both."""
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return upper.copy()
    merged = {key: child.copy() for key, child in lower.value.items()}
    for key, child in upper.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child.copy()
    return Node(merged, upper.origin)


def dotted(path: Path) -> str:
    """A path as the user writes it: `tasks.2.max_steps`."""
    return ".".join(str(key) for key in path)
