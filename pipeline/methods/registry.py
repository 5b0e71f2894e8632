"""From a method's `kind` to its class, imported only when asked for."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import sys
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods.base import Method, MethodConfig

METHODS: dict[str, str] = {
    "sequential": "accrete.pipeline.methods.sequential:Sequential",
    "inc_lora": "accrete.pipeline.methods.inc_lora:IncLora",
    "joint": "accrete.pipeline.methods.joint:Joint",
    "per_task": "accrete.pipeline.methods.per_task:PerTask",
    "replay": "accrete.pipeline.methods.replay:Replay",
    "lwf": "accrete.pipeline.methods.lwf:Lwf",
    "full": "accrete.pipeline.methods.full:Full",
    "ewc": "accrete.pipeline.methods.ewc:Ewc",
    "gpm": "accrete.pipeline.methods.gpm:Gpm",
    "ewc_lora": "accrete.pipeline.methods.ewc_lora:EwcLora",
    "sr2_lora": "accrete.pipeline.methods.sr2_lora:Sr2Lora",
    "lora_subtraction": "accrete.pipeline.methods.lora_subtraction:LoraSubtraction",
    "o_lora": "accrete.pipeline.methods.o_lora:OLora",
    "inf_lora": "accrete.pipeline.methods.inf_lora:InfLora",
    "keep_lora": "accrete.pipeline.methods.keep_lora:KeepLora",
    "keep_lora_pp": "accrete.pipeline.methods.keep_lora_pp:KeepLoraPp",
}
"""kind -> module:Class. Other packages join through entry points of the group `GROUP`."""

GROUP = "accrete.methods"
_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?")


def method_kinds() -> list[str]:
    """Every `kind` that has a name: accrete's own, then those that installed packages add."""
    return [*METHODS, *sorted(_plugins())]


def is_method_file(kind: str) -> bool:
    """Whether `kind` points at a Python file, as `path/to/file.py` or `path/to/file.py:Class`."""
    return _FILE.fullmatch(kind) is not None


def method_class(kind: str) -> type[Method]:
    """The class behind `kind`: a name of `method_kinds()`, `file.py` or `file.py:Class`.

    Raises:
        ConfigError: There is no such method, or what was found is not one.
    """
    match = _FILE.fullmatch(kind)
    if match is not None:
        return _from_file(Path(os.path.expanduser(match["path"])), match["name"])
    if kind in METHODS:
        module, _, name = METHODS[kind].partition(":")
        return _checked(getattr(importlib.import_module(module), name), f"method `{kind}`")
    plugin = _plugins().get(kind)
    if plugin is not None:
        try:
            found = plugin.load()
        except Exception as error:
            raise ConfigError(f"method `{kind}` ({plugin.value}): {_reason(error)}") from error
        return _checked(found, f"method `{kind}` ({plugin.value})")
    known = method_kinds()
    near = get_close_matches(kind, known, n=1, cutoff=0.5)
    guess = f" Did you mean `{near[0]}`?" if near else ""
    raise ConfigError(
        f"there is no method `{kind}`.{guess} Known methods: {', '.join(known)}; "
        "or a file of your own: path/to/file.py:Class."
    )


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in METHODS}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _from_file(path: Path, name: str | None) -> type[Method]:
    if not path.is_file():
        raise ConfigError(f"method file {path}: no such file (relative to {Path.cwd()}).")
    module = _load_module(path.resolve())
    if name is not None:
        if not hasattr(module, name):
            raise ConfigError(f"method file {path}: it has no class `{name}`.")
        return _checked(getattr(module, name), f"method file {path}:{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        found = ", ".join(cls.__name__ for cls in own) or "none"
        raise ConfigError(
            f"method file {path}: exactly one subclass of Method is expected, found: {found}. "
            f"Name one: {path}:Class."
        )
    return _checked(own[0], f"method file {path}")


@cache
def _load_module(path: Path) -> ModuleType:
    name = f"accrete_method_{re.sub(r'[^0-9a-zA-Z]', '_', str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"method file {path}: Python cannot load it.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while they are defined.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"method file {path}: {_reason(error)}") from error
    return module


def _checked(found: object, what: str) -> type[Method]:
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"{what}: {found!r} is not a subclass of accrete's Method.")
    config = found.Config
    if not (dataclasses.is_dataclass(config) and issubclass(config, MethodConfig)):
        raise ConfigError(f"{what}: its Config is not a dataclass derived from MethodConfig.")
    if not isinstance(getattr(config, "kind", None), str):
        raise ConfigError(f'{what}: give its Config the field `kind: str = "name"`.')
    return found
