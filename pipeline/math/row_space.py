"""The input side of a weight or of a gradient: right singular vectors, residuals, joined bases.

Pure tensor functions, in fp64 inside. Shapes: W, G [d_out, d_in]; a basis M [d_in, m] with
M^T M = I. Decompositions are those of the Gram matrix of the shorter side.
"""

from __future__ import annotations

import torch

from accrete.pipeline.math.subspace import rank_for, residual

DEPENDENT = 1e-6
"""What is shorter than this share of the whole is rounding, not a direction."""


def right_singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right singular vectors.

    Args:
        matrix: [n, d].

    Returns:
        Values [k], largest first, and vectors [k, d] as rows, both fp64, k <= min(n, d): those
        that stand out from rounding. Signs are fixed (a row's largest entry is positive).
    """
    wide = matrix.double()
    tall = wide.shape[0] >= wide.shape[1]
    squares, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    kept = int((values > DEPENDENT * values[0]).sum())
    values, rows = values[:kept], vectors.flip(1)[:, :kept].T
    if not tall:
        rows = (rows @ wide) / values[:, None]
    top = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * top.sign()


def row_basis(weight: torch.Tensor, share: float) -> torch.Tensor:
    """The leading right singular vectors of a weight, as columns.

    Args:
        weight: [d_out, d_in].
        share: Wanted share of the squared singular values, in (0, 1].

    Returns:
        [d_in, p], fp32, the smallest p that reaches the share.

    Source: KeepLoRA, principal subspace of W_0 on its input side. (Its CLIP code takes the left
    singular vectors, which lie on the output side and fit square weights alone; its LLaMA code
    keeps one vector fewer than the share needs.)
    """
    values, rows = right_singular(weight)
    return rows[: rank_for(values.square(), share)].T.float().contiguous()


def join_bases(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """One basis of the span of both.

    Args:
        first: [d, m] with orthonormal columns, or None.
        second: [d, p] likewise.

    Returns:
        [d, m'] in fp64, max(m, p) <= m' <= min(d, m + p), or None if both are.
    """
    if first is None or second is None:
        only = second if first is None else first
        return None if only is None else only.double()
    basis = first.double()
    outside = residual(residual(second.double().T, basis), basis)
    if not bool((outside.abs() > DEPENDENT).any()):  # a weight of zeros has no direction at all
        return basis
    values, rows = right_singular(outside)
    return torch.cat([basis, _orthonormal(rows[values > DEPENDENT], basis).T], dim=1)


def residual_rows(
    gradient: torch.Tensor, basis: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, int]:
    """The leading right singular vectors of what of a gradient lies outside a basis.

    Args:
        gradient: G [d_out, d_in].
        basis: M [d_in, m], or None.
        rank: Wanted number of vectors.

    Returns:
        A [rank, d_in] in fp32 and the number of its rows that are vectors: A M = 0, the vectors
        are orthonormal. The other rows are zero; there are some when less than `rank` dimensions
        are left beside M, or when the residual is rounding beyond its first few directions.

    Source: KeepLoRA, A from the SVD of G (I - M M^T); exact instead of randomised.
    """
    wide = gradient.double()
    m = None if basis is None else basis.double()
    outside = residual(residual(wide, m), m)
    rows = wide.new_zeros(0, wide.shape[1])
    # G is summed in fp32: what is smaller is its noise. Where M leaves no room, nothing is larger.
    least = DEPENDENT * float(wide.norm())
    if float(outside.norm()) > least:
        values, rows = right_singular(outside)
        rows = _orthonormal(rows[values > least][:rank], m)
    a = wide.new_zeros(rank, wide.shape[1])
    a[: len(rows)] = rows
    return a.float(), len(rows)


def _orthonormal(rows: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """Nearly orthonormal [k, d] rows made exactly so, and orthogonal to a basis; signs stay."""
    for _ in range(2):  # the second pass removes what rounding left in the first
        columns, triangle = torch.linalg.qr(residual(rows, basis).T)
        rows = (columns * triangle.diagonal().sign()).T
    return rows
