"""Spectra of relation matrices against NumPy, finite differences and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.math.relations import relations, spectral_losses, spectrum

ROWS, BLOCKS, WIDTH = 3, 5, 12


def features(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, BLOCKS, WIDTH, generator=g, dtype=dtype)


def orthogonal(size, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


def loss(phi, old, divisor=float(WIDTH)):
    return spectral_losses(spectrum(phi, divisor), old).sum()


def gradient(phi, old, divisor=float(WIDTH)):
    phi = phi.clone().requires_grad_()
    return torch.autograd.grad(loss(phi, old, divisor), phi)[0]


def differences(phi, old, step=1e-5):
    result = torch.zeros_like(phi)
    for place in np.ndindex(*phi.shape):
        up, down = phi.clone(), phi.clone()
        up[place] += step
        down[place] -= step
        result[place] = (loss(up, old) - loss(down, old)) / (2 * step)
    return result


def assert_near(got, expected):
    assert float((got - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("divisor", [1.0, float(WIDTH)])
def test_singular_values_row_by_row(divisor):
    phi = features()
    got = spectrum(phi, divisor).numpy()
    for row, values in zip(phi.numpy(), got, strict=True):
        matrix = np.array([[float(a @ b) / divisor for b in row] for a in row])
        np.testing.assert_allclose(values, np.linalg.svd(matrix)[1][::-1], rtol=1e-10)
        squares = np.linalg.svd(row)[1] ** 2 / divisor
        np.testing.assert_allclose(values, squares[::-1], rtol=1e-10)


def test_single_precision():
    phi = features()
    got = spectrum(phi.float(), WIDTH)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), spectrum(phi, WIDTH), rtol=1e-5, atol=1e-6)


def test_smooth_l1_by_hand():
    """0.5 x^2 inside [-1, 1], |x| - 0.5 outside; a mean over the spectrum, one value per row."""
    new = torch.tensor([[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]])
    old = torch.tensor([[1.5, 2.0, 3.0], [0.0, -3.0, 0.0]])
    expected = torch.tensor([(0.125 + 0.0 + 3.5) / 3, 2.5 / 3])
    torch.testing.assert_close(spectral_losses(new, old), expected)


def test_no_gradient_reaches_the_old_spectrum():
    new, old = (torch.rand(2, 3, requires_grad=True) for _ in range(2))
    spectral_losses(new, old).sum().backward()
    assert new.grad is not None
    assert old.grad is None


# The first leaves every difference small, the second far outside SmoothL1's square part.
@pytest.mark.parametrize("scale", [1.05, 4.0])
def test_gradient_equals_finite_differences(scale):
    phi = features()
    old = spectrum(scale * features(1), WIDTH)
    assert_near(gradient(phi, old), differences(phi, old))


def test_gradient_equals_the_closed_form():
    """dL/dPhi = 2/d V diag(clip(e_new - e_old, -1, 1)/L) V^T Phi, by NumPy."""
    phi, old = features(), spectrum(2 * features(1), WIDTH).numpy()
    got = gradient(phi, torch.from_numpy(old)).numpy()
    for row, before, value in zip(phi.numpy(), old, got, strict=True):
        e, v = np.linalg.eigh(row @ row.T / WIDTH)
        weight = np.clip(e - before, -1, 1) / BLOCKS
        expected = 2 / WIDTH * v @ np.diag(weight) @ v.T @ row
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)


def test_equal_eigenvalues_do_no_harm():
    """Exactly equal, the loss symmetric in them: differentiable, and autograd finds it."""
    phi = orthogonal(WIDTH, 2)[:BLOCKS].expand(ROWS, -1, -1) * 3
    assert float(spectrum(phi).std(dim=1).max()) < 1e-12
    old = torch.full((ROWS, BLOCKS), 0.4, dtype=torch.float64)
    assert_near(gradient(phi, old), differences(phi, old))


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-8])
def test_gradient_is_bounded_however_close_eigenvalues_are(gap):
    """|dL/dPhi| <= 2/d |Phi| max|g|: no difference of eigenvalues stands in a denominator."""
    phi = orthogonal(WIDTH, 2)[:BLOCKS] * (1 + gap * torch.arange(BLOCKS))[:, None]
    old = torch.arange(BLOCKS, dtype=torch.float64)[None]
    got = gradient(phi[None], old)
    bound = 2 / WIDTH * torch.linalg.matrix_norm(phi) / BLOCKS
    assert float(torch.linalg.matrix_norm(got)[0]) <= float(bound) * (1 + 1e-9)
    # Fewer directions than blocks: eigenvalues that are all zero.
    flat = torch.ones(1, BLOCKS, WIDTH, dtype=torch.float64)
    assert bool(gradient(flat, old).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariances(dtype):
    """Rotated features, permuted blocks and any orthogonal mixing of blocks: loss 0."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    phi = features(dtype=dtype)
    base = spectrum(phi, WIDTH)
    turned = {
        "rotation": phi @ orthogonal(WIDTH, 3).to(dtype),
        "permutation": phi[:, torch.tensor([3, 0, 4, 2, 1])],
        "mixing": orthogonal(BLOCKS, 4).to(dtype) @ phi,
    }
    for name, other in turned.items():
        assert float((spectrum(other, WIDTH) - base).abs().max()) < tolerance, name
        assert float(spectral_losses(spectrum(other, WIDTH), base).max()) < tolerance, name
    # Controls: what is no such turn moves the spectrum.
    for other in (1.1 * phi, phi + 0.1 * features(5, dtype), phi[:, :, :-1]):
        assert float(spectral_losses(spectrum(other, WIDTH), base).min()) > 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_mirsky(seed):
    """The distance of spectra bounds that of relation matrices from below."""
    one, two = features(seed), features(seed) + 0.3 * features(seed + 10)
    near = (spectrum(one) - spectrum(two)).square().sum(1)
    far = (relations(one) - relations(two)).square().sum((1, 2))
    assert bool((near <= far * (1 + 1e-12)).all())
    assert bool((near < 0.9 * far).any())


def test_rows_do_not_touch_each_other():
    phi, old = features(), spectrum(features(1), WIDTH)
    alone = [spectral_losses(spectrum(phi[i : i + 1], WIDTH), old[i : i + 1]) for i in range(ROWS)]
    together = spectral_losses(spectrum(phi, WIDTH), old)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_row_that_is_not_finite_gives_nan_and_no_error(bad):
    phi = features(dtype=torch.float32)
    phi[1, 2, 3] = bad  # 1e30 overflows in the product alone
    got = spectrum(phi, WIDTH)
    assert got.isnan().all(1).tolist() == [False, True, False]
    torch.testing.assert_close(got[0], spectrum(phi[:1], WIDTH)[0])


def test_no_rows():
    phi = torch.zeros(0, BLOCKS, WIDTH, requires_grad=True)
    got = spectrum(phi, WIDTH)
    assert got.shape == (0, BLOCKS)
    spectral_losses(got, torch.zeros(0, BLOCKS)).sum().backward()
    assert phi.grad is not None
