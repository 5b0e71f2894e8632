"""JSON Schema of a recipe file, for completion and checks in editors."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import TypeAdapter

from accrete.pipeline.config.fields import yaml_name
from accrete.pipeline.config.library import group_names
from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.config.typed import STRICT
from accrete.pipeline.methods.registry import method_class, method_kinds

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_YAML = r"\.ya?ml$"
_PYTHON = r"\.py(:\w+)?$"


def recipe_schema() -> Schema:
    """The schema of a recipe or group file, with the settings of all known methods.

    Nothing is required at the top, because a file may extend another one. Conflicts between values
    and the existence of names are left to `accrete plan`.
    """
    defs: dict[str, Schema] = {}
    root = _section(RunConfig, defs)
    del defs["MethodConfig"]
    properties = root["properties"]
    properties["extends"] = {
        "description": "Recipes that this one starts from: names, or files relative to this one; "
        "later ones win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    properties["model"] = _group("model", {"$ref": "#/$defs/ModelConfig"}, [], _YAML)
    properties["method"] = _group("method", _method(defs), method_kinds(), f"{_YAML}|{_PYTHON}")
    properties["hub"] = {
        "description": "Task name -> its fields where `data.format` is hub; its own fields win.",
        "type": "object",
        "additionalProperties": {"$ref": "#/$defs/HubTask"},
    }
    task = properties["tasks"]["items"]
    properties["tasks"]["items"] = {
        "anyOf": [{"type": "string", "description": "Short for {name: ...}."}, task]
    }
    for name, schema in defs.items():
        if name != "TaskConfig":
            schema.pop("required", None)
    named = defs["TaskConfig"]
    fields = {key: value for key, value in named["properties"].items() if key != "name"}
    lean = {key: value for key, value in named.items() if key != "required"}
    defs["HubTask"] = {**lean, "description": "Fields of a task.", "properties": fields}
    return {
        "$schema": DIALECT,
        "title": "accrete recipe",
        "description": root.get("description", ""),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": dict(sorted(defs.items())),
    }


def _section(cls: type, defs: dict[str, Schema]) -> Schema:
    """The schema of one dataclass; the sections inside it join `defs`."""
    schema: Schema = TypeAdapter(tuple[cls], config=STRICT).json_schema()  # type: ignore[valid-type]
    found: dict[str, Schema] = schema["$defs"]
    own = found.pop(schema["prefixItems"][0]["$ref"].rpartition("/")[2])
    describe_inherited(cls, own.get("properties", {}))
    for name, inner in found.items():
        defs[name] = _renamed(inner)
    return _renamed(own)


def describe_inherited(cls: type, properties: Schema) -> None:
    """Give the fields that a dataclass has from its bases their descriptions from there.

    Pydantic reads the docstrings below fields from a class's own source alone.
    """
    for base in cls.__mro__[1:]:
        lacking = [key for key, inner in properties.items() if "description" not in inner]
        if not lacking or not dataclasses.is_dataclass(base):
            return
        schema = TypeAdapter(tuple[base], config=STRICT).json_schema()  # type: ignore[valid-type]
        name = schema["prefixItems"][0]["$ref"].rpartition("/")[2]
        described = schema["$defs"][name].get("properties", {})
        for key in lacking:
            if "description" in described.get(key, {}):
                properties[key]["description"] = described[key]["description"]


def _renamed(schema: Schema) -> Schema:
    """Property names as recipes spell them; titles that only repeat the name are dropped."""
    properties = {}
    for field, inner in schema.get("properties", {}).items():
        properties[yaml_name(field)] = {k: v for k, v in inner.items() if k != "title"}
    required = [yaml_name(field) for field in schema.get("required", [])]
    kept = {k: v for k, v in schema.items() if k not in ("properties", "required", "title")}
    return {**kept, "properties": properties, **({"required": required} if required else {})}


def _group(key: str, mapping: Schema, more: list[str], ending: str) -> Schema:
    names = group_names(key)
    names += [name for name in more if name not in names]
    files = {
        "type": "string",
        "pattern": ending,
        "description": f"The file of a {key} of your own.",
    }
    return {
        "description": f"The {key}: a group's name or file, or its settings.",
        "anyOf": [{"enum": names}, files, mapping],
    }


def _method(defs: dict[str, Schema]) -> Schema:
    """Settings by `kind`; without a kind (a file that extends another) any method's are allowed."""
    rules: list[Schema] = []
    known: list[Schema] = []
    for kind in method_kinds():
        config = method_class(kind).Config
        schema = _section(config, defs)
        schema["properties"]["kind"] = {"const": kind, "description": "Name of the method."}
        defs[f"method.{kind}"] = schema
        reference = {"$ref": f"#/$defs/method.{kind}"}
        known.append(reference)
        rules.append(
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": reference,
            }
        )
    kinds: Schema = {
        "anyOf": [
            {"enum": method_kinds()},
            {"type": "string", "pattern": _PYTHON, "description": "A file of your own."},
        ]
    }
    return {
        "type": "object",
        "properties": {"kind": kinds},
        "allOf": [*rules, {"if": {"not": {"required": ["kind"]}}, "then": {"anyOf": known}}],
    }
