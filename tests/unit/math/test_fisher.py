"""The penalty and the Fisher sums against autograd and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.distributed.comm import row_block
from accrete.pipeline.math import fisher


def problem(rows=24, columns=16, rank=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.rand(rows, columns, generator=g, dtype=dtype)
    a = torch.randn(rank, columns, generator=g, dtype=dtype)
    b = torch.randn(rows, rank, generator=g, dtype=dtype)
    return f, a, b


def autograd_penalty(f, a, b, scale, strength):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = strength / 2 * (f * (scale * b @ a).square()).sum()
    return (value.detach(), *torch.autograd.grad(value, (a, b)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_closed_form_equals_autograd(dtype, tolerance):
    f, a, b = problem(dtype=dtype)
    for got, expected in zip(
        fisher.penalty(f, a, b, 2.0, 3.7), autograd_penalty(f, a, b, 2.0, 3.7), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_blocks_of_rows_do_not_change_it(monkeypatch):
    f, a, b = problem()
    whole = fisher.penalty(f, a, b, 2.0, 3.7)
    monkeypatch.setattr(fisher, "BLOCK_ELEMENTS", 40)
    for got, expected in zip(fisher.penalty(f, a, b, 2.0, 3.7), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_euler_identity():
    f, a, b = problem()
    value, grad_a, grad_b = fisher.penalty(f, a, b, 2.0, 3.7)
    assert float((grad_a * a).sum() / (2 * value)) == pytest.approx(1, abs=1e-12)
    assert float((grad_b * b).sum() / (2 * value)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("world", [2, 3, 5, 8, 30])
def test_row_shards_sum_to_the_whole(world):
    f, a, b = problem()
    value, grad_a, grad_b = fisher.penalty(f, a, b, 2.0, 3.7)
    parts = []
    for rank in range(world):
        block = row_block(f.shape[0], rank, world)
        parts.append(fisher.penalty(f[block], a, b[block], 2.0, 3.7))
    torch.testing.assert_close(sum(p[0] for p in parts), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(p[1] for p in parts), grad_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), grad_b, rtol=1e-12, atol=1e-12)


def test_nothing_to_pay_at_the_start_of_a_task():
    f, a, b = problem()
    value, _, grad_b = fisher.penalty(f, a, torch.zeros_like(b), 2.0, 3.7)
    assert float(value) == 0
    assert not grad_b.any()


def test_squares_are_per_sequence():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, 3, generator=g)
    d = torch.randn(5, 7, 4, generator=g)
    total = torch.zeros(4, 3)
    fisher.add_squared_gradients(total, x, d)
    dense = np.einsum("nto,nti->noi", d.double().numpy(), x.double().numpy())
    np.testing.assert_allclose(total.numpy(), (dense**2).sum(0), rtol=1e-5)
    # Negative control: squaring the batch's sum is another number.
    assert not np.allclose(total.numpy(), dense.sum(0) ** 2, rtol=0.1)


def test_dense_gradient_sum():
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(5, 7, 3, generator=g), torch.randn(5, 7, 4, generator=g)
    total = torch.zeros(4, 3)
    fisher.add_gradients(total, x, d)
    np.testing.assert_allclose(
        total.numpy(), np.einsum("nto,nti->oi", d.numpy(), x.numpy()), rtol=1e-4, atol=1e-5
    )


def test_sequential_ewc_on_quadratics_reaches_the_joint_optimum():
    """With exact diagonal Fishers and lambda = gamma = 1, one after another equals all at once."""
    rng = np.random.default_rng(0)
    curvature = rng.random((4, 8)) + 0.1
    optimum = rng.normal(size=(4, 8))
    weight, accumulated = np.zeros(8), np.zeros(8)
    for h, w in zip(curvature, optimum, strict=True):
        # argmin of h (x - w)^2 / 2 + R(x - weight), by the gradient that `penalty` gives.
        delta = torch.zeros(8, 1, dtype=torch.float64)
        one = torch.ones(1, 1, dtype=torch.float64)
        f = torch.from_numpy(accumulated).view(8, 1)
        for _ in range(400):
            _, _, pull = fisher.penalty(f, one, delta, 1.0, 1.0)
            task = torch.from_numpy(h * (weight + delta.view(-1).numpy() - w)).view(8, 1)
            delta -= (task + pull) / torch.from_numpy(h + accumulated).view(8, 1)
        weight = weight + delta.view(-1).numpy()
        accumulated = accumulated + h
    joint = (curvature * optimum).sum(0) / curvature.sum(0)
    np.testing.assert_allclose(weight, joint, rtol=1e-10)
