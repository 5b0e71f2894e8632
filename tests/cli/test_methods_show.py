"""`accrete methods show`: a method's card, for people and for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from accrete.launch import cli
from accrete.launch.completion import complete_method
from accrete.pipeline.methods.registry import METHODS, method_class

MINE = '''\
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Annotated, Literal
from pydantic import Field
from accrete.pipeline.methods.base import Method, MethodConfig

@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    kind: str = "mine"
    lambda_: Annotated[float, Field(gt=0)]
    """How much.
    Over two lines."""
    mode: Literal["near", "far"] | None = None
    sizes: list[int] = field(default_factory=lambda: [1, 2])

class Mine(Method):
    Config = MineConfig
    summary = "my own method"
    kept = "nothing at all"
    fresh_adapter = False

class Other(Mine):
    pass
'''


def accrete(*arguments: str) -> int:
    """Exit status of a command."""
    old, sys.argv = sys.argv, ["accrete", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = old
    return 0


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return "mine.py:Mine"


@pytest.mark.parametrize("kind", list(METHODS))
def test_every_method_has_a_whole_card(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accrete("methods", "show", kind, "--json") == 0
    card = json.loads(capsys.readouterr().out)
    method = method_class(kind)
    assert (card["kind"], card["summary"], card["source"]) == (kind, method.summary, method.source)
    assert card["code"] == METHODS[kind]
    for key in ("kept", "cost", "guarantee", "deviations"):
        assert card[key] == getattr(method, key)
    assert set(card["flags"]) == {"trains", "fresh_adapter", "restarts", "peeks"}
    assert Path(card["recipe"]).is_file()
    assert Path(card["recipe"]).stem == kind
    for setting in card["settings"]:
        assert setting["type"]
        assert len(setting["description"]) > 10, setting["name"]
    assert accrete("methods", "show", kind) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{kind}: ")
    said = " ".join(text.split())
    for key in ("kept", "cost", "guarantee", "deviations"):
        assert f" {key} {card[key]} " in said
    assert all(f"method.{setting['name']}: " in text for setting in card["settings"])


def test_settings_are_spelt_as_in_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    accrete("methods", "show", "ewc_lora", "--json")
    settings = {s["name"]: s for s in json.loads(capsys.readouterr().out)["settings"]}
    assert "kind" not in settings
    assert settings["lambda"]["type"] == "a number >= 0"
    assert settings["fisher_rows"]["default"] is None
    assert settings["fisher"]["type"] == "one of per_sequence, per_batch, rank1"


def test_a_file(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accrete("methods", "show", mine, "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["kind"], card["code"], card["recipe"]) == ("mine", "mine.py:Mine", None)
    assert card["flags"]["fresh_adapter"] is False
    assert card["settings"] == [
        {
            "name": "lambda",
            "type": "a number > 0",
            "required": True,
            "default": None,
            "description": "How much. Over two lines.",
        },
        {
            "name": "mode",
            "type": "one of near, far, or null",
            "required": False,
            "default": None,
            "description": "",
        },
        {
            "name": "sizes",
            "type": "a list of integers",
            "required": False,
            "default": [1, 2],
            "description": "",
        },
    ]


def test_a_file_in_words(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accrete("methods", "show", mine) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: my own method"
    assert "  recipe      none" in lines
    assert "  source      not given" in lines
    assert "  kept        nothing at all" in lines
    assert "  guarantee   not given" in lines
    assert "method.lambda: a number > 0; required" in lines
    assert "method.sizes: a list of integers; default [1, 2]" in lines
    assert "    How much. Over two lines." in lines


def test_mistakes(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert accrete("methods", "show", "ewclora") == 2
    assert "Did you mean `ewc_lora`?" in capsys.readouterr().err
    assert accrete("methods", "show", "mine.py") == 2
    assert "found: Mine, Other" in capsys.readouterr().err
    assert accrete("methods", "show", "gone.py") == 2
    assert "no such file" in capsys.readouterr().err


def test_names_and_files_are_completed(mine: str) -> None:
    assert complete_method("inc") == ["inc_lora"]
    assert complete_method("mi") == ["mine.py"]
