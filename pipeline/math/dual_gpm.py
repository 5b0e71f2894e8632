"""DualGPM: the input directions to protect, kept as themselves or, once smaller, as what is left.

Shapes: C [d, d] = sum or mean of x x^T, uncentred; a basis [d, m] with orthonormal columns. The
protected space M and the free space F add up to all of R^d, and the basis of either says both.
Everything here works inside F: F^T C F is what of the inputs lies outside M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accrete.pipeline.math.subspace import eigenpairs, rank_for, widened


@dataclass(frozen=True)
class DualMemory:
    """The protected inputs of one layer."""

    basis: torch.Tensor
    """[d, m] fp32, m <= d/2."""
    free: bool
    """Whether the basis spans what is still free, instead of what is protected."""

    @property
    def protected(self) -> int:
        """Dimension of the protected space."""
        size, columns = self.basis.shape
        return size - columns if self.free else columns


def free_basis(memory: DualMemory | None, size: int) -> torch.Tensor | None:
    """Orthonormal columns [d, f] of the free space; None stands for all of R^d."""
    if memory is None or memory.free:
        return None if memory is None else memory.basis
    return _complement(memory.basis)


def open_directions(memory: DualMemory | None, inputs: torch.Tensor, rank: int) -> torch.Tensor:
    """The directions in which the free part of some inputs is largest.

    Args:
        memory: What is protected; None: nothing.
        inputs: C [d, d] of the new task, or its square (see `powered`).
        rank: How many directions are wanted.

    Returns:
        [k, d] orthonormal rows, k = min(rank, dimension of the free space), all of them orthogonal
        to everything protected, whatever the rank of C.

    Source: InfLoRA (Liang and Li, 2024), principal components of the inputs' part outside M.
    """
    free = free_basis(memory, inputs.shape[0])
    if free is not None and free.shape[1] == 0:
        return inputs.new_zeros(0, inputs.shape[0], dtype=torch.float32)
    _, vectors = eigenpairs(_inside(inputs, free))
    found = _lifted(free, vectors[:, :rank])
    # Signs are fixed here, in R^d: inside F they would depend on the choice of its basis.
    top = found.gather(0, found.abs().argmax(0, keepdim=True))
    return (found * top.sign()).T.contiguous()


def grow(
    memory: DualMemory | None, inputs: torch.Tensor, share: float, one_fewer: bool = False
) -> DualMemory:
    """Protect more directions until M holds `share` of the inputs' energy.

    Args:
        memory: What is protected so far; None: nothing.
        inputs: C [d, d] of the finished task, or its square (see `powered`).
        share: Wanted share of the trace.
        one_fewer: The first fill stops one direction short of the share, as the reference does.

    Returns:
        A memory that protects at least what `memory` does.

    Source: DualGPM (Liang and Li, 2023): stores the smaller of M and its complement.
    """
    size = inputs.shape[0]
    free = free_basis(memory, size)
    left = size if free is None else free.shape[1]
    if left == 0:
        assert memory is not None
        return memory
    inside = _inside(inputs, free)
    values, vectors = eigenpairs(inside)
    held = 0.0 if free is None else max(0.0, float(inputs.double().trace() - inside.trace()))
    count = rank_for(values, share, kept=held)
    if memory is None:
        count = max(1, count - 1 if one_fewer else count)
    if count == 0:
        assert memory is not None
        return memory
    protected = size - left + count
    if protected * 2 > size:
        return DualMemory(_lifted(free, vectors[:, count:]), free=True)
    new = _lifted(free, vectors[:, :count])
    # Up to here at most half was protected, so the columns so far are the protected ones.
    return DualMemory(new if memory is None else torch.cat([memory.basis, new], dim=1), free=False)


def powered(covariance: torch.Tensor, power: int) -> torch.Tensor:
    """C itself, or C^2 up to a factor, whose eigenvalues are squares: what DualGPM's code counts.

    The left singular vectors of (I - M M^T) C are the eigenvectors of the projected C^2, and their
    squared singular values its eigenvalues; so the reference is the same algorithm on C^2.
    """
    wide = widened(covariance)
    if power == 1:
        return wide
    wide = wide / wide.trace().clamp(min=torch.finfo(wide.dtype).tiny)
    squared: torch.Tensor = wide @ wide
    return squared


def _complement(basis: torch.Tensor) -> torch.Tensor:
    """[d, d - m] orthonormal columns orthogonal to those of [d, m]."""
    whole, _triangle = torch.linalg.qr(widened(basis), mode="complete")
    rest: torch.Tensor = whole[:, basis.shape[1] :]
    return rest


def _inside(inputs: torch.Tensor, free: torch.Tensor | None) -> torch.Tensor:
    """F^T C F."""
    if free is None:
        return inputs
    wide = widened(free)
    inside: torch.Tensor = wide.T @ inputs.to(wide.dtype) @ wide
    return inside


def _lifted(free: torch.Tensor | None, vectors: torch.Tensor) -> torch.Tensor:
    """F v, orthonormal again to the last bit, fp32."""
    if free is None:
        return vectors.float().contiguous()
    wide = widened(free)
    found: torch.Tensor = torch.linalg.qr(wide @ vectors.to(wide.dtype))[0]
    return found.float().contiguous()
