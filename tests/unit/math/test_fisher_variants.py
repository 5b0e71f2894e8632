"""Fishers of the factors and of rank one, against autograd and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.distributed.comm import row_block
from accrete.pipeline.math import fisher, fisher_variants

SCALE, STRENGTH = 2.0, 3.7


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    u = torch.rand(24, generator=g, dtype=dtype)
    v = torch.rand(16, generator=g, dtype=dtype)
    a = torch.randn(4, 16, generator=g, dtype=dtype)
    b = torch.randn(24, 4, generator=g, dtype=dtype)
    return u, v, a, b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_rank1_penalty_equals_autograd_with_the_dense_fisher(dtype, tolerance):
    u, v, a, b = problem(dtype)
    got = fisher_variants.rank1_penalty(u, v, a, b, SCALE, STRENGTH)
    live_a, live_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = STRENGTH / 2 * (u[:, None] * v * (SCALE * live_b @ live_a).square()).sum()
    expected = (value.detach(), *torch.autograd.grad(value, (live_a, live_b)))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.norm()))
    # And what the dense closed form gives for this F.
    for one, other in zip(
        got, fisher.penalty(torch.outer(u, v), a, b, SCALE, STRENGTH), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.norm()))


def test_rank1_euler_identity():
    u, v, a, b = problem()
    value, grad_a, grad_b = fisher_variants.rank1_penalty(u, v, a, b, SCALE, STRENGTH)
    assert float((grad_a * a).sum() / (2 * value)) == pytest.approx(1, abs=1e-12)
    assert float((grad_b * b).sum() / (2 * value)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 7, 8, 30])
def test_rank1_row_shards_sum_to_the_whole(world, dtype, tolerance):
    u, v, a, b = problem(dtype)
    whole = fisher_variants.rank1_penalty(u, v, a, b, SCALE, STRENGTH)
    blocks = [row_block(len(u), rank, world) for rank in range(world)]
    parts = [
        fisher_variants.rank1_penalty(u[block], v, a, b[block], SCALE, STRENGTH) for block in blocks
    ]
    sums = (sum(p[0] for p in parts), sum(p[1] for p in parts), torch.cat([p[2] for p in parts]))
    for got, expected in zip(sums, whole, strict=True):
        assert got.dtype == dtype
        assert float((got - expected).norm() / expected.norm()) <= tolerance


def test_nothing_to_pay_at_the_start_of_a_task():
    u, v, a, b = problem()
    value, _, grad_b = fisher_variants.rank1_penalty(u, v, a, torch.zeros_like(b), 2.0, 3.7)
    assert float(value) == 0
    assert not grad_b.any()
    value, gradient = fisher_variants.diagonal_penalty(u, torch.zeros_like(u), 3.7)
    assert float(value) == 0
    assert not gradient.any()


def test_diagonal_penalty_equals_autograd():
    u, v, _, _ = problem()
    moved = torch.cat([v, v[:8]]).requires_grad_()
    value = STRENGTH / 2 * (u * moved.square()).sum()
    got = fisher_variants.diagonal_penalty(u, moved.detach(), STRENGTH)
    torch.testing.assert_close(got[0], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], torch.autograd.grad(value, moved)[0], rtol=1e-12, atol=0)


def sequences():
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(5, 7, 16, generator=g), torch.randn(5, 7, 24, generator=g)
    dense = np.einsum("nto,nti->noi", d.double().numpy(), x.double().numpy())
    return x, d, dense


def test_factor_squares_are_per_sequence():
    x, d, dense = sequences()
    _, _, a, b = problem(torch.float32)
    of_a, of_b = torch.zeros_like(a), torch.zeros_like(b)
    fisher_variants.add_factor_squares(of_a, of_b, x, d, a, b, SCALE)
    grad_a = SCALE * np.einsum("or,noi->nri", b.double().numpy(), dense)
    grad_b = SCALE * np.einsum("noi,ri->nor", dense, a.double().numpy())
    np.testing.assert_allclose(of_a.numpy(), (grad_a**2).sum(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_b.numpy(), (grad_b**2).sum(0), rtol=1e-4, atol=1e-3)
    # Negative control: squaring the batch's sum is another number.
    assert not np.allclose(of_b.numpy(), grad_b.sum(0) ** 2, rtol=0.1)


@pytest.mark.parametrize("block", [1 << 22, 50])
def test_margins_are_those_of_the_dense_squares(monkeypatch, block):
    monkeypatch.setattr(fisher_variants, "BLOCK_ELEMENTS", block)
    x, d, dense = sequences()
    rows, columns = torch.zeros(24), torch.zeros(16)
    fisher_variants.add_squared_margins(rows, columns, x, d)
    squares = (dense**2).sum(0)
    np.testing.assert_allclose(rows.numpy(), squares.sum(1), rtol=1e-5)
    np.testing.assert_allclose(columns.numpy(), squares.sum(0), rtol=1e-5)
    # Negative control: E[g^2] E[x^2]^T loses the products of different tokens.
    lost = (d.double().numpy() ** 2).sum((0, 1)) * (x.double().numpy() ** 2).sum(2).mean()
    assert not np.allclose(lost, squares.sum(1), rtol=0.01)
