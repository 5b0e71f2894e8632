"""From a recipe's tree to a `RunConfig`; every mistake is noted with its place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from accrete.pipeline.config.fields import (
    allowed,
    choices,
    item_annotation,
    known_keys,
    section_class,
    value_annotation,
)
from accrete.pipeline.config.problems import ProblemList, did_you_mean, nearest, show_value
from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.config.tree import Node, Origin, Path, dotted
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods.base import MethodConfig
from accrete.pipeline.methods.registry import method_class

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
"""Nothing is converted but an integer where a number is asked for."""


def build(tree: Node, problems: ProblemList) -> RunConfig | None:
    """The typed recipe, or None if `problems` has grown."""
    before = len(problems)
    method = _build_method(tree, problems)
    # The method's settings have a class of their own, which only its kind tells.
    rest = {key: node for key, node in tree.mapping.items() if key != "method"}
    origin = tree.mapping["method"].origin if "method" in tree.mapping else tree.origin
    rest["method"] = Node({"kind": Node("", origin)}, origin)
    run = _validate(RunConfig, Node(rest, tree.origin), (), problems)
    if run is None or method is None or len(problems) > before:
        return None
    return dataclasses.replace(run, method=method)


def build_as(cls: type[T], tree: Node, problems: ProblemList, title: str = "") -> T | None:
    """Another kind of file than a recipe, typed; None if a mistake was noted.

    Args:
        cls: The dataclass that the file describes.
        tree: Its content.
        problems: Gets every mistake with its place.
        title: What its keys are, for messages.
    """
    before = len(problems)
    value = _validate(cls, tree, (), problems, title)
    return None if len(problems) > before else value


def _build_method(tree: Node, problems: ProblemList) -> MethodConfig | None:
    node = tree.get("method")
    if node is None:
        if not problems.covers("method"):
            problems.add(
                tree.origin.where, "method", "missing", "add `method: NAME`; see accrete methods ls"
            )
        return None
    kind = node.get("kind")
    if kind is None or not isinstance(kind.value, str):
        where = node.origin if kind is None else kind.origin
        given = "missing" if kind is None else f"given: {show_value(kind.plain())}"
        problems.add(
            where.where, "method.kind", f"{given}; allowed: the name of a method",
            "choose one with `method: NAME`; see accrete methods ls",
        )  # fmt: skip
        return None
    try:
        config = method_class(kind.value).Config
    except ConfigError as error:
        problems.add(kind.origin.where, "method.kind", str(error))
        return None
    return _validate(config, node, ("method",), problems, f"settings of `{kind.value}`")


def _validate(
    cls: type[T], node: Node, path: Path, problems: ProblemList, title: str = ""
) -> T | None:
    plain = _to_fields(node, cls, path, problems, title)
    try:
        return cast(T, _adapter(cast(Hashable, cls)).validate_json(json.dumps([plain]))[0])
    except ValidationError as error:
        noted = ProblemList()
        for item in error.errors(include_url=False):
            _note(cast(dict[str, Any], item), node, cls, path, noted)
        for problem in noted:
            # A union says of a list both that it is no text and which item is wrong.
            if not noted.covers_inside(problem.path) and not (
                problem.message.startswith("missing") and problems.covers(problem.path)
            ):
                problems.add(problem.where, problem.path, problem.message, problem.hint)
        return None


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    # pydantic passes a configuration on to plain dataclasses, but not to one that stands alone.
    return TypeAdapter(tuple[cls], config=STRICT)


def _to_fields(
    node: Node, annotation: Any, path: Path, problems: ProblemList, title: str = ""
) -> Any:
    """Plain values under the dataclasses' field names, without unknown keys (noted)."""
    cls = section_class(annotation)
    if cls is not None and isinstance(node.value, dict):
        known = known_keys(cls)
        plain = {}
        for key, child in node.value.items():
            if key in known:
                info = known[key]
                plain[info.field] = _to_fields(child, info.annotation, (*path, key), problems)
            else:
                _note_unknown(key, child.origin, cls, path, problems, title)
        return plain
    item = item_annotation(annotation)
    if item is not None and isinstance(node.value, list):
        return [_to_fields(c, item, (*path, i), problems) for i, c in enumerate(node.value)]
    value = value_annotation(annotation)
    if value is not None and isinstance(node.value, dict):
        return {k: _to_fields(c, value, (*path, k), problems) for k, c in node.value.items()}
    return node.plain()


def _note_unknown(
    key: str, origin: Origin, cls: type, path: Path, problems: ProblemList, title: str
) -> None:
    known = list(known_keys(cls))
    near = nearest(key, known)
    if not near:
        near = _elsewhere(key)
    listed = ", ".join(known) if known else "none"
    kind = f"known {title or 'keys'}: {listed}"
    hint = did_you_mean(near)
    if not hint and path == ("method",):
        hint = "`method=NAME` swaps the method together with its settings"
    problems.add(origin.where, dotted((*path, key)), f"unknown key; {kind}", hint)


def _elsewhere(key: str) -> list[str]:
    """Sections of the recipe in which `key` would be right."""
    return [
        f"{section}.{key}"
        for section, info in known_keys(RunConfig).items()
        for cls in [section_class(info.annotation)]
        if cls is not None and key in known_keys(cls)
    ]


def _note(item: dict[str, Any], node: Node, cls: Any, path: Path, problems: ProblemList) -> None:
    """One pydantic error, told in the recipe's own terms."""
    annotation: Any = cls
    for element in item["loc"][1:]:
        section = section_class(annotation)
        infos = [] if section is None else list(known_keys(section).items())
        found = next(((name, info) for name, info in infos if info.field == element), None)
        child: Node | None
        if found is not None:
            name, info = found
            child, annotation = node.get(name), info.annotation
            path = (*path, name)
        elif isinstance(node.value, list) and isinstance(element, int):
            child = node.get(element)
            annotation = item_annotation(annotation) or annotation
            path = (*path, element)
        elif isinstance(node.value, dict) and value_annotation(annotation) is not None:
            child = node.get(str(element))
            annotation = value_annotation(annotation) if child is not None else annotation
            path = (*path, element) if child is not None else path
            child = child or node
        else:  # pydantic's label of a union's member
            continue
        if child is None:
            message = f"missing; allowed: {allowed(annotation)}"
            problems.add(node.origin.where, dotted(path), message)
            return
        node = child
    if item["type"] in ("value_error", "assertion_error"):
        problems.add(node.origin.where, dotted(path), str(item["ctx"]["error"]))
        return
    given = node.plain()
    near = nearest(given, choices(annotation)) if isinstance(given, str) else []
    problems.add(
        node.origin.where,
        dotted(path),
        f"given: {show_value(given)}; allowed: {allowed(annotation)}",
        did_you_mean(near),
    )
