"""The projector's basis has the shape that every rank expects of it."""

from __future__ import annotations

import math

import pytest
import torch

from accrete.pipeline.math.projector import Projector


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.6, 0.9, 1.0])
def test_the_basis_has_the_announced_shape(share):
    """A rank that receives it makes room by `layout`. All eigenvalues are equal here."""
    projector = Projector.of(torch.eye(16), share)
    count, keeps = Projector.layout(16, projector.size)
    assert projector.basis.shape == (16, count)
    assert projector.keeps == keeps
    assert projector.size == max(1, math.ceil(16 * share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_whole_energy_is_the_whole_space(dtype):
    """Also of fewer tokens than dimensions, whose covariance has 24 directions without any."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1), dtype=dtype)
    projector = Projector.of(x.T @ x, 1.0)
    assert projector.whole
    count, keeps = Projector.layout(64, projector.size)
    assert (projector.basis.shape, projector.keeps) == ((64, count), keeps)
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(projector.rows(rows), rows)
    # Control: any smaller share has the directions of the tokens alone.
    almost = Projector.of(x.T @ x, 1 - 1e-6)
    assert almost.size <= 40
    assert (almost.rows(rows) - rows).norm() > 0.3 * rows.norm()


def test_a_space_of_every_dimension_changes_nothing():
    projector = Projector.of(torch.diag(torch.arange(1.0, 9.0)), 1.0)
    assert projector.whole
    assert projector.basis.shape == (8, 0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projector.rows(x), x)
