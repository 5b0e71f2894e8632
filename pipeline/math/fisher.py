"""The diagonal empirical Fisher of a dense weight and the EWC penalty on a low-rank delta.

Pure tensor functions. Shapes: G, F [d_out, d_in]; A [r, d_in]; B [d_out, r]; x [b, T, d_in];
g [b, T, d_out]; delta W = s B A.
"""

from __future__ import annotations

import torch

BLOCK_ELEMENTS = 1 << 22
"""Row blocks of the penalty hold about so many elements at a time."""


def add_squared_gradients(total: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add every sequence's squared dense gradient: total += sum_n (g_n^T x_n)^2.

    Args:
        total: [d_out, d_in], changed in place; what is added is computed in its precision.
        x: [b, T, d_in] inputs of the layer.
        g: [b, T, d_out] gradients of each sequence's own loss with respect to the layer's output.

    Source: diagonal empirical Fisher, one term per sequence, so that the result does not depend on
    the batch or on the number of ranks (the EWC-LoRA reference squares batch means instead).
    """
    for inputs, gradients in zip(x.to(total.dtype), g.to(total.dtype), strict=True):
        dense = gradients.T @ inputs
        total.addcmul_(dense, dense)


def add_gradients(total: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Add the dense gradient summed over sequences: total += sum_n g_n^T x_n (shapes as above)."""
    total.addmm_(g.to(total.dtype).flatten(0, -2).T, x.to(total.dtype).flatten(0, -2))


def penalty(
    fisher: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, strength: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R = strength/2 sum F (s B A)^2 and its gradients, for a block of rows of W.

    Args:
        fisher: [rows, d_in], this block's rows of F.
        a: [r, d_in].
        b: [rows, r], the same rows of B.
        scale: s = alpha / r.
        strength: lambda.

    Returns:
        R (scalar), dR/dA [r, d_in] (this block's part of a sum over blocks) and dR/dB [rows, r].

    Source: EWC-LoRA; closed form M = F * (s B A), dR/dB = lambda s M A^T, dR/dA = lambda s B^T M,
    which avoids an autograd graph through the dense delta.
    """
    value = fisher.new_zeros(())
    grad_a = torch.zeros_like(a)
    grad_b = torch.empty_like(b)
    rows = max(1, BLOCK_ELEMENTS // fisher.shape[1])
    for start in range(0, fisher.shape[0], rows):
        part = slice(start, start + rows)
        delta = (b[part] @ a).mul_(scale)
        weighted = fisher[part] * delta
        value += (weighted * delta).sum()
        weighted.mul_(strength * scale)
        grad_b[part] = weighted @ a.T
        grad_a.addmm_(b[part].T, weighted)
    return value * (strength / 2), grad_a, grad_b
