"""YAML 1.2 text as a tree of located values."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from accrete.pipeline.config.problems import ProblemList
from accrete.pipeline.config.tree import Node, Origin, Scalar, in_file

_TAG = "tag:yaml.org,2002:"
_SHELL = "quote it for the shell: 'tasks=[a, b]'; and inside for YAML: \"files.train='*.gz'\""
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}


def read_file(path: Path, shown: str, problems: ProblemList) -> Node | None:
    """The content of a YAML file, or None if it cannot be read (the reason is in `problems`).

    Args:
        path: The file.
        shown: Its name in messages and origins.
        problems: Collects every mistake, each with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.add(shown, "", f"cannot be read: {reason}")
        return None
    return _Reader(lambda line: in_file(shown, line), problems).read(text)


def read_value(text: str, origin: Origin, problems: ProblemList) -> Node | None:
    """The value of an override, parsed as YAML 1.2."""
    return _Reader(lambda line: origin, problems, _SHELL).read(text)


class _Reader:
    """Builds nodes from ruamel's syntax tree, because that keeps the line of every scalar."""

    def __init__(
        self, place: Callable[[int], Origin], problems: ProblemList, hint: str = ""
    ) -> None:
        self.place = place
        self.problems = problems
        self.hint = hint
        self.yaml = YAML(typ="safe", pure=True)
        self.active: set[int] = set()

    def read(self, text: str) -> Node | None:
        try:
            root = self.yaml.compose(io.StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = self.place(mark.line + 1 if mark is not None else 1).where
            said = error.problem or error.context
            self.problems.add(where, "", f"not valid YAML: {said}", self.hint)
            return None
        except YAMLError as error:
            self.problems.add(self.place(1).where, "", f"not valid YAML: {error}")
            return None
        if root is None:
            return Node(None, self.place(1))
        return self.node(root, "", self.place(root.start_mark.line + 1))

    def node(self, raw: Any, path: str, origin: Origin) -> Node:
        """One value; `path` is for messages, `origin` where its key (or the item) stands."""
        if isinstance(raw, ScalarNode):
            return Node(self.scalar(raw, path, origin), origin)
        if id(raw) in self.active:
            self.problems.add(origin.where, path, "an alias (*name) inside its own anchor")
            return Node(None, origin)
        self.active.add(id(raw))
        try:
            if isinstance(raw, SequenceNode):
                return Node(
                    [
                        self.node(item, _join(path, i), self.place(item.start_mark.line + 1))
                        for i, item in enumerate(raw.value)
                    ],
                    origin,
                )
            return self.mapping(raw, path, origin)
        finally:
            self.active.discard(id(raw))

    def mapping(self, raw: MappingNode, path: str, origin: Origin) -> Node:
        children: dict[str, Node] = {}
        for key, value in raw.value:
            place = self.place(key.start_mark.line + 1)
            if not isinstance(key, ScalarNode):
                self.problems.add(place.where, path, "a key must be a name, not a list or mapping")
                continue
            name = key.value
            if str(key.tag) == f"{_TAG}merge":
                self.problems.add(
                    place.where, path, "`<<` is not part of YAML 1.2", "use `extends:` instead"
                )
                continue
            if name in children:
                first = children[name].origin.where
                self.problems.add(
                    place.where, _join(path, name), f"the same key again (first: {first})"
                )
                continue
            children[name] = self.node(value, _join(path, name), place)
        return Node(children, origin)

    def scalar(self, raw: ScalarNode, path: str, origin: Origin) -> Scalar:
        tag = str(raw.tag)
        if tag == f"{_TAG}timestamp":
            return str(raw.value)
        if tag not in _SCALARS:
            self.problems.add(origin.where, path, f"the YAML tag {tag} is not allowed here")
            return None
        try:
            value = self.yaml.constructor.construct_object(raw)
        except (YAMLError, ValueError):
            self.problems.add(
                origin.where, path, f"{raw.value!r} is not a valid {tag[len(_TAG) :]}"
            )
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.add(origin.where, path, f"{raw.value} is not a finite number")
            return None
        return cast(Scalar, value)


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)
