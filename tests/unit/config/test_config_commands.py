import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from accrete.launch.commands import methods, recipes, schema
from accrete.pipeline.config.library import recipe_names
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.config.problems import RecipeError
from accrete.pipeline.methods.registry import METHODS


def run(*args: str) -> Result:
    app = typer.Typer()
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(methods.app, name="methods")
    app.command("schema")(schema.schema)
    return CliRunner().invoke(app, args)


def test_recipes_ls() -> None:
    listed = json.loads(run("recipes", "ls", "--json").stdout)
    assert [row["name"] for row in listed] == recipe_names()
    assert all(row["tasks"] > 0 for row in listed)
    lines = run("recipes", "ls").stdout.splitlines()
    assert len(lines) == len(listed) + 1


def test_methods_ls() -> None:
    listed = json.loads(run("methods", "ls", "--json").stdout)
    assert set(METHODS) <= {row["kind"] for row in listed}
    assert all(set(row) == {"kind", "summary", "source"} for row in listed)
    assert "sequential" in run("methods", "ls").stdout


def test_recipes_show_is_a_recipe(tmp_path: Path) -> None:
    shown = run("recipes", "show", "standard_cl/order1", "seed=7", "method=sequential")
    assert shown.exit_code == 0
    (tmp_path / "r.yaml").write_text(shown.stdout)
    same = load_recipe("standard_cl/order1", ["seed=7", "method=sequential"])
    assert load_recipe(tmp_path / "r.yaml").config == same.config
    line = next(line for line in shown.stdout.splitlines() if line.startswith("seed"))
    assert line.split() == ["seed:", "7", "#", "override"]
    assert len(run("recipes", "show", "standard_cl/order1", "--all").stdout) > len(shown.stdout)


def test_recipes_show_raw_and_mistakes() -> None:
    raw = run("recipes", "show", "standard_cl/order1", "--raw").stdout
    assert raw.startswith("# Standard continual-learning benchmark, order 1")
    assert run("recipes", "show", "standard_cl/order1", "seed=1", "--raw").exit_code == 2
    assert isinstance(run("recipes", "show", "standard_cl/order1", "sed=1").exception, RecipeError)


def test_recipes_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "copy", "long_sequence/order4", "mine.yaml").stdout == "mine.yaml\n"
    assert len(load_recipe("mine.yaml").config.tasks) == 15


def test_schema(tmp_path: Path) -> None:
    printed = run("schema").stdout
    assert json.loads(printed)["$schema"].endswith("2020-12/schema")
    assert run("schema", "--out", str(tmp_path / "s.json")).exit_code == 0
    assert (tmp_path / "s.json").read_text() == printed
