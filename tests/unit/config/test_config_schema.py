from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from accrete.pipeline.config.library import all_names, recipes_folder
from accrete.pipeline.config.schema import recipe_schema
from accrete.pipeline.methods.registry import method_kinds


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path)


@pytest.mark.parametrize("name", [n for n in all_names() if not n.startswith("clusters/")])
def test_shipped_files_are_valid(name: str, validator: Draft202012Validator) -> None:
    assert not list(validator.iter_errors(read(recipes_folder() / f"{name}.yaml")))


GOOD: list[dict[str, Any]] = [
    {},
    {"extends": ["a", "./b.yaml"], "model": "mine.yaml", "method": "mine.py:Mine"},
    {"method": {"kind": "ewc_lora", "lambda": 3, "gamma": 0.5}},
    {"method": {"lambda": 3}},
    {"method": {"kind": "./mine.py:Mine", "anything": 1}},
    {"tasks": ["a", {"name": "b", "max_steps": 3, "files": {"train": ["x", "y"], "test": "z"}}]},
    {"train": {"max_steps": None, "learning_rate": 1, "betas": [0.9, 0.99]}},
    {"hub": {"a": {"dataset": "x/y", "columns": {"input": ["b", "c"]}, "per_label": {"train": 3}}}},
]
BAD: list[dict[str, Any]] = [
    {"trian": {}},
    {"train": {"learning_rte": 1}},
    {"train": {"max_steps": 0}},
    {"train": {"schedule": "cosin"}},
    {"train": {"betas": [1]}},
    {"seed": "1"},
    {"tasks": []},
    {"tasks": [{"max_steps": 3}]},
    {"tasks": [3]},
    {"model": "smal_t5"},
    {"model": {"builder": "tiny_t6"}},
    {"method": "ewc_lorra"},
    {"method": {"kind": "ewc_lorra"}},
    {"method": {"kind": "ewc_lora", "lambda": -1}},
    {"method": {"kind": "ewc_lora", "lambda_": 1}},
    {"method": {"kind": "sequential", "lambda": 1}},
    {"method": {"lamda": 1}},
    {"extends": 3},
    {"hub": {"a": {"data_set": "x/y"}}},
    {"hub": {"a": 3}},
]


@pytest.mark.parametrize("recipe", GOOD, ids=str)
def test_good(recipe: dict[str, Any], validator: Draft202012Validator) -> None:
    assert not list(validator.iter_errors(recipe))


@pytest.mark.parametrize("recipe", BAD, ids=str)
def test_bad(recipe: dict[str, Any], validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(recipe))


def test_every_setting_is_described(validator: Draft202012Validator) -> None:
    schema = validator.schema
    undescribed = [
        f"{section}.{key}"
        for section, part in schema["$defs"].items()
        for key, value in part["properties"].items()
        if "description" not in value
    ]
    assert not undescribed
    assert schema["$defs"]["TrainConfig"]["properties"]["learning_rate"]["description"] == (
        "Peak learning rate."
    )
    assert "lambda" in schema["$defs"]["method.ewc_lora"]["properties"]
    for kind in method_kinds():
        assert f"method.{kind}" in schema["$defs"]
