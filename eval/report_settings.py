"""The resolved configuration as rows of a table: path, value and where the value came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value of the recipe."""

    path: str
    value: str
    origin: str
    is_default: bool


@dataclass(frozen=True, kw_only=True)
class SettingGroup:
    """The settings under one top-level key."""

    name: str
    settings: list[Setting]
    num_chosen: int
    """How many are not defaults."""


def group_settings(config: Mapping[str, Any], origins: Any) -> list[SettingGroup]:
    """The settings of a resolved recipe, one group for each top-level key with parts."""
    known = origins if isinstance(origins, Mapping) else {}
    groups: dict[str, list[Setting]] = {}
    for path, value in flatten(config):
        origin = _origin(path, known)
        setting = Setting(
            path=path, value=value, origin=origin, is_default=origin.startswith("default")
        )
        group = path.split(".", 1)[0] if "." in path else "recipe"
        groups.setdefault(group, []).append(setting)
    return [
        SettingGroup(name=name, settings=rows, num_chosen=sum(not row.is_default for row in rows))
        for name, rows in groups.items()
    ]


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Leaves of nested data as (dotted path, text); a list of plain values stays whole."""
    if not value and not path:
        return []
    if isinstance(value, Mapping) and value:
        parts = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        parts = [(f"{path}.{index}" if path else str(index), v) for index, v in enumerate(value)]
    else:
        return [(path, value if isinstance(value, str) else json.dumps(value, default=str))]
    return [leaf for key, item in parts for leaf in flatten(item, key)]


def _origin(path: str, origins: Mapping[str, Any]) -> str:
    """Origin of a path, or else of the nearest part of the recipe around it."""
    while path:
        if path in origins:
            return str(origins[path])
        path = path.rpartition(".")[0]
    return ""
