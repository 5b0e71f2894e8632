"""Spectra of the relations between a model's blocks, and how far they have moved.

Pure tensor functions. Shapes: Phi [b, L, d] one vector per row and block; the relation matrix
R = Phi Phi^T / divisor is [b, L, L], one per row; its spectrum e [b, L] ascending.
"""

from __future__ import annotations

import torch
from torch import nn


def relations(features: torch.Tensor, divisor: float = 1.0) -> torch.Tensor:
    """R = Phi Phi^T / divisor of every row.

    Args:
        features: [b, L, d], fp32 or fp64.
        divisor: d makes R independent of the width; 1 is the reference's.

    Returns:
        [b, L, L], symmetric and positive semi-definite. Differentiable.
    """
    return features @ features.mT / divisor


def spectrum(features: torch.Tensor, divisor: float = 1.0) -> torch.Tensor:
    """The singular values of every row's relation matrix (its eigenvalues: it is semi-definite).

    Args:
        features: [b, L, d], fp32 or fp64.
        divisor: As in `relations`.

    Returns:
        [b, L], ascending; nan for a row with features that are not finite. Differentiable: the
        gradient 2/divisor V diag(g) V^T Phi has no differences of eigenvalues in a denominator, so
        equal ones do no harm.

    The L x L matrix is decomposed and not Phi: L is a few dozen and d thousands, and only the
    squares of Phi's singular values are wanted, which the product has to full absolute precision.
    """
    matrices = relations(features, divisor)
    finite = matrices.isfinite().flatten(1).all(1)[:, None]
    # A decomposition raises on the one rank that has such a row; nan reaches the loop's own check.
    values = torch.linalg.eigvalsh(torch.where(finite[:, :, None], matrices, 0.0))
    return torch.where(finite, values, torch.nan)


def spectral_losses(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """SmoothL1 (beta 1) between two spectra, a mean over the spectrum, for every row.

    Args:
        new: [b, L], ascending.
        old: [b, L], ascending; no gradient flows there.

    Returns:
        [b].

    Source: SR2-LoRA; values are paired by their order, directions are not matched.
    """
    return nn.functional.smooth_l1_loss(new, old.detach(), reduction="none").mean(1)
