"""Principal subspaces of layer inputs: covariances, bases, residuals.

Pure tensor functions. Shapes: x [n, d] inputs of n tokens; C [d, d] = sum or mean of x x^T,
uncentred; a basis M [d, m] with M^T M = I, its columns in order of importance.

Energy is always the share of the trace of C, that is of the squared length of the inputs. Some
references square the eigenvalues of C instead (InfLoRA's DualGPM): see `dual_gpm.powered`.
"""

from __future__ import annotations

import torch

_DOUBLE_BELOW = 2048
"""Up to this size a decomposition is made in fp64; beyond it in fp32, at half the memory."""


def widened(matrix: torch.Tensor) -> torch.Tensor:
    """A [d, ...] matrix in the precision that decompositions are made in."""
    return matrix.double() if matrix.shape[0] <= _DOUBLE_BELOW else matrix.float()


def add_outer(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add the sum over tokens of x x^T to `total`.

    Args:
        total: [d, d], fp32, changed in place.
        x: [n, d], padding already left out.
    """
    values = x.float()
    total.addmm_(values.T, values)


def eigenpairs(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [d], largest first and none negative, and eigenvectors [d, d] as columns.

    Signs are fixed (the largest entry of a column is positive), so that one matrix has one answer.
    """
    wide = widened(covariance)
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    top = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.float(), (vectors * top.sign()).float()


def rank_for(values: torch.Tensor, share: float, kept: float = 0.0) -> int:
    """How many leading values hold `share` of the whole.

    Args:
        values: [d] energies, largest first, without what is already kept.
        share: Wanted share in (0, 1].
        kept: Energy that a basis holds already.

    Returns:
        The smallest k for which kept + the first k reach the share; 0 if kept alone does.
    """
    energy = values.double()
    total = kept + float(energy.sum())
    if total <= 0.0:
        return 0
    reached = kept + energy.cumsum(0)
    # The last bits of a sum must not ask for one direction more.
    wanted = share * total - 1e-9 * total
    if kept >= wanted:
        return 0
    return int((reached < wanted).sum()) + 1


def principal_basis(covariance: torch.Tensor, share: float) -> torch.Tensor:
    """The leading eigenvectors [d, k] that hold `share` of a covariance's energy."""
    values, vectors = eigenpairs(covariance)
    return vectors[:, : max(1, rank_for(values, share))].contiguous()


def residual(rows: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """What of [n, d] rows lies outside the span of a basis [d, m]: rows (I - M M^T)."""
    return rows if basis is None else rows - (rows @ basis) @ basis.T


def grow_basis(basis: torch.Tensor | None, covariance: torch.Tensor, share: float) -> torch.Tensor:
    """Append directions until a basis holds `share` of a covariance's energy.

    Args:
        basis: [d, m] with orthonormal columns, or None.
        covariance: [d, d].
        share: Wanted share of the trace.

    Returns:
        [d, m'] with m' >= m; the old columns come first, unchanged. Orthonormal to fp32.

    Source: GPM (Saha et al., 2021), on the covariance instead of the feature matrix: its
    eigenvectors are the left singular vectors of the features.
    """
    if basis is None:
        return principal_basis(covariance, share)
    wide = covariance.double()
    m = basis.double()
    outside = wide - m @ (m.T @ wide)
    outside = outside - (outside @ m) @ m.T
    total, left = float(wide.trace()), float(outside.trace())
    values, vectors = eigenpairs(outside.to(covariance.dtype))
    count = rank_for(values, share, kept=max(0.0, total - left))
    count = min(count, basis.shape[0] - basis.shape[1])
    if count <= 0:
        return basis
    new = vectors[:, :count].double()
    for _ in range(2):  # twice is enough: the second pass removes what rounding left in the first
        new = new - m @ (m.T @ new)
        new, _triangle = torch.linalg.qr(new)
    return torch.cat([basis, new.to(basis.dtype)], dim=1)
