"""Principal subspaces against NumPy: how many directions, which, and what growing one keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.math import subspace
from accrete.pipeline.math.subspace import (
    add_outer,
    eigenpairs,
    grow_basis,
    principal_basis,
    rank_for,
    residual,
)

SIZE = 24


def inputs(seed, rows=300, size=SIZE, decay=5.0):
    """[rows, size] with a falling spectrum, its directions turned at random."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return rng.normal(size=(rows, size)) * np.exp(-np.arange(size) / decay) @ turn


def covariance(x):
    return torch.tensor(x.T @ x / len(x), dtype=torch.float32)


def held(basis, x):
    """Share of the squared length of the rows that lies in the basis's span, in NumPy."""
    inside = x @ np.asarray(basis, dtype=np.float64)
    return float((inside**2).sum() / (x**2).sum())


def projector(basis):
    wide = np.asarray(basis, dtype=np.float64)
    return wide @ wide.T


# -- how many ------------------------------------------------------------------------------------


def smallest_count(values, share, kept):
    """The definition, one value after another."""
    energies = [float(value) for value in values]
    total = kept + sum(energies)
    reached = kept
    for count, energy in enumerate(energies):
        if reached >= share * total:
            return count
        reached += energy
    return len(energies)


@pytest.mark.parametrize("kept", [0.0, 0.7, 50.0])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99, 0.999])
def test_rank_for_counts_like_a_loop(kept, share):
    for seed in range(20):
        values = np.sort(np.random.default_rng(seed).gamma(0.3, size=17))[::-1].copy()
        got = rank_for(torch.tensor(values), share, kept)
        assert got == smallest_count(values, share, kept)


def test_rank_for_at_its_ends():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert rank_for(values, 0.4) == 1  # exactly reached: not one more
    assert rank_for(values, 0.4 + 1e-6) == 2
    assert rank_for(values, 1.0) == 4
    assert rank_for(values, 0.5, kept=10.0) == 0
    assert rank_for(torch.tensor([5.0, 0.0, 0.0]), 1.0) == 1
    assert rank_for(torch.zeros(3), 0.9) == 0


# -- which ---------------------------------------------------------------------------------------


def test_add_outer_sums_over_calls():
    x = torch.tensor(inputs(0), dtype=torch.float32)
    total = torch.zeros(SIZE, SIZE)
    for part in x.split(37):
        add_outer(total, part)
    wide = x.double().numpy()
    np.testing.assert_allclose(total.numpy(), wide.T @ wide, rtol=1e-5, atol=1e-4)


def test_eigenpairs_rebuild_the_matrix_with_fixed_signs():
    matrix = covariance(inputs(1))
    values, vectors = eigenpairs(matrix)
    assert bool((values[:-1] >= values[1:]).all())
    assert float(values.min()) >= 0
    np.testing.assert_allclose(vectors @ torch.diag(values) @ vectors.T, matrix, atol=1e-6)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("rows", [5, 300])
def test_principal_basis_is_that_of_the_features(share, rows):
    """Eigenvectors of X^T X are the singular vectors of X on the input side."""
    x = inputs(2, rows)
    _, singular, right = np.linalg.svd(x, full_matrices=False)
    shares = np.cumsum(singular**2) / (singular**2).sum()
    count = int(np.argmax(shares >= share)) + 1
    basis = principal_basis(covariance(x), share)
    assert basis.shape == (SIZE, count)
    np.testing.assert_allclose(projector(basis), right[:count].T @ right[:count], atol=1e-5)


def test_averaging_inputs_position_by_position_finds_the_mean_alone():
    """Control for a reference's memory: a running mean of X over batches is no covariance.

    Its first direction is the mean activation and holds nearly all its energy, whatever the inputs.
    """
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 32, SIZE)) * np.linspace(1, 3, SIZE) + 0.5
    mean = x.mean((0, 1)) / np.linalg.norm(x.mean((0, 1)))

    def first(matrix):
        values, vectors = eigenpairs(torch.tensor(matrix, dtype=torch.float32))
        return float(values[0] / values.sum()), abs(float(vectors[:, 0].double() @ mean))

    averaged = x.mean(0)
    share, cosine = first(averaged.T @ averaged)
    assert share > 0.9
    assert cosine > 0.99
    flat = x.reshape(-1, SIZE)
    share, cosine = first(flat.T @ flat)
    assert share < 0.25
    assert cosine < 0.9


