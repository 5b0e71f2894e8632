import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods import registry
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.registry import METHODS, method_class, method_kinds

MINE = """\
from __future__ import annotations
from dataclasses import dataclass
from accrete.pipeline.methods.base import Method, MethodConfig

@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    kind: str = "mine"

class Mine(Method):
    Config = MineConfig

class NotOne:
    pass
"""


@pytest.mark.parametrize("kind", list(METHODS))
def test_own_methods(kind: str) -> None:
    method = method_class(kind)
    assert issubclass(method, Method)
    assert method.Config(kind=kind) == method.Config()  # type: ignore[call-arg]
    assert method.Config.kind == kind
    assert method.summary
    assert method.source


def test_unknown_kind_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `ewc_lora`\?") as caught:
        method_class("ewclora")
    for kind in METHODS:
        assert kind in str(caught.value)


def test_a_file_with_and_without_a_class_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    method = method_class(str(path))
    assert method.__name__ == "Mine"
    assert method_class(f"{path}:Mine") is method


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (MINE, ":Other", "has no class `Other`"),
        (MINE, ":NotOne", "not a subclass"),
        (MINE.replace("(Method)", ""), "", "found: none"),
        (MINE + "\nclass Two(Mine): pass\n", "", "found: Mine, Two"),
        (MINE.replace("    Config = MineConfig", "    pass"), "", "give its Config the field"),
        (MINE.replace("    Config = MineConfig", "    Config = int"), "", "not a dataclass"),
        ("import no_such_module\n", "", "ModuleNotFoundError"),
        ("def\n", "", "SyntaxError"),
    ],
)
def test_files_that_hold_no_method(tmp_path: Path, text: str, name: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        method_class(f"{path}{name}")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        method_class(str(tmp_path / "gone.py"))


def test_plugins_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "accrete_test_plugin.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("mine", "accrete_test_plugin:Mine", registry.GROUP),
        EntryPoint("broken", "accrete_test_plugin:Gone", registry.GROUP),
        EntryPoint("sequential", "accrete_test_plugin:Mine", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry._plugins.cache_clear()
    try:
        assert method_kinds() == [*METHODS, "broken", "mine"]
        assert method_class("mine").__name__ == "Mine"
        assert method_class("sequential").__module__ == "accrete.pipeline.methods.sequential"
        with pytest.raises(ConfigError, match="broken"):
            method_class("broken")
    finally:
        registry._plugins.cache_clear()
        sys.modules.pop("accrete_test_plugin", None)
