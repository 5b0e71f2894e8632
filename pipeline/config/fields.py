"""What the recipe's dataclasses allow, read from their annotations."""

from __future__ import annotations

import dataclasses
import keyword
import types
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_WORDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
_MANY = {str: "texts", int: "integers", float: "numbers"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


@dataclass(frozen=True)
class FieldInfo:
    """One key of a section."""

    field: str
    """Name of the dataclass field; Python keywords end in an underscore there (`lambda_`)."""
    annotation: Any
    required: bool


def yaml_name(field: str) -> str:
    """A field's name in recipes, overrides and listings: `lambda_` is spelt `lambda`."""
    bare = field.removesuffix("_")
    return bare if bare != field and keyword.iskeyword(bare) else field


@cache
def known_keys(cls: type) -> dict[str, FieldInfo]:
    """The keys of a section by their name in recipes."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        yaml_name(field.name): FieldInfo(
            field.name,
            hints[field.name],
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
        if field.init
    }


def section_class(annotation: Any) -> type | None:
    """The dataclass that an annotation asks for, if any: `X`, `Annotated[X, ...]`, `X | None`."""
    for option in options(annotation):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def item_annotation(annotation: Any) -> Any:
    """The annotation of a list's items, or None if it asks for no list."""
    for option in options(annotation):
        if get_origin(option) is list:
            return get_args(option)[0]
    return None


def value_annotation(annotation: Any) -> Any:
    """The annotation of a plain mapping's values, or None if it asks for no such mapping."""
    for option in options(annotation):
        if get_origin(option) is dict:
            return get_args(option)[1]
    return None


def options(annotation: Any) -> list[Any]:
    """The members of a union (one for anything else), without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in options(member)]
    return [annotation]


def choices(annotation: Any) -> list[str]:
    """All texts that a `Literal` allows, for suggestions."""
    return [
        value
        for option in options(annotation)
        if get_origin(option) is Literal
        for value in get_args(option)
        if isinstance(value, str)
    ]


def allowed(annotation: Any) -> str:
    """What may stand there, in words: `a number > 0, or null`."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [allowed(member) for member in get_args(annotation)]
        return ", or ".join(parts)
    if get_origin(annotation) is Annotated:
        base, *extra = get_args(annotation)
        return " ".join([allowed(base), *_bounds(extra)])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join("null" if v is None else str(v) for v in get_args(annotation))
    if get_origin(annotation) is list:
        return f"a list of {_plural(get_args(annotation)[0])}"
    if get_origin(annotation) is tuple:
        members = get_args(annotation)
        if len(members) == 2 and members[1] is ...:
            return f"a list of {_plural(members[0])}"
        return f"a list of {len(members)} {_plural(members[0])}"
    if get_origin(annotation) is dict:
        return f"a mapping of names to {_plural(get_args(annotation)[1])}"
    if annotation is None or annotation is type(None):
        return "null"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f"a mapping with the keys {', '.join(known_keys(annotation))}"
    return _WORDS.get(annotation, str(annotation))


def _bounds(extra: list[Any]) -> list[str]:
    found = []
    for item in extra:
        for rule in getattr(item, "metadata", [item]):
            for name, sign in _BOUNDS:
                if getattr(rule, name, None) is not None:
                    found.append(f"{sign} {getattr(rule, name)}")
            if getattr(rule, "min_length", None):
                found.append(f"(at least {rule.min_length})")
    return [" and ".join(found)] if found else []


def _plural(annotation: Any) -> str:
    if annotation in _MANY:
        return _MANY[annotation]
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f"mappings with the keys {', '.join(known_keys(annotation))}"
    return f"({allowed(annotation)})"
