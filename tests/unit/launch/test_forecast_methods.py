"""What each method is forecast to cost, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from forecast_case import BATCH, RANK, WIDTH, model_plan

from accrete.launch.forecast.methods import Situation, epoch_rows, kept_rows, method_cost
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import Tracer
from accrete.pipeline.methods.registry import METHODS, method_class


def situation(plan: ModelPlan, index: int, world: int = 2) -> Situation:
    return Situation(
        plan=plan,
        tracer=Tracer(plan),
        world=world,
        index=index,
        rows=20,
        batch=BATCH,
        classes=4,
    )


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_has_a_cost(method: str) -> None:
    first, second = (method_cost(situation(model_plan("llama", method), i)) for i in (0, 1))
    assert first.known
    assert second.known
    assert second.between_bytes >= first.between_bytes
    assert min(value for value in vars(second).values() if not isinstance(value, bool)) >= 0


def test_costs_by_hand() -> None:
    layers = 2 * (WIDTH * WIDTH + WIDTH * (WIDTH // 2))  # q and v of two blocks
    ewc_lora = method_cost(situation(model_plan("llama", "ewc_lora"), 1))
    assert ewc_lora.after_bytes == 4 * layers / 2
    assert ewc_lora.saved_bytes == 4 * layers
    assert ewc_lora.gradient_rows == 20
    o_lora = method_cost(situation(model_plan("llama", "o_lora"), 2))
    assert o_lora.between_bytes == 2 * 4 * RANK * 4 * WIDTH / 2
    lwf = method_cost(situation(model_plan("llama", "lwf"), 1))
    assert lwf.step_forwards == 1
    assert method_cost(situation(model_plan("llama", "lwf"), 0)).step_forwards == 0
    ewc = method_cost(situation(model_plan("llama", "ewc"), 1))
    assert ewc.after_bytes == 2 * 4 * sum(model_plan("llama", "ewc").trained) / 2
    limited = model_plan("llama", "ewc_lora", method_settings={"fisher_rows": 3})
    assert method_cost(situation(limited, 1)).gradient_rows == 3


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"triplet": 0.0}, (0, 1)),
        ({}, (1, 2)),
        ({"triplet": 0.0, "ncm": True}, (2, 3)),
        ({"ncm": True}, (2, 3)),
    ],
)
def test_forward_passes_of_lora_subtraction(
    settings: dict[str, Any], passes: tuple[int, int]
) -> None:
    """From the second task on one for the space; at a task's end prototypes, and `ncm`'s own."""
    plan = model_plan("llama", "lora_subtraction", method_settings=settings)
    rows = tuple(method_cost(situation(plan, index)).forward_rows for index in (0, 1))
    assert rows == tuple(20 * count for count in passes)


def test_a_method_of_ones_own_is_said_to_be_unknown(tmp_path: Any) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from accrete.pipeline.methods.base import Method, MethodConfig\n"
        "from accrete.pipeline.methods.ewc_lora import EwcLora, EwcLoraConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class MineConfig(MethodConfig):\n    kind: str = 'mine'\n"
        "class Mine(Method):\n    Config = MineConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class LikeConfig(EwcLoraConfig):\n    kind: str = 'like'\n"
        "class Like(EwcLora):\n    Config = LikeConfig\n"
    )
    for name, known in (("Mine", False), ("Like", True)):
        kind = f"{file}:{name}"
        plan = model_plan("llama")
        method = method_class(kind).Config(kind=kind)
        plan = replace(plan, config=replace(plan.config, method=method))
        assert method_cost(situation(plan, 1)).known is known


def test_rows_of_an_epoch() -> None:
    rows = [100, 200, 50]
    joint, replay = method_class("joint").Config(), method_class("replay").Config(rows=10)
    assert [epoch_rows("joint", joint, rows, i, 8) for i in range(3)] == [100, 300, 350]
    assert [epoch_rows("replay", replay, rows, i, 8) for i in range(3)] == [100, 210, 70]
    plain = method_class("sequential").Config()
    assert [epoch_rows("sequential", plain, rows, i, 8) for i in range(3)] == rows
    share = replace(replay, share=0.25)
    # 6 new and 2 kept rows a batch: 34 batches.
    assert epoch_rows("replay", share, rows, 1, 8) == 200 + 34 * 2
    assert kept_rows(replace(replay, memory="reservoir", rows=120), rows[:2]) == 120
    assert kept_rows(replace(replay, fraction=0.015), rows[:2]) == 2 + 3
