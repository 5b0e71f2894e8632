"""EWC-LoRA's estimators on gradients that are made up, so that their moments are known."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods import fisher_memory
from accrete.pipeline.methods.ewc_lora import EwcLoraConfig
from accrete.pipeline.methods.fisher_memory import DenseFisher
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
ROWS, COLUMNS, TOKENS = 6, 5, 4


def made_up(monkeypatch, x, g, batch, settings):
    """F of one layer from given x [n, T, d_in], g [n, T, d_out], shown in batches."""
    layer = SimpleNamespace(
        name="w",
        module=SimpleNamespace(base_layer=SimpleNamespace(out_features=ROWS, in_features=COLUMNS)),
    )

    def visit_made_up(stage, visit, *, token_mean, max_rows, after_batch=None):
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            visit(layer, x[part], g[part])
            if after_batch is not None:
                after_batch(len(x[part]))
        return len(x)

    monkeypatch.setattr(fisher_memory, "visit_gradients", visit_made_up)
    memory = DenseFisher(EwcLoraConfig(**settings), 0, 1, torch.device("cpu"))
    engine = SimpleNamespace(device=torch.device("cpu"), world=1)
    memory.measure(SimpleNamespace(engine=engine, adapted=SimpleNamespace(layers={"w": layer})))
    return memory.kept["fisher/w"].double()


def draw(count, seed=0):
    """Sequences whose gradients have a mean that is not zero; no two rows of W are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, TOKENS, COLUMNS, generator=generator) + 0.5
    g = torch.randn(count, TOKENS, ROWS, generator=generator) + 0.3
    return x, g * torch.linspace(0.7, 1.3, ROWS)


def test_per_sequence_ignores_batches_and_order(monkeypatch):
    x, g = draw(60)
    expected = torch.einsum("nto,nti->noi", g.double(), x.double()).square().mean(0)
    turn = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for batch, order in ((60, slice(None)), (7, slice(None)), (1, turn), (16, turn)):
        got = made_up(monkeypatch, x[order], g[order], batch, {})
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("batch", [4, 16])
def test_per_batch_has_the_expected_scale(monkeypatch, batch):
    """E F = mu^2 + var / b; 16 batches at a time, averaged over draws."""
    x, g = draw(200_000, seed=2)
    gradients = torch.einsum("nto,nti->noi", g.double(), x.double())
    expected = gradients.mean(0).square() + gradients.var(0) / batch
    found = [
        made_up(monkeypatch, *draw(16 * batch, seed=10 + n), batch, {"fisher": "per_batch"})
        for n in range(40)
    ]
    error = torch.stack(found).mean(0) - expected
    assert float(error.norm() / expected.norm()) <= 0.1
    # Control: the true Fisher is another number.
    assert float(made_up(monkeypatch, x[:2000], g[:2000], batch, {}).sum() / expected.sum()) > 1.5


@pytest.mark.parametrize("batch", [8, 21, 1])
def test_per_batch_is_the_mean_of_squared_batch_means(monkeypatch, batch):
    """Weighted by the rows of each batch, of which the last is shorter."""
    x, g = draw(21)
    gradients = torch.einsum("nto,nti->noi", g.double(), x.double())
    expected = sum(len(part) * part.mean(0).square() for part in gradients.split(batch)) / 21
    got = made_up(monkeypatch, x, g, batch, {"fisher": "per_batch"})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # Control: batches that count alike, however short, give another number.
    parts = gradients.split(batch)
    alike = sum(part.mean(0).square() for part in parts) / len(parts)
    assert batch != 8 or float((alike - expected).norm() / expected.norm()) > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_per_batch_ignores_micro_batches(model, tmp_path):
    found = []
    for micro in (8, 2):
        parts = toys.make_parts(
            ALONE,
            tmp_path / str(micro),
            model=model,
            method="ewc_lora",
            settings={"fisher": "per_batch"},
            zero=None,
            micro=micro,
        )
        parts.method.on_task_end(StageRunner(parts)._stage(0))
        found.append(parts.method.state_dict())
    for name, value in found[0].items():
        assert float((found[1][name] - value).norm() / value.norm()) <= 1e-5
