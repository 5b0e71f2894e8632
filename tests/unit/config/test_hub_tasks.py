"""The recipe key `hub`: where tasks lie on the hub, used up while a recipe is read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.config.problems import RecipeError

Write = Callable[..., Path]

BASE = """\
description: a test
tasks: [one, {name: two, columns: {input: own}}, {name: three, files: {train: a, test: a}}]
model: {path: some/model}
method: sequential
hub:
  one: {dataset: somebody/one, columns: {input: text, output: label}, label_names: [x, y]}
  two: {dataset: somebody/two, columns: {input: text, output: label}}
  other: {dataset: somebody/other}
"""


def test_tasks_take_what_stands_under_their_names(write: Write) -> None:
    recipe = load_recipe(write("r.yaml", BASE), ["data.format=hub"])
    one, two, three = recipe.config.tasks
    assert (one.dataset, one.columns.input, one.label_names) == ("somebody/one", "text", ["x", "y"])
    assert (two.dataset, two.columns.input, two.columns.output) == ("somebody/two", "own", "label")
    assert three.dataset is None
    assert recipe.origins["tasks.0.dataset"] == "r.yaml:6"
    assert recipe.origins["tasks.1.columns.input"] == "r.yaml:2"
    assert "hub" not in recipe.resolved()


def test_a_dump_needs_no_hub_key(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write("r.yaml", BASE), ["data.format=hub", "tasks.one.revision=abc"])
    recipe.dump_yaml(tmp_path / "dump.yaml")
    assert load_recipe(tmp_path / "dump.yaml").config.tasks == recipe.config.tasks
    assert recipe.config.tasks[0].revision == "abc"


def test_an_entry_may_leave_the_place_of_the_rows_to_the_task(write: Write) -> None:
    file = write("r.yaml", BASE.replace("{dataset: somebody/one, ", "{"))
    with pytest.raises(RecipeError, match="`one`; known: other, two"):
        load_recipe(file, ["data.format=hub"])
    for place in ("tasks.one.dataset=a/b", "tasks.one.files={train: a, test: a}"):
        (one, *_) = load_recipe(file, ["data.format=hub", place]).config.tasks
        assert (one.columns.input, one.label_names) == ("text", ["x", "y"])


def test_nothing_is_taken_for_other_formats(write: Write) -> None:
    recipe = load_recipe(write("r.yaml", BASE))
    assert all(task.dataset is None for task in recipe.config.tasks)


def test_mistakes(write: Write) -> None:
    file = write("r.yaml", BASE.replace("[one,", "[unheard,"))
    load_recipe(file)
    load_recipe(file, ["data.format=hub", "tasks.unheard.dataset=a/b"])
    with pytest.raises(RecipeError, match="`unheard`; known: one, other, two"):
        load_recipe(file, ["data.format=hub"])
    with pytest.raises(RecipeError, match="`one`; known: none"):
        load_recipe(write("n.yaml", BASE.split("hub:")[0]), ["data.format=hub"])
    with pytest.raises(RecipeError, match="allowed: a mapping of task names"):
        load_recipe(write("s.yaml", BASE.split("hub:")[0] + "hub: yes\n"))
    with pytest.raises(RecipeError, match="unknown key"):
        load_recipe(
            write("t.yaml", BASE.replace("dataset: somebody/one", "data_set: x")),
            ["data.format=hub"],
        )


def test_the_shipped_hub_tasks() -> None:
    recipe = load_recipe("long_sequence/order4", ["data.format=hub", "tasks.amazon.dataset=a/b"])
    for task in recipe.config.tasks:
        if task.name == "amazon":
            assert task.family == "SC"
            assert len(task.labels or ()) == 5
            continue
        assert task.dataset is not None
        assert "/" in task.dataset
        assert task.label_names
        assert task.family
        assert task.labels is None or set(task.labels) == set(task.label_names)
        assert set(task.splits) <= {"train", "test"}
    with pytest.raises(RecipeError, match="no hub data set is known for `amazon`"):
        load_recipe("standard_cl/order1", ["data.format=hub"])
