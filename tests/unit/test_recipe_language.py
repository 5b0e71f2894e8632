"""Mistakes and turns of phrase of recipes and overrides that once were told wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from accrete.pipeline.config.catalog import copy_recipe
from accrete.pipeline.config.load import LoadedRecipe, load_recipe
from accrete.pipeline.config.problems import RecipeError
from accrete.pipeline.errors import ConfigError, InputError

BASE = """\
tasks: [t1, {name: t2, max_steps: 3}]
model: {path: some/model}
method: {kind: sequential}
"""
Load = Callable[..., LoadedRecipe]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a recipe with the given text and overrides; its folder is the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(*overrides: str, text: str = BASE) -> LoadedRecipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load_recipe("r.yaml", overrides)

    return load


def told(load: Load, *overrides: str, text: str = BASE) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        load(*overrides, text=text)
    return [(p.path, f"{p.message} {p.hint}") for p in caught.value.problems]


def test_overrides_may_speak_of_tasks_that_an_earlier_one_names(load: Load) -> None:
    for key in ("tasks.b", "tasks.1"):
        tasks = load("tasks=[a, b]", f"{key}.max_steps=5").config.tasks
        assert [(t.name, t.max_steps) for t in tasks] == [("a", None), ("b", 5)]


def test_an_override_adds_one_to_a_list(load: Load) -> None:
    tasks = load("tasks.2=t3", "tasks.3={name: t4, max_steps: 1}", "tasks.t3.epochs=2").config.tasks
    assert [t.name for t in tasks] == ["t1", "t2", "t3", "t4"]
    assert (tasks[2].epochs, tasks[3].max_steps) == (2.0, 1)
    for gap in ("tasks.3=t3", "tasks.2.epochs=1", "tasks.02=t3"):
        assert "allowed: 0 to 1" in told(load, gap)[0][1]


@pytest.mark.parametrize("parent", [None, "tasks: [a\n"], ids=["missing", "damaged"])
def test_what_an_unread_file_may_hold_is_not_called_missing(load: Load, parent: str | None) -> None:
    if parent is not None:
        Path("parent.yaml").write_text(parent)
    text = "extends: parent.yaml\ntrain: {epocs: 2}\n"
    assert [path for path, _ in told(load, text=text)] == [
        "extends" if parent is None else "", "train.epocs"
    ]  # fmt: skip
    both = [path for path, _ in told(load, "nonsense", text="train: {epochs: 2}\n")]
    assert both == ["method", "tasks", "model", ""]  # control: all was read


def test_a_damaged_group_is_told_once(load: Load) -> None:
    Path("group.yaml").write_text("model: [\n")
    assert [path for path, _ in told(load, "model=group.yaml")] == [""]


def test_a_home_that_nobody_has_is_a_missing_file(load: Load) -> None:
    home = "~nobody-of-this-name/x.yaml"
    assert "no such file" in told(load, text=f"extends: {home}\n")[0][1]
    assert "no such file" in told(load, f"model={home}")[0][1]
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(home)
    with pytest.raises(InputError, match="there is no folder"):
        copy_recipe("quickstart", Path(home))


@pytest.mark.parametrize("betas", ["[0.9, 1]", "[-0.1, 0.9]"])
def test_decay_rates_that_the_optimizer_refuses(load: Load, betas: str) -> None:
    [(path, message)] = told(load, f"train.betas={betas}")
    assert path == "train"
    assert "allowed: two numbers >= 0 and < 1" in message
    assert load("train.betas=[0, 0.99]").config.train.betas == (0.0, 0.99)


@pytest.mark.parametrize("override", ["tasks=[a,", "tasks.t1.files.train=*.jsonl"])
def test_an_override_that_lacks_quotes_is_told_how_to_get_them(load: Load, override: str) -> None:
    [(_, message)] = told(load, override)
    assert "quote it for the shell: 'tasks=[a, b]'" in message
    assert load("tasks.t1.files.train='*.jsonl'", "data.root=x").config.tasks[0].files == {
        "train": "*.jsonl"
    }


@pytest.mark.parametrize(
    "text", ["one\x85two", "\x85", "? why", "?", "? a\n\nb", "a ? b", "\u2028"]
)
def test_the_dump_keeps_every_text(load: Load, tmp_path: Path, text: str) -> None:
    recipe = load()
    task = replace(recipe.config.tasks[0], instruction=text, labels=[text, "x"])
    config = replace(recipe.config, description=text, tasks=[task, recipe.config.tasks[1]])
    replace(recipe, config=config).dump_yaml(tmp_path / "dump.yaml")
    assert load_recipe(tmp_path / "dump.yaml").config == config
