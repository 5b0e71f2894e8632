from collections.abc import Callable
from pathlib import Path

import pytest

from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.config.problems import RecipeError

BASE = """\
tasks: [t1, t2]
model: {path: some/model}
method: {kind: sequential}
train: {learning_rate: 0.1, epochs: 2, eps: 1e-6}
data: {template: sapt}
"""
MODEL_A = (
    "model: {path: a/a, dtype: bf16}\ntrain: {learning_rate: 0.5, eps: 1e-5}\nadapter: {rank: 3}\n"
)
MODEL_B = "model: {path: b/b}\ntrain: {learning_rate: 0.7}\n"


def test_later_parents_win_and_the_file_wins_over_them(write: Callable[..., Path]) -> None:
    write("a.yaml", BASE)
    write("sub/b.yaml", "extends: ../c.yaml\ntrain: {learning_rate: 0.2}\nseed: 4\n")
    write("c.yaml", "train: {learning_rate: 0.9, weight_decay: 0.3}\nadapter: {targets: [q, k]}\n")
    file = write("r.yaml", "extends: [a.yaml, sub/b.yaml]\nseed: 5\nadapter: {targets: [v]}\n")
    recipe = load_recipe(file)
    train = recipe.config.train
    assert (train.learning_rate, train.epochs, train.weight_decay) == (0.2, 2.0, 0.3)
    assert recipe.config.seed == 5
    assert recipe.config.adapter.targets == ["v"]
    origins = recipe.origins
    assert origins["train.learning_rate"] == "sub/b.yaml:2"
    assert origins["train.weight_decay"] == "c.yaml:1"
    assert origins["train.epochs"] == "a.yaml:4"
    assert origins["train.optimizer"] == "default"
    assert origins["seed"] == "r.yaml:2"


def test_name_and_description_are_not_inherited(write: Callable[..., Path]) -> None:
    write("a.yaml", "name: parent\ndescription: of the parent\n" + BASE)
    recipe = load_recipe(write("child.yaml", "extends: ./a.yaml\n"))
    assert (recipe.name, recipe.config.description) == ("child", "")
    assert load_recipe("a.yaml").name == "parent"


def test_a_shipped_name_can_be_extended_from_anywhere(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write("r.yaml", "extends: standard_cl/order2\nseed: 3\n"))
    assert [task.name for task in recipe.config.tasks] == ["dbpedia", "amazon", "agnews", "yahoo"]


def test_a_circle_is_an_error(write: Callable[..., Path]) -> None:
    write("a.yaml", "extends: b.yaml\n" + BASE)
    write("b.yaml", "extends: [c.yaml]\n")
    write("c.yaml", "extends:\n  - a.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("a.yaml")
    (problem,) = caught.value.problems
    assert problem.where == "c.yaml:2"
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in problem.message


def test_the_same_parent_twice_is_no_circle(write: Callable[..., Path]) -> None:
    write("a.yaml", BASE)
    write("b.yaml", "extends: a.yaml\nseed: 2\n")
    write("c.yaml", "extends: a.yaml\n")
    assert load_recipe(write("r.yaml", "extends: [b.yaml, c.yaml]\n")).config.seed == 2


def test_unknown_parents_are_all_named(write: Callable[..., Path]) -> None:
    file = write("r.yaml", "extends:\n- standard_cl/ordr1\n- ./gone.yaml\n- 3\n" + BASE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert [p.where for p in caught.value.problems] == ["r.yaml:2", "r.yaml:3", "r.yaml:4"]
    assert "standard_cl/order1" in caught.value.problems[0].hint


def test_group_in_a_file_stands_below_that_files_own_values(write: Callable[..., Path]) -> None:
    write("base.yaml", BASE)
    write("groups/m.yaml", MODEL_A)
    file = write(
        "r.yaml", "extends: base.yaml\nmodel: groups/m.yaml\ntrain: {learning_rate: 0.3}\n"
    )
    config = load_recipe(file).config
    assert (config.model.path, config.model.dtype) == ("a/a", "bf16")
    assert config.train.learning_rate == 0.3  # the file over the group
    assert config.train.eps == 1e-5  # the group over what the file extends
    assert config.adapter.rank == 3


def test_group_override_stands_above_the_files_and_below_other_overrides(
    write: Callable[..., Path],
) -> None:
    write("m.yaml", MODEL_A)
    file = write("r.yaml", BASE)
    config = load_recipe(file, ["train.eps=1e-4", "model=m.yaml"]).config
    assert config.model.path == "a/a"
    assert config.train.learning_rate == 0.5
    assert config.train.eps == 1e-4


def test_choosing_another_group_leaves_nothing_of_the_first(write: Callable[..., Path]) -> None:
    write("base.yaml", BASE)
    write("a.yaml", MODEL_A)
    write("b.yaml", MODEL_B)
    file = write("r.yaml", "extends: base.yaml\nmodel: a.yaml\n")
    recipe = load_recipe(file, ["model=b.yaml"])
    assert (
        recipe.config
        == load_recipe(write("r2.yaml", "name: r\nextends: base.yaml\n"), ["model=b.yaml"]).config
    )
    assert recipe.config.model.dtype == "auto"
    assert recipe.config.adapter.rank == 8
    assert recipe.config.train.eps == 1e-6  # the base's value is back
    assert recipe.origins["train.eps"] == "base.yaml:4"
    child = write("child.yaml", "extends: r.yaml\nmodel: b.yaml\n")
    assert load_recipe(child).config.adapter.rank == 8
    both = write("both.yaml", "extends: [r.yaml, other.yaml]\n")
    write("other.yaml", "model: b.yaml\n")
    assert load_recipe(both).config.model.dtype == "auto"
    assert load_recipe(both).config.train.eps == 1e-6


def test_group_keeps_keys_given_as_a_mapping_on_top(write: Callable[..., Path]) -> None:
    write("a.yaml", MODEL_A)
    write("base.yaml", BASE.replace("{path: some/model}", "a.yaml"))
    file = write("r.yaml", "extends: base.yaml\nmodel: {dtype: fp32}\n")
    config = load_recipe(file).config
    assert (config.model.path, config.model.dtype) == ("a/a", "fp32")


def test_method_name_without_a_group_file_is_a_kind(write: Callable[..., Path]) -> None:
    write("mine.py", METHOD)
    file = write("r.yaml", BASE.replace("{kind: sequential}", "mine.py"))
    recipe = load_recipe(file, ["method.lambda=2"])
    assert recipe.config.method.lambda_ == 2.0  # type: ignore[attr-defined]
    assert recipe.resolved()["method"]["lambda"] == 2.0
    assert recipe.config.method.kind == str(file.parent / "mine.py")
    assert load_recipe(file, ["method=sequential"]).config.method.kind == "sequential"


def test_unknown_groups_offer_the_known_ones(write: Callable[..., Path]) -> None:
    write("empty.yaml", "train: {epochs: 1}\n")
    file = write("r.yaml", BASE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["model=smal_t5", "method=ewc_lorra"])
    model, method = caught.value.problems
    assert "small_t5" in model.hint
    assert "tiny_llama" in model.message
    assert "ewc_lora" in method.hint
    for bad in ("model=empty.yaml", "model=gone.yaml"):
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, [bad])
        assert len(caught.value.problems) == 1


METHOD = """\
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
from pydantic import Field
from accrete.pipeline.methods.base import Method, MethodConfig

@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    kind: str = "mine"
    lambda_: Annotated[float, Field(ge=0)] = 1.0
    \"\"\"The weight.\"\"\"

class Mine(Method):
    Config = MineConfig
    summary = "mine"
"""
