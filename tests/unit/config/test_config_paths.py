"""Paths of a recipe: absolute, so that a run can be gone on with from anywhere."""

from pathlib import Path

import pytest
from recipe_samples import BASE, Write

from accrete.pipeline.config.load import load_recipe


def test_paths_become_absolute_and_hub_ids_stay(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write("sub/r.yaml", BASE)
    (tmp_path / "local").mkdir()
    changes = ["data.root=../rows", "model.tokenizer=~/tok", "data.instructions=i.json"]
    config = load_recipe(file, changes).config
    assert config.data.root == str(tmp_path.parent / "rows")
    assert config.data.instructions == str(tmp_path / "i.json")
    assert config.model.tokenizer == str(tmp_path / "home" / "tok")
    assert config.model.path == "some/model"
    assert load_recipe(file, ["model.path=local"]).config.model.path == str(tmp_path / "local")
    assert load_recipe(file, ["model.path=./x"]).config.model.path == str(tmp_path / "x")


def test_files_of_tasks_become_absolute_where_no_root_is_given(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = write("r.yaml", BASE)
    given = ["tasks.t1.files={train: [a/*.jsonl, ~/b.jsonl, /c.jsonl], test: ../t.jsonl}"]
    for kind in ("auto", "files", "hub"):
        changes = [*given, f"data.format={kind}", "tasks.t2.dataset=a/b"]
        assert load_recipe(file, changes).config.tasks[0].files == {
            "train": [f"{tmp_path}/a/*.jsonl", f"{tmp_path}/home/b.jsonl", "/c.jsonl"],
            "test": f"{tmp_path.parent}/t.jsonl",
        }
    rooted = load_recipe(file, [*given, "data.root=rows"]).config
    assert rooted.data.root == str(tmp_path / "rows")
    assert (rooted.tasks[0].files or {})["test"] == "../t.jsonl"


def test_a_local_hub_data_set_becomes_absolute_and_hub_ids_stay(
    write: Write, tmp_path: Path
) -> None:
    file = write("r.yaml", BASE)
    (tmp_path / "sets" / "one").mkdir(parents=True)
    for given, wanted in (
        ("sets/one", str(tmp_path / "sets" / "one")),
        ("./gone", str(tmp_path / "gone")),
        ("org/name", "org/name"),
        ("imdb", "imdb"),
    ):
        changes = ["data.format=hub", f"tasks.t1.dataset={given}", "tasks.t2.dataset=a/b"]
        assert load_recipe(file, changes).config.tasks[0].dataset == wanted
    folder = load_recipe(file, ["data.root=x", "tasks.t1.dataset=sets/one"]).config
    assert folder.tasks[0].dataset == "sets/one"
