"""The bytes that `accrete plan` counts are those that real engines hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import Case, Launch
from plan_base import STAGES
from toys import base_model, make_config

from accrete.launch.forecast import memory
from accrete.launch.forecast.methods import MethodCost
from accrete.launch.forecast.rows import TaskRows
from accrete.launch.forecast.run import Forecaster
from accrete.launch.forecast.shapes import ModelPlan
from accrete.pipeline.methods.registry import method_class

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

BUCKET = 2000  # elements, as `toys.make_parts` sets it
WHOLE_BELOW = 100
LONGEST = (12, 5)  # tokens of a prompt and an answer, as `toys.ToyRows` draws them
CASES = {
    # Factors of one model, all weights of the other; once each: B alone, accumulation, one rank.
    2: [
        *(("sequential", "llama", z, 1) for z in STAGES),
        *(("full", "t5", z, 1) for z in STAGES),
        ("inf_lora", "llama", 2, 1),
        ("full", "llama", 1, 2),
        ("full", "llama", 2, 2),
    ],
    1: [*(("full", "llama", z, 1) for z in STAGES), ("sequential", "t5", 2, 1)],
}
ALL = [(world, *case) for world, found in CASES.items() for case in found]


def name_of(method: str, model: str, zero: int, accumulation: int) -> str:
    return f"held-{method}-{model}-zero{zero}-acc{accumulation}"


def cases(world: int) -> list[Case]:
    return [
        Case(
            name_of(method, model, zero, accumulation),
            "held",
            {
                "method": method,
                "model": model,
                "zero": zero,
                "micro": 8 // world // accumulation,
                "whole_below": WHOLE_BELOW if zero == 3 else None,
            },
        )
        for method, model, zero, accumulation in CASES[world]
    ]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """World size -> Launch."""
    made: dict[int, Launch] = {}

    def launch(world: int) -> Launch:
        if world not in made:
            root = tmp_path_factory.mktemp(f"forecast{world}")
            made[world] = Launch(world, cases(world), root / "out", 400.0)
        return made[world]

    return launch


def forecaster(method: str, model: str, world: int, accumulation: int) -> Forecaster:
    config = make_config(
        method_class(method).Config(), train={"micro_batch_size": 8 // world // accumulation}
    )
    config = replace(config, engine=replace(config.engine, bucket_elements=BUCKET))
    task = TaskRows(
        name="one",
        train=24,
        scored=1,
        prompt=8,
        answer=3,
        longest_prompt=LONGEST[0],
        longest_answer=LONGEST[1],
        padded_prompt=LONGEST[0],
        padded_answer=LONGEST[1],
    )
    return Forecaster(ModelPlan(config, base_model(model).config, "cpu"), [task], world)


@pytest.mark.parametrize(("world", "method", "model", "zero", "accumulation"), ALL)
def test_what_stays(held, monkeypatch, world, method, model, zero, accumulation):
    monkeypatch.setattr(memory, "WHOLE_BELOW", WHOLE_BELOW)
    found = held(world).result(name_of(method, model, zero, accumulation))
    plan = forecaster(method, model, world, accumulation)
    said = plan.memory(0, MethodCost())[zero]
    static = max(rank["static"] for rank in found)
    trained = max(rank["trained"] for rank in found)
    rules = memory._Held(plan.plan, zero, world, accumulation, 2)
    # At ZeRO 3 small frozen parameters are whole only from the first forward on: here they weigh.
    assert rules.static == pytest.approx(static, rel=0.03 if zero == 3 else 0.01)
    assert trained - static == pytest.approx(said.moments, rel=0.02, abs=2048)
    if method == "full":
        # Control: the rules of another stage, or of other ranks, do not fit.
        stage, ranks = (zero, 3) if zero else (1, world)
        wrong = memory._Held(plan.plan, stage, ranks, accumulation, 2).static
        assert wrong != pytest.approx(static, rel=0.05)


@pytest.mark.parametrize(("world", "method", "model", "zero", "accumulation"), ALL)
def test_the_highest_moment_of_a_step(held, monkeypatch, world, method, model, zero, accumulation):
    monkeypatch.setattr(memory, "WHOLE_BELOW", WHOLE_BELOW)
    found = held(world).result(name_of(method, model, zero, accumulation))
    said = forecaster(method, model, world, accumulation).memory(0, MethodCost())[zero]
    assert said.step == pytest.approx(max(rank["peak"] for rank in found), rel=0.15)
