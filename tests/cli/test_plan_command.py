"""`accrete plan` from a model's configuration alone: no weights, no rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accrete.launch.cli import app
from accrete.launch.forecast import calibrate as calibration
from accrete.launch.forecast.calibrate import calibrate
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import BatchShape, Tracer
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import ConfigError

STEPS = 13  # 100 rows in batches of 8


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from transformers import LlamaConfig

    monkeypatch.setenv("ACCRETE_CACHE", str(tmp_path / "cache"))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\n"
        f"model: {{path: {tmp_path / 'model'}}}\n"
        "method: ewc_lora\n"
        "tasks: [alpha, beta]\n"
        f"data: {{root: {tmp_path}, max_source_tokens: 16, max_target_tokens: 4}}\n"
        "train: {global_batch_size: 8, micro_batch_size: 4}\n"
        "engine: {device: cpu, procs: 2}\n"
    )
    return path


def plan(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_plan_needs_no_weights_and_no_rows(recipe: Path) -> None:
    found = plan(str(recipe), "--assume", "100/20/4")
    forecast = found["forecast"]
    assert [stage["steps"] for stage in forecast["stages"]] == [STEPS, STEPS]
    assert [stage["steps"] for stage in found["stages"]] == [STEPS, STEPS]
    assert [peak["zero_stage"] for peak in forecast["peaks"]] == [0, 1, 2, 3]
    assert forecast["rough"]
    assert forecast["seconds"] > 0
    assert any("assumed" in note for note in forecast["notes"])
    # Shared out over two ranks.
    weights = [peak["moments"] for peak in forecast["peaks"]]
    assert weights[0] == pytest.approx(2 * weights[2], rel=0.01)


def test_a_plan_for_a_cluster_with_its_price(recipe: Path) -> None:
    options = ["--assume", "100/20/4", "--cluster", "two_nodes_8", "--gpu", "h100"]
    found = plan(str(recipe), "engine.device=auto", *options, "--price", "2")
    assert (found["procs"], found["device"]) == (16, "cuda")
    forecast = found["forecast"]
    assert "h100" in forecast["speed"]
    assert forecast["price"] == pytest.approx(forecast["seconds"] / 3600 * 16 * 2)
    slower = plan(str(recipe), "engine.device=auto", *options, "--network", "0.01")
    assert slower["forecast"]["seconds"] > forecast["seconds"]


def test_tables_name_the_recipes_own_stage(recipe: Path) -> None:
    result = CliRunner().invoke(
        app, ["plan", str(recipe), "--assume", "100", "engine.zero_stage=3"], catch_exceptions=False
    )
    assert "ZeRO 3 *" in result.stdout
    assert "ZeRO 2 *" not in result.stdout
    assert "peak of a training step" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--assume", "many"], "--assume many"),
        (["--gpu", "tpu", "--assume", "9"], "Known: .*h100"),
        (["--gpu", "h100", "--assume", "9"], "engine.device"),
    ],
)
def test_what_cannot_be_planned_is_said(recipe: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", str(recipe), *options], catch_exceptions=False)


def test_a_calibration_is_made_once_and_continues_to_all_blocks(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(recipe, ["engine.kind=plain", "engine.procs=1"]).config
    assert config.model.path is not None
    model = ModelPlan.of(config, config.model.path, "cpu")
    tracer = Tracer(model)
    shapes = [BatchShape(4, 8, 4), BatchShape(4, 16, 4)]
    said: list[str] = []
    assert calibrate(model, tracer, 1, shapes, said.append, measure=False) is None
    first = calibrate(model, tracer, 1, shapes, said.append)
    assert first is not None
    assert not first.rough
    assert said
    monkeypatch.setattr(calibration, "_run", None)  # a second measurement would fail
    again = calibrate(model, tracer, 1, shapes, said.append, measure=False)
    assert again == first
    # Six blocks take longer than one; a step is two micro-batches and an update.
    timing = first.timing(tracer.trace(shapes[0]), 0.0)
    assert timing.step(2) > timing.micro + timing.last > timing.forward > 0
    # Control: what else changes the speed is not taken for the same.
    other = load_recipe(recipe, ["engine.kind=plain", "engine.procs=1", "adapter.rank=2"]).config
    other_model = ModelPlan.of(other, str(config.model.path), "cpu")
    assert calibrate(other_model, tracer, 1, shapes, said.append, measure=False) is None
