import dataclasses
from pathlib import Path

import pytest

from accrete.pipeline.config.catalog import copy_recipe, list_recipes, recipe_text
from accrete.pipeline.config.library import recipes_folder
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import ConfigError, InputError


def test_cards() -> None:
    cards = {card.name: card for card in list_recipes()}
    assert {f"standard_cl/order{n}" for n in (1, 2, 3)} < set(cards)
    assert cards["long_sequence/order5"].tasks == 15
    assert all(card.description and card.path.is_file() for card in cards.values())
    assert not [name for name in cards if name.startswith(("models/", "methods/"))]
    assert not [name for name in cards if name.endswith("base")]


@pytest.mark.parametrize("card", list_recipes(), ids=lambda card: str(card.name))
def test_a_copy_works_elsewhere(
    card: "object", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: str = card.name  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    copy = copy_recipe(name, tmp_path / "mine.yaml")
    assert copy.read_text() == recipe_text(name)
    original, mine = load_recipe(name).config, load_recipe(copy).config
    assert dataclasses.replace(mine, name=original.name) == original


def test_copy_into_a_folder_and_refusals(tmp_path: Path) -> None:
    assert copy_recipe("standard_cl/order1", tmp_path) == tmp_path / "order1.yaml"
    for dest, said in [
        (tmp_path, "exists already"),
        (tmp_path / "x.txt", "ends in .yaml"),
        (tmp_path / "no" / "x.yaml", "create it first"),
    ]:
        with pytest.raises(InputError, match=said):
            copy_recipe("standard_cl/order1", dest)
    with pytest.raises(ConfigError, match="known recipes"):
        copy_recipe("standard_cl/order7", tmp_path / "y.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["order1.yaml"]


def test_groups_have_a_text_too() -> None:
    assert recipe_text("models/t5_large") == (
        recipes_folder() / "models" / "t5_large.yaml"
    ).read_text(encoding="utf-8")
