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


def test_a_space_of_every_dimension_changes_nothing():
    projector = Projector.of(torch.diag(torch.arange(1.0, 9.0)), 1.0)
    assert projector.whole
    assert projector.basis.shape == (8, 0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projector.rows(x), x)
