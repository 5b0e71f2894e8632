"""Schedules, seeds, batch arithmetic and the loss of the training loop."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.launch.api import RESUMABLE
from accrete.launch.branch import FIXED
from accrete.pipeline.config.run import TrainConfig
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import MethodError
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.sequential import SequentialConfig
from accrete.pipeline.records import read_events
from accrete.pipeline.stage import accumulation, batch_share, row_losses
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.train_task import (
    MAX_STEP_SUMS,
    _require_finite,
    _with_share,
    learning_rate,
    seed_step,
)


def rates(steps=10, **settings):
    config = TrainConfig(learning_rate=2.0, **settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_constant():
    assert rates(schedule="constant") == [2.0] * 10


def test_warm_up_then_linear():
    got = rates(schedule="linear", warmup_steps=4)
    assert got[:4] == [0.5, 1.0, 1.5, 2.0]
    assert got[4:] == pytest.approx([2.0 * (1 - k / 6) for k in range(6)])


def test_cosine():
    expected = [1 + math.cos(math.pi * k / 10) for k in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected)


def test_warm_up_longer_than_the_task():
    assert rates(steps=3, warmup_steps=4) == [0.5, 1.0, 1.5]


def test_seeds_differ_by_position_and_rank_and_repeat():
    def draw(*place):
        seed_step(*place)
        return torch.rand(3).tolist()

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [draw(*place) for place in places]
    assert len({tuple(values) for values in drawn}) == len(places)
    assert drawn == [draw(*place) for place in places]


@pytest.mark.parametrize("batch", [1, 7, 8, 33])
@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_every_row_of_a_batch_has_a_place(batch, micro, world):
    count = accumulation(batch, micro, world)
    size = -(-batch_share(batch, world) // count)
    assert size <= micro
    for rank in range(world):
        mine = list(range(batch))[rank::world]
        assert len(mine) <= size * count


def test_row_losses_against_a_hand_computation():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, -100], [-100, -100, -100, -100], [-100, 0, 3, 4]])
    log_p = logits.log_softmax(-1)
    expected = [
        -(log_p[0, 0, 1] + log_p[0, 1, 2]),
        torch.tensor(0.0),
        -(log_p[2, 1, 0] + log_p[2, 2, 3] + log_p[2, 3, 4]),
    ]
    torch.testing.assert_close(row_losses(logits, labels), torch.stack(expected))


def test_share_of_the_penalty():
    sums = {"penalty": 1.0, "penalty_norm": 3.0, "task_norm": 1.0}
    assert _with_share(sums) == {"penalty": 1.0, "penalty_share": 0.75}
    assert _with_share({"penalty": 0.0, "penalty_norm": 0.0, "task_norm": 0.0}) == {
        "penalty": 0.0,
        "penalty_share": 0.0,
    }
    assert _with_share({}) == {}


class Poisoned(Method):
    """Adds a term, or a gradient, that is no number in the second step."""

    Config = SequentialConfig
    how: ClassVar[str]

    def loss_terms(self, stage, batch, logits):
        broken = math.nan if self.how == "term" and stage.step == 1 else 1.0
        return {"one": logits.square().mean() * broken}

    def after_backward(self, stage):
        if self.how == "gradient" and stage.step == 1:
            for name in stage.engine.parameters:
                stage.engine.write_gradient(name, stage.engine.gradient(name) * math.nan)


@pytest.mark.parametrize(("how", "what"), [("term", "method's terms"), ("gradient", "gradient")])
def test_what_is_no_number_stops_the_run_before_a_weight_moves(tmp_path, monkeypatch, how, what):
    monkeypatch.setattr(Poisoned, "how", how, raising=False)
    monkeypatch.setattr(toys, "method_class", lambda kind: Poisoned)
    alone = Ranks(0, 1, torch.device("cpu"))
    parts = toys.make_parts(alone, tmp_path, model="llama_short", zero=None, micro=4, rows=24)
    runner = StageRunner(parts)
    with pytest.raises(MethodError, match=what):
        runner.run()
    parts.recorder.close()
    assert all(bool(value.isfinite().all()) for value in parts.engine.parameters.values())
    assert all(bool(value.detach().any()) for value in parts.engine.parameters.values())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        (0, r"in a new run;"),
        (1, r"`accrete branch RUN --from-stage 0 train\.learning_rate=\.\.\.`"),
        (4, r"`accrete branch RUN --from-stage 3 train\.learning_rate=\.\.\.`"),
    ],
)
def test_a_broken_loss_stops_the_run_with_advice(loss, stage, advice):
    with pytest.raises(MethodError, match=advice) as caught:
        _require_finite(loss, SimpleNamespace(name="x", index=stage), 4)
    # What is advised can be done: a branch takes it, a resume does not.
    assert "train.learning_rate" in str(caught.value)
    assert "train" not in RESUMABLE
    assert "train" not in FIXED


class Counting(Method):
    """Gives so many sums a step."""

    Config = SequentialConfig
    count: ClassVar[int]

    def step_sums(self):
        return {f"sum{number}": torch.tensor(number + 0.5) for number in range(self.count)}


@pytest.mark.parametrize("count", [MAX_STEP_SUMS, MAX_STEP_SUMS + 1, MAX_STEP_SUMS + 2])
def test_more_sums_than_a_step_has_room_for_are_refused(tmp_path, monkeypatch, count):
    monkeypatch.setattr(Counting, "count", count, raising=False)
    monkeypatch.setattr(toys, "method_class", lambda kind: Counting)
    alone = Ranks(0, 1, torch.device("cpu"))
    parts = toys.make_parts(alone, tmp_path, model="llama_short", zero=None, micro=4, rows=8)
    if count > MAX_STEP_SUMS:
        with pytest.raises(MethodError, match=rf"method sequential: step_sums gives {count} sums"):
            StageRunner(parts).run()
        return
    StageRunner(parts).run()
    parts.recorder.close()
    steps = [e for e in read_events(parts.run.events) if e["event"] == "step"]
    assert len(steps) == 2
    for step in steps:
        assert [step[f"sum{number}"] for number in range(count)] == [n + 0.5 for n in range(count)]