# -- growing one ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("double_below", "tolerance", "size"), [(2048, 1e-6, 24), (0, 1e-5, 24), (0, 1e-5, 256)]
)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_growing_keeps_the_old_and_reaches_the_share(
    monkeypatch, share, size, double_below, tolerance
):
    """Also where decompositions are made in fp32, as they are of large layers."""
    monkeypatch.setattr(subspace, "_DOUBLE_BELOW", double_below)
    basis = None
    for seed in range(4):
        x = inputs(10 + seed, size=size, decay=size / 5)
        old = basis
        basis = grow_basis(old, covariance(x), share)
        count = 0 if old is None else old.shape[1]
        if old is not None:
            assert torch.equal(basis[:, :count], old)
        assert count <= basis.shape[1] <= size
        gram = basis.double().T @ basis.double()
        assert float((gram - torch.eye(basis.shape[1])).abs().max()) < 1e-5
        assert held(basis, x) >= share - tolerance
        if basis.shape[1] > count:  # with one direction less it would not
            assert held(basis[:, :-1], x) < share


def test_new_directions_are_the_leading_ones_of_the_residual():
    old = grow_basis(None, covariance(inputs(20)), 0.9)
    x = inputs(21)
    outside = x - x @ projector(old)
    _, _, right = np.linalg.svd(outside, full_matrices=False)
    basis = grow_basis(old, covariance(x), 0.95)
    added = basis.shape[1] - old.shape[1]
    assert added > 1
    np.testing.assert_allclose(
        projector(basis[:, old.shape[1] :]), right[:added].T @ right[:added], atol=1e-4
    )


def test_growing_stops_at_the_whole_space():
    """Also where a covariance of few directions leaves the others to rounding."""
    basis = None
    for seed, rows in enumerate((3, 5, 300)):
        old, basis = basis, grow_basis(basis, covariance(inputs(seed, rows)), 1.0)
        assert old is None or torch.equal(basis[:, : old.shape[1]], old)
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    assert basis.shape == (SIZE, SIZE)
    assert grow_basis(basis, covariance(inputs(32)), 1.0) is basis


def test_what_a_basis_holds_already_does_not_make_it_grow():
    x = inputs(40)
    basis = grow_basis(None, covariance(x), 0.99)
    assert grow_basis(basis, covariance(x), 0.99) is basis
    inside = x @ projector(basis)
    assert grow_basis(basis, covariance(inside), 0.999) is basis


def test_residual_is_orthogonal_to_the_basis():
    basis = principal_basis(covariance(inputs(50)), 0.9)
    rows = torch.tensor(inputs(51, 7), dtype=torch.float32)
    left = residual(rows, basis)
    assert float((left @ basis).abs().max()) < 1e-6
    assert residual(rows, None) is rows
    np.testing.assert_allclose(left + rows @ basis @ basis.T, rows, atol=1e-6)


def test_an_update_outside_a_basis_moves_outputs_by_the_energy_left_at_most():
    """E |dW x|^2 = tr(dW C dW^T) <= |dW|^2 (1 - share) tr C for dW that leaves the basis alone."""
    x = inputs(60, 2000)
    basis = principal_basis(covariance(x), 0.99)
    free = np.eye(SIZE) - projector(basis)
    update = np.random.default_rng(61).normal(size=(10, SIZE)) @ free
    matrix = x.T @ x / len(x)
    moved = float(np.mean(((x @ update.T) ** 2).sum(1)))
    assert moved == pytest.approx(float(np.trace(update @ matrix @ update.T)), rel=1e-10)
    norm = float(np.linalg.norm(update, 2)) ** 2
    assert moved <= norm * (1 - held(basis, x)) * float(np.trace(matrix)) * (1 + 1e-6)
    plain = np.random.default_rng(61).normal(size=(10, SIZE))
    assert float(np.mean(((x @ plain.T) ** 2).sum(1))) > 10 * moved
