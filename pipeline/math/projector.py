"""The orthogonal projector on a principal subspace, applied at the least cost.

P = U U^T with U [d, k] and U^T U = I. Where k is more than half of d, the projector is held by the
d - k columns it removes: P = I - R R^T. Both are the same P up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accrete.pipeline.math.subspace import eigenpairs, rank_for


@dataclass(frozen=True)
class Projector:
    """P [d, d], symmetric and idempotent."""

    size: int
    """k, the dimension of what P keeps."""
    basis: torch.Tensor
    """[d, m] with orthonormal columns: k columns that P keeps, or d - k that it removes."""
    keeps: bool
    """Whether `basis` spans what P keeps."""

    @classmethod
    def of(cls, covariance: torch.Tensor, share: float) -> Projector:
        """P on the leading eigenvectors that hold `share` of a covariance's trace.

        Args:
            covariance: [d, d]; any multiple of it gives the same P.
            share: In (0, 1]; the smallest k that reaches it is taken, at least 1. 1 is the whole
                space, also where the covariance has fewer than d dimensions.
        """
        if share >= 1:
            size = covariance.shape[0]
            return cls(size, covariance.new_empty(size, 0, dtype=torch.float32), False)
        values, vectors = eigenpairs(covariance)
        size = max(1, rank_for(values, share))
        _, keeps = cls.layout(covariance.shape[0], size)
        return cls(size, (vectors[:, :size] if keeps else vectors[:, size:]).contiguous(), keeps)

    @staticmethod
    def layout(dimension: int, size: int) -> tuple[int, bool]:
        """Columns of `basis` and `keeps`, for P of rank `size` on so many dimensions."""
        rest = dimension - size
        return (size, True) if size <= rest else (rest, False)

    @property
    def whole(self) -> bool:
        """Whether P is the identity."""
        return self.size == self.basis.shape[0]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows x [n, d] times P."""
        if self.whole:
            return x
        part = (x @ self.basis) @ self.basis.T
        return part if self.keeps else x - part
