"""What there is to know about a method before it is run, read from its class and its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from accrete.pipeline.config.fields import allowed, known_keys
from accrete.pipeline.config.library import GROUPS, named_file
from accrete.pipeline.config.schema import describe_inherited
from accrete.pipeline.config.typed import STRICT
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.registry import METHODS, is_method_file, method_class

FLAGS = ("trains", "fresh_adapter", "restarts", "peeks")
"""Class variables of `Method` that change what the loop does."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a method, as recipes spell it."""

    name: str
    type: str
    """What it may be, in words."""
    required: bool
    default: Any
    """As JSON; None if it is required."""
    description: str


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """What `accrete methods show` prints."""

    kind: str
    summary: str
    source: str
    code: str
    """`module:Class`, or `file.py:Class`."""
    recipe: Path | None
    """The shipped group file that `method=NAME` takes."""
    flags: dict[str, str | bool]
    kept: str
    """What it carries from task to task; this and the next three are the class's own words."""
    cost: str
    guarantee: str
    deviations: str
    settings: list[Setting]

    def to_json(self) -> dict[str, Any]:
        """The card as plain values."""
        card = dataclasses.asdict(self)
        card["recipe"] = None if self.recipe is None else str(self.recipe)
        return card


def method_card(kind: str) -> MethodCard:
    """The card of a method: a known name, or a file of one's own.

    Raises:
        ConfigError: There is no such method, or what was found is not one.
    """
    method = method_class(kind)
    own_file = is_method_file(kind)
    path = kind.partition(".py:")[0].removesuffix(".py") + ".py"
    return MethodCard(
        kind=str(method.Config.__dataclass_fields__["kind"].default),
        summary=method.summary,
        source=method.source,
        code=f"{path if own_file else method.__module__}:{method.__name__}",
        recipe=named_file(f"{GROUPS['method']}/{kind}") if kind in METHODS else None,
        flags={name: getattr(method, name) for name in FLAGS},
        kept=method.kept,
        cost=method.cost,
        guarantee=method.guarantee,
        deviations=method.deviations,
        settings=_settings(method),
    )


def _settings(method: type[Method]) -> list[Setting]:
    """Every key but `kind`, with the docstring below its field."""
    schema = TypeAdapter(tuple[method.Config], config=STRICT).json_schema()  # type: ignore[name-defined]
    name = schema["prefixItems"][0]["$ref"].rpartition("/")[2]
    described = schema["$defs"][name]["properties"]
    describe_inherited(method.Config, described)
    fields = {field.name: field for field in dataclasses.fields(method.Config)}
    found = []
    for key, info in known_keys(cast(Hashable, method.Config)).items():
        if key == "kind":
            continue
        found.append(
            Setting(
                name=key,
                type=allowed(info.annotation),
                required=info.required,
                default=None if info.required else _default(fields[info.field]),
                description=" ".join(described[info.field].get("description", "").split()),
            )
        )
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default as JSON."""
    if field.default_factory is not dataclasses.MISSING:
        return to_jsonable_python(field.default_factory())
    return to_jsonable_python(field.default)
