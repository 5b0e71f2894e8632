"""`accrete plan` of every recipe that can be run, without rows: tasks, metrics and scoring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import Tracer
from accrete.pipeline.config.library import recipe_names
from accrete.pipeline.config.load import load_recipe

ROWS = 6
DECODED = {
    "superni/order1": 15,
    "superni/order2": 15,
    "citb/instrdialog": 19,
    "trace/full": 4,
    "trace/small": 4,
}
"""Recipe -> its tasks whose metric needs text; of the others none."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A configuration of each kind of model: tracing the recipes' own takes a minute in all."""
    from transformers import LlamaConfig, T5Config

    folder = tmp_path_factory.mktemp("models")
    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2).save_pretrained(
        folder / "t5"
    )
    LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    ).save_pretrained(folder / "llama")
    return {kind: folder / kind for kind in ("t5", "llama")}


@pytest.fixture(scope="module", autouse=True)
def shared_traces() -> Iterator[None]:
    """Recipes of one model, adapter and method share their traces, which take most of the time."""
    known: dict[str, Tracer] = {}

    def tracer(plan: ModelPlan, inputs: bool = False) -> Tracer:
        config = plan.config
        key = repr((config.model, config.adapter, config.method, plan.device, inputs))
        return known.setdefault(key, Tracer(plan, inputs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accrete.launch.forecast.run.Tracer", tracer)
        yield


def run_plan(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done


@pytest.mark.parametrize("name", recipe_names())
def test_a_plan_of_every_recipe(name: str, small: dict[str, Path]) -> None:
    model = small["llama" if name.startswith("trace/") else "t5"]
    values = ["model.builder=null", "model.builder_data=null", f"model.path={model}"]
    options = ["--assume", f"20/{ROWS}", "--gpu", "h100", "engine.device=cuda", "--json"]
    found = json.loads(run_plan(name, *values, *options).stdout)["forecast"]
    config = load_recipe(name).config
    assert [score["task"] for score in found["scoring"]] == [task.name for task in config.tasks]
    decoded = [score for score in found["scoring"] if score["decoded"]]
    assert len(decoded) == DECODED.get(name, 0)
    for score in found["scoring"]:
        assert score["rows"] == ROWS
        assert 0 < score["seconds"] <= score["most_seconds"]
    for score in decoded:
        assert 1 < score["new_tokens"] <= score["most_new_tokens"]
        if score["most_new_tokens"] > score["new_tokens"]:
            assert score["most_seconds"] > score["seconds"]
    last = found["stages"][-1]
    every = sum(score["seconds"] for score in found["scoring"])
    assert last["scoring_seconds"] == pytest.approx(every)
    assert any("scored by decoding" in note for note in found["notes"]) is bool(decoded)
    assert (found["most_seconds"] > found["seconds"]) is bool(decoded)


def test_the_table_says_how_long_it_may_take(small: dict[str, Path]) -> None:
    model = ["model.builder=null", f"model.path={small['llama']}"]
    text = run_plan("trace/full", *model, "--assume", "20/6", "--gpu", "h100").stdout
    said = " ".join(text.split())
    assert "MeetingBank, Py150, ScienceQA, 20Minuten: scored by decoding" in said
    assert "takes up to 512" in said
    assert "time if no decoded answer ends before its limit" in said
