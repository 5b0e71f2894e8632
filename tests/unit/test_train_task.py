"""Schedules, seeds, batch arithmetic and the loss of the training loop."""

from __future__ import annotations

import math

import pytest
import torch

from accrete.pipeline.config.run import TrainConfig
from accrete.pipeline.errors import MethodError
from accrete.pipeline.stage import accumulation, batch_share, row_losses
from accrete.pipeline.train_task import _require_finite, _with_share, learning_rate, seed_step


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


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_broken_loss_stops_the_run_with_advice(loss):
    from types import SimpleNamespace

    with pytest.raises(MethodError, match="learning_rate"):
        _require_finite(loss, SimpleNamespace(name="x", index=1), 4)
