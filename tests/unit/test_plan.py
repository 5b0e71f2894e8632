"""`accrete plan`: steps, tokens and rows by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from accrete.launch.plan import flatten, origin_of, plan_json, plan_stages, plan_view
from accrete.launch.prepare import Prepared
from accrete.pipeline.config.run import EvalConfig, RunConfig, TrainConfig
from accrete.pipeline.data.config import TaskConfig
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.methods.base import MethodConfig
from accrete.pipeline.models.config import ModelConfig


def handle(name: str, rows: int, scored: int, warnings: tuple[str, ...] = ()) -> TaskHandle:
    split = SplitStats(
        rows=rows,
        truncated_pct=12.5,
        mean_prompt_tokens=10.0,
        max_prompt_tokens=12,
        mean_answer_tokens=2.5,
        max_answer_tokens=3,
    )
    return TaskHandle(
        name=name,
        metric="exact_match",
        labels=None,
        train_dir="",
        eval_dir="",
        num_train=rows,
        num_eval=scored,
        streamed=False,
        stats=TaskStats(train=split, eval=split, warnings=warnings),
        fingerprint="",
    )


def prepared(*tasks: TaskHandle) -> Prepared:
    return Prepared(
        device="cpu", procs=2, model_path="m", tokenizer_path="m", seq2seq=True, tasks=list(tasks)
    )


def config(train: TrainConfig, *tasks: TaskConfig, transfer: bool = False) -> RunConfig:
    return RunConfig(
        name="x",
        tasks=list(tasks),
        model=ModelConfig(builder="tiny_t5"),
        method=MethodConfig(kind="sequential"),
        train=train,
        eval=EvalConfig(forward_transfer=transfer),
    )


A, B = TaskConfig(name="a"), TaskConfig(name="b")


def test_epochs_steps_and_tokens() -> None:
    run = config(
        TrainConfig(global_batch_size=8, epochs=2), A, replace(B, max_steps=2), transfer=False
    )
    first, second = plan_stages(run, prepared(handle("a", 20, 5), handle("b", 100, 7)))
    # Batches of 8, 8, 4, twice: 40 rows of 12.5 tokens.
    assert (first.steps, first.epochs, first.train_tokens) == (6, 2.0, 500)
    assert (second.steps, second.epochs, second.train_tokens) == (2, 0.16, 200)
    assert (first.scored_rows, second.scored_rows) == (5, 12)


@pytest.mark.parametrize(("limit", "steps"), [(None, 6), (4, 4), (9, 6)])
def test_a_task_s_own_epochs_end_at_the_recipe_s_steps(limit: int | None, steps: int) -> None:
    train = TrainConfig(global_batch_size=8, max_steps=limit)
    run = config(train, replace(A, epochs=2), transfer=False)
    assert plan_stages(run, prepared(handle("a", 20, 5)))[0].steps == steps


@pytest.mark.parametrize(
    ("max_steps", "rows"), [(1, 8), (2, 16), (3, 20), (4, 28), (6, 40), (7, 48)]
)
def test_a_short_last_batch_counts_as_what_it_is(max_steps: int, rows: int) -> None:
    run = config(TrainConfig(global_batch_size=8, max_steps=max_steps), A)
    [stage] = plan_stages(run, prepared(handle("a", 20, 5)))
    assert (stage.steps, stage.epochs) == (max_steps, rows / 20)


def test_totals_with_forward_transfer() -> None:
    run = config(TrainConfig(global_batch_size=10), A, B, transfer=True)
    plan = plan_json(run, {}, {}, prepared(handle("a", 20, 5), handle("b", 100, 7)))
    # Untrained: b. After a: a and b. After b: a and b.
    assert plan["scored_rows"] == 7 + 12 + 12
    assert plan["steps"] == 12
    assert plan["train_tokens"] == 1500


def test_values_are_shown_with_their_origin() -> None:
    settings: dict[str, Any] = {
        "seed": 3,
        "tasks": [{"name": "a", "max_steps": None}],
        "adapter": {"targets": ["q", "v"], "rank": 8},
        "data": {"root": None, "streaming": False},
    }
    origins = {"seed": "override", "tasks.0.name": "x.yaml:4", "adapter.rank": "x.yaml:9"}
    run = config(TrainConfig(), A)
    plan = plan_json(
        run, settings, origins, prepared(handle("a", 20, 5, ("label `c` has no row",)))
    )
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(plan_view(plan))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["seed", "3", "override"] in lines
    assert ["tasks.0.name", "a", "x.yaml:4"] in lines
    assert ["adapter.targets", "[q,", "v]", "default"] in lines
    assert ["data.root", "null", "default"] in lines
    assert ["data.streaming", "false", "default"] in lines
    # What tasks do not say themselves would drown the rest.
    assert "tasks.0.max_steps" not in out.getvalue()
    assert "warning: a: label `c` has no row" in out.getvalue()
    assert "1 steps, about 250 training tokens, 5 rows to score, 2 processes on cpu" in (
        out.getvalue()
    )


def test_flatten_and_origins() -> None:
    leaves = flatten({"a": {"b": 1, "c": {}}, "d": [[1], [2]], "e": []})
    assert leaves == [("a.b", 1), ("a.c", {}), ("d.0", [1]), ("d.1", [2]), ("e", [])]
    assert origin_of("a.b.c", {"a": "x:1"}) == "x:1"
    assert origin_of("a.b", {"ab": "x:1"}) == "default"
