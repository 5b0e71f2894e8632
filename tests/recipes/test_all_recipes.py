"""Every shipped recipe loads, says what it must say, and finds its rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from accrete.pipeline.config.library import all_names, group_names, recipe_names, recipes_folder
from accrete.pipeline.config.load import load_recipe

COMPACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "compact"
needs_rows = pytest.mark.skipif(
    not COMPACT.is_dir(), reason="the compact benchmark rows are not beside the repository"
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((COMPACT / "MANIFEST.json").read_text())
    return loaded


@pytest.mark.parametrize("name", recipe_names())
def test_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.config.description
    assert "default" not in {recipe.origins["method.kind"], recipe.origins["tasks.0.name"]}


@pytest.mark.parametrize("model", group_names("model"))
@pytest.mark.parametrize("method", group_names("method"))
def test_every_group_fits_a_recipe(model: str, method: str) -> None:
    config = load_recipe("standard_cl/order1", [f"model={model}", f"method={method}"]).config
    assert config.method.kind == method
    assert (config.model.path is None) == (config.model.builder is not None)
    if config.model.builder is not None:
        assert config.model.builder == model


@pytest.mark.parametrize("name", all_names())
def test_first_comment_and_portability(name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert text.startswith("# ")
    if name in recipe_names():
        assert f"accrete run {name}" in comment
    # A copy must work anywhere, so shipped files extend names, never files.
    for line in re.findall(r"^extends:.*$", text, flags=re.M):
        assert ".yaml" not in line
    assert "/home/" not in text
    assert max(map(len, text.splitlines())) <= 100


@needs_rows
@pytest.mark.parametrize(
    ("benchmark", "folder"), [("standard", "standard_cl"), ("long", "long_sequence")]
)
def test_orders_are_the_published_ones(
    benchmark: str, folder: str, manifest: dict[str, Any]
) -> None:
    for order, tasks in manifest["orders"][benchmark].items():
        config = load_recipe(f"{folder}/{order}").config
        assert [task.name for task in config.tasks] == tasks
        assert config.data.benchmark == benchmark


@needs_rows
@pytest.mark.parametrize(
    "name", [n for n in recipe_names() if n.startswith(("standard_cl/", "long_sequence/"))]
)
def test_rows_are_found(name: str, manifest: dict[str, Any]) -> None:
    from accrete.pipeline.data.layouts import locate

    config = load_recipe(name, [f"data.root={COMPACT}"]).config
    known = {(entry["benchmark"], entry["task"]): entry for entry in manifest["tasks"]}
    for task in config.tasks:
        located = locate(task, config.data)
        assert located.format == "compact"
        assert set(located.splits) >= {"train", config.data.eval_split}
        for split in ("train", config.data.eval_split):
            files = located.splits[split]
            assert files
            assert all(
                f.is_file() and f.parent.parts[-2:] == (config.data.benchmark, task.name)
                for f in files
            )
        assert (config.data.benchmark, task.name) in known


def test_published_settings() -> None:
    for name in recipe_names():
        if not re.fullmatch(r"(standard_cl|long_sequence)/order\d", name):
            continue
        config = load_recipe(name).config
        train, adapter, data = config.train, config.adapter, config.data
        assert (train.learning_rate, train.schedule, train.epochs) == (1e-3, "constant", 1.0)
        assert train.global_batch_size == 64
        assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 32.0, 0.1)
        assert (data.max_source_tokens, data.max_target_tokens) == (512, 50)
        assert data.template == "olora"
        assert config.model.path == "google-t5/t5-large"
