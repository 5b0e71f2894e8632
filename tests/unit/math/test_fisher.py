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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 7, 8, 30])
def test_row_shards_sum_to_the_whole(world, dtype, tolerance):
    f, a, b = problem(dtype=dtype)
    value, grad_a, grad_b = fisher.penalty(f, a, b, 2.0, 3.7)
    parts = []
    for rank in range(world):
        block = row_block(f.shape[0], rank, world)
        parts.append(fisher.penalty(f[block], a, b[block], 2.0, 3.7))
    sums = (sum(p[0] for p in parts), sum(p[1] for p in parts), torch.cat([p[2] for p in parts]))
    for got, expected in zip(sums, (value, grad_a, grad_b), strict=True):
        assert got.dtype == dtype
        assert float((got - expected).norm() / expected.norm()) <= tolerance


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("add", [fisher.add_squared_gradients, fisher.add_gradients])
def test_sums_ignore_batches_and_order(add, dtype, tolerance):
    g = torch.Generator().manual_seed(2)
    x, d = (torch.randn(12, 7, n, generator=g, dtype=torch.float64) for n in (3, 4))
    dense = np.einsum("nto,nti->noi", d.numpy(), x.numpy())
    expected = (dense if add is fisher.add_gradients else dense**2).sum(0)
    for size, order in ((12, slice(None)), (5, slice(None)), (1, torch.randperm(12, generator=g))):
        total = torch.zeros(4, 3, dtype=dtype)
        for xs, ds in zip(x[order].split(size), d[order].split(size), strict=True):
            add(total, xs, ds)
        error = np.linalg.norm(total.numpy() - expected) / np.linalg.norm(expected)
        assert error <= tolerance


def test_dense_gradient_sum():
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(5, 7, 3, generator=g), torch.randn(5, 7, 4, generator=g)
    total = torch.zeros(4, 3)
    fisher.add_gradients(total, x, d)
    np.testing.assert_allclose(
        total.numpy(), np.einsum("nto,nti->oi", d.numpy(), x.numpy()), rtol=1e-4, atol=1e-5
    )


def settle(weight, curvature, optimum, accumulated, strength=1.0):
    """argmin of h (w - w*)^2 / 2 + R(w - weight), by the gradient that `penalty` gives."""
    delta = torch.zeros(len(weight), 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    f = torch.from_numpy(accumulated).view(-1, 1)
    step = 1.5 / torch.from_numpy(curvature + strength * accumulated).view(-1, 1)
    for _ in range(200):
        _, _, pull = fisher.penalty(f, one, delta, 1.0, strength)
        task = torch.from_numpy(curvature * (weight + delta.view(-1).numpy() - optimum))
        delta -= step * (task.view(-1, 1) + pull)
    return weight + delta.view(-1).numpy()


def test_sequential_ewc_on_quadratics_stays_at_the_joint_optimum():
    """With exact diagonal Fishers and lambda = gamma = 1, one after another equals all at once."""
    rng = np.random.default_rng(0)
    curvature = rng.random((4, 8)) + 0.1
    optimum = rng.normal(size=(4, 8))
    weight, accumulated = np.zeros(8), np.zeros(8)
    for done, (h, w) in enumerate(zip(curvature, optimum, strict=True), start=1):
        weight = settle(weight, h, w, accumulated)
        accumulated = accumulated + h
        joint = (curvature * optimum)[:done].sum(0) / curvature[:done].sum(0)
        np.testing.assert_allclose(weight, joint, rtol=1e-10)
    # Control: without the first task's Fisher it ends elsewhere.
    lost = settle(joint, curvature[0], optimum[0], curvature[3])
    assert not np.allclose(lost, joint, rtol=1e-2)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_forgetting_of_two_quadratic_tasks(strength):
    """L1(w_2) - L1(w_1) = 1/2 sum h1 ((h2 / (h2 + lambda h1)) (w2* - w1*))^2."""
    rng = np.random.default_rng(1)
    h1, h2 = rng.random((2, 8)) + 0.1
    w1, w2 = rng.normal(size=(2, 8))
    first = settle(np.zeros(8), h1, w1, np.zeros(8))
    second = settle(first, h2, w2, h1, strength)
    lost = 0.5 * (h1 * (second - w1) ** 2).sum() - 0.5 * (h1 * (first - w1) ** 2).sum()
    expected = 0.5 * (h1 * (h2 / (h2 + strength * h1) * (w2 - w1)) ** 2).sum()
    assert lost == pytest.approx(expected, rel=1e-8)
