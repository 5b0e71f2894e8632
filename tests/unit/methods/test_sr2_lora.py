"""SR2-LoRA: its term against an oracle of its own, its cache, its weights, its silence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))


from sr2_case import (
    MODELS,
    WIDTH,
    dense_model,
    matrices,
    move,
    oracle,
    originals,
    same_factors,
    second_stage,
    term_of,
    trained,
)

from accrete.pipeline.methods import sr2_lora
from accrete.pipeline.models.lora import initial_factors
from accrete.pipeline.records import Recorder
from accrete.pipeline.train_task import train_task


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradient_equal_the_oracle(kind, faithful, tmp_path):
    settings = {"faithful": True} if faithful else {"mu": 3.0}
    method, stage = second_stage(tmp_path, kind, settings=settings)
    past = stage.past.stages[0]
    method.on_task_start(stage)
    move(stage)
    mu, divisor = (1.0, 1.0) if faithful else (3.0, float(WIDTH))
    for step, count in ((0, 8), (2, 5)):  # the last step of an epoch is short
        value, gradient = term_of(method, stage, step)
        rows = stage.global_batch(step)
        assert len(rows) == count
        expected, slope = oracle(kind, rows, originals(kind), past, stage.factors(), divisor)
        assert value == pytest.approx(mu * expected, rel=1e-4)
        assert float((gradient - mu * slope).norm() / (mu * slope).norm()) < 1e-4
        assert float(slope.norm()) > 1e-4


@pytest.mark.parametrize("kind", MODELS)
def test_cached_spectra_are_the_previous_models(kind, tmp_path):
    """Against a dense model that holds what the first task learned and nothing else."""
    method, stage = second_stage(tmp_path, kind)
    method.on_task_start(stage)
    run = dense_model(kind, originals(kind), stage.past.stages[0])
    rows = stage.rows.all
    got = method.cache.of(rows)
    for row, values in zip(rows, got, strict=True):
        found = matrices(run, kind, row, torch.ones(WIDTH), 1e-6, WIDTH)
        expected = [np.linalg.svd(m.detach().numpy())[1][::-1] for m in found]
        np.testing.assert_allclose(values.numpy(), np.concatenate(expected), rtol=1e-5, atol=1e-5)
    # Control: the untrained model has others.
    untrained = dense_model(kind, originals(kind))
    other = matrices(untrained, kind, rows[0], torch.ones(WIDTH), 1e-6, WIDTH)
    change = np.linalg.svd(other[-1].detach().numpy())[1][::-1] - got[0, -2:].numpy()
    assert np.abs(change).max() > 1e-4


# -- the start of a task, the first task, no weight -----------------------------------------------


@pytest.mark.parametrize("cache", ["always", "never"])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_pulls_at_the_start_of_a_task(kind, cache, tmp_path):
    method, stage = second_stage(tmp_path, kind, micro=3, settings={"cache": cache})
    method.on_task_start(stage)
    for step in range(3):
        value, gradient = term_of(method, stage, step)
        assert abs(value) < 1e-6
        assert float(gradient.abs().max()) < 1e-6
    move(stage)  # control
    value, gradient = term_of(method, stage)
    assert value > 1e-3
    assert float(gradient.abs().max()) > 1e-3


def test_first_task_is_plain_incremental_lora(tmp_path):
    got, _, parts = trained(tmp_path / "a", settings={"mu": 20.0})
    plain, _, _ = trained(tmp_path / "b", method="inc_lora")
    assert same_factors(got[:1], plain[:1])
    assert not same_factors(got[1:], plain[1:])
    assert parts.method.cache is None


def test_no_weight_is_plain_incremental_lora(tmp_path):
    got, events, _ = trained(tmp_path / "a", settings={"mu": 0.0})
    plain, _, _ = trained(tmp_path / "b", method="inc_lora")
    assert same_factors(got, plain)
    assert not any("penalty" in event or "cache_bytes" in event for event in events)


def test_spectra_stay_closer_with_it(tmp_path):
    """What the method is for, on its own measure: how far spectra move in the second task."""

    def moved(mu, folder):
        method, stage = second_stage(folder, settings={"mu": mu}, train={"learning_rate": 3e-2})
        method.on_task_start(stage)
        train_task(stage, method, Recorder(None))
        live = stage.factors()
        stage.write_factors(initial_factors(stage.adapted, 3, 1))
        probe = sr2_lora.Sr2Lora(sr2_lora.Sr2LoraConfig())
        probe.on_task_start(stage)
        stage.write_factors(live)
        return sum(term_of(probe, stage, step)[0] for step in range(3))

    assert moved(100.0, tmp_path / "held") < 0.2 * moved(1e-9, tmp_path / "free")


# -- the cache ------------------------------------------------------------------------------------
