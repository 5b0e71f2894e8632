"""Other ways to remember a Fisher: of the factors instead of W, and as one outer product.

Pure tensor functions. Shapes: W [d_out, d_in]; A [r, d_in]; B [d_out, r]; x [b, T, d_in];
g [b, T, d_out]; delta W = s B A; G_n = g_n^T x_n is the dense gradient of sequence n.
"""

from __future__ import annotations

import torch

from accrete.pipeline.math.fisher import BLOCK_ELEMENTS


def add_factor_squares(
    total_a: torch.Tensor,
    total_b: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> None:
    """Add every sequence's squared factor gradients, without its dense one.

    Args:
        total_a: [r, d_in], fp32, changed in place: += sum_n (s B^T G_n)^2.
        total_b: [d_out, r], fp32, changed in place: += sum_n (s G_n A^T)^2.
        x: [b, T, d_in] inputs of the layer.
        g: [b, T, d_out] gradients of each sequence's own loss with respect to the layer's output.
        a: [r, d_in].
        b: [d_out, r].
        scale: s = alpha / r.
    """
    for inputs, gradients in zip(x.float(), g.float(), strict=True):
        of_a = ((gradients @ b).T @ inputs).mul_(scale)
        of_b = (gradients.T @ (inputs @ a.T)).mul_(scale)
        total_a.addcmul_(of_a, of_a)
        total_b.addcmul_(of_b, of_b)


def diagonal_penalty(
    fisher: torch.Tensor, moved: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """R = strength/2 sum F d^2 of a parameter that moved by d, and dR/dd (all of one shape)."""
    gradient = fisher * moved
    value = (gradient * moved).sum() * (strength / 2)
    return value, gradient.mul_(strength)


def add_squared_margins(
    rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor, g: torch.Tensor
) -> None:
    """Add the row and column sums of every sequence's squared dense gradient, sum_n G_n^2.

    Args:
        rows: [d_out], fp32, changed in place.
        columns: [d_in], fp32, changed in place.
        x: [b, T, d_in] inputs of the layer.
        g: [b, T, d_out] gradients of each sequence's own loss with respect to the layer's output.

    Only a block of G_n's rows exists at a time.
    """
    block = max(1, BLOCK_ELEMENTS // len(columns))
    for inputs, gradients in zip(x.float(), g.float(), strict=True):
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            squares = (gradients[:, part].T @ inputs).square_()
            rows[part] += squares.sum(1)
            columns += squares.sum(0)


def rank1_penalty(
    rows: torch.Tensor,
    columns: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    strength: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """R = strength/2 sum_ij u_i v_j (s B A)_ij^2 and its gradients, for a block of rows of W.

    Args:
        rows: [rows], this block of u.
        columns: [d_in], v.
        a: [r, d_in].
        b: [rows, r], the same rows of B.
        scale: s = alpha / r.
        strength: lambda.

    Returns:
        R (scalar), dR/dA [r, d_in] (this block's part of a sum over blocks) and dR/dB [rows, r].

    Source: exact for F = u v^T, R = lambda s^2 / 2 tr[(B^T D_u B)(A D_v A^T)]; r x r matrices take
    the place of the dense delta.
    """
    weighted_a = a * columns
    weighted_b = b * rows[:, None]
    of_a, of_b = a @ weighted_a.T, b.T @ weighted_b
    factor = strength * scale**2
    value = (of_a * of_b).sum() * (factor / 2)
    return value, (of_b @ weighted_a).mul_(factor), (weighted_b @ of_a).mul_(factor)
