"""The input side of weights and gradients against numpy.linalg.svd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.math.row_space import join_bases, residual_rows, right_singular, row_basis

SHAPES = [(20, 20), (40, 16), (12, 30)]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthonormal(size, count, seed=1):
    return np.linalg.qr(matrix((size, count), seed))[0]


def fp32(array):
    return torch.tensor(array, dtype=torch.float32)


def projector(columns):
    columns = np.asarray(columns, dtype=np.float64)
    return columns @ columns.T


@pytest.mark.parametrize("shape", SHAPES)
def test_right_singular_vectors(shape):
    given = matrix(shape)
    _, expected, right = np.linalg.svd(given, full_matrices=False)
    values, rows = right_singular(torch.tensor(given))
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    np.testing.assert_allclose(np.abs((rows.numpy() * right).sum(1)), 1.0, atol=1e-9)
    assert bool((rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all())
    turned = right_singular(torch.tensor(-given))[1]
    np.testing.assert_allclose(turned, rows, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_without_energy_are_left_out(shape):
    low = matrix((shape[0], 3)) @ matrix((3, shape[1]), 1)
    values, rows = right_singular(torch.tensor(low))
    assert len(values) == len(rows) == 3
    assert len(right_singular(torch.zeros(shape))[0]) == 0


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_basis_is_on_the_input_side(shape, share):
    given = matrix(shape)
    left, values, right = np.linalg.svd(given, full_matrices=False)
    count = int(np.argmax(np.cumsum(values**2) / (values**2).sum() >= share)) + 1
    basis = row_basis(fp32(given), share)
    assert basis.shape == (shape[1], count)
    np.testing.assert_allclose(projector(basis), right[:count].T @ right[:count], atol=1e-5)
    if shape[0] == shape[1]:  # control: the left vectors fit too, and span something else
        wrong = projector(left[:, :count])
        assert np.abs(projector(basis) - wrong).max() > 0.1


@pytest.mark.parametrize("shared", [0, 2, 5])
def test_joined_bases_span_both(shared):
    every = orthonormal(18, 11)
    first, second = every[:, :6], every[:, 6 - shared : 11]
    turned = second @ orthonormal(second.shape[1], second.shape[1], 2)
    joined = join_bases(fp32(first), fp32(turned))
    assert joined.shape == (18, 11)
    np.testing.assert_allclose(joined.T @ joined, np.eye(11), atol=1e-6)
    np.testing.assert_allclose(projector(joined), projector(every), atol=1e-5)


def test_joining_what_is_inside_or_absent():
    basis = fp32(orthonormal(9, 4))
    inside = basis @ fp32(orthonormal(4, 2))
    np.testing.assert_array_equal(join_bases(basis, inside), basis.double())
    np.testing.assert_array_equal(join_bases(None, basis), basis.double())
    np.testing.assert_array_equal(join_bases(basis, None), basis.double())
    assert join_bases(None, None) is None
    none = row_basis(torch.zeros(5, 9), 0.6)  # of a weight that starts at zero
    assert none.shape == (9, 0)
    np.testing.assert_array_equal(join_bases(basis, none), basis.double())
    np.testing.assert_allclose(projector(join_bases(none, basis)), projector(basis), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_rows_are_the_svd_of_the_residual(shape):
    gradient, basis = matrix(shape), orthonormal(shape[1], 6)
    outside = gradient @ (np.eye(shape[1]) - basis @ basis.T)
    _, _, right = np.linalg.svd(outside)
    a, count = residual_rows(fp32(gradient), fp32(basis), 4)
    assert a.shape == (4, shape[1])
    assert a.dtype == torch.float32
    assert count == 4
    np.testing.assert_allclose(np.abs((a.double().numpy() * right[:4]).sum(1)), 1.0, atol=1e-6)
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-5)
    assert float((a @ fp32(basis)).abs().max()) < 1e-5


def test_a_gradient_nearly_inside_the_basis_still_leaves_it_alone():
    basis = orthonormal(20, 8)
    gradient = 1e3 * matrix((16, 8), 3) @ basis.T + 1e-1 * matrix((16, 20), 4)
    a, count = residual_rows(fp32(gradient), fp32(basis), 5)
    assert count == 5
    assert float((a @ fp32(basis)).abs().max()) < 1e-5
    np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-5)


@pytest.mark.parametrize(("columns", "hosted"), [(13, 5), (15, 3), (18, 0)])
def test_rank_is_cut_where_no_room_is_left(columns, hosted):
    a, count = residual_rows(fp32(matrix((16, 18))), fp32(orthonormal(18, columns)), 5)
    assert count == hosted
    np.testing.assert_allclose(a @ a.T, np.diag([1.0] * hosted + [0.0] * (5 - hosted)), atol=1e-5)


def test_rank_is_cut_to_that_of_the_gradient():
    low = matrix((16, 2)) @ matrix((2, 18), 1)
    assert residual_rows(fp32(low), None, 5)[1] == 2
    assert residual_rows(torch.zeros(16, 18), None, 5)[1] == 0
    # A gradient inside the basis has nothing outside but fp32's rounding.
    basis = orthonormal(18, 6)
    inside = fp32(matrix((16, 6)) @ basis.T)
    assert residual_rows(inside, fp32(basis), 5)[1] == 0
