"""Word vectors from co-occurrence counts, without a gradient step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SHIFT_POWER = 0.75
"""Context counts are raised to this power, so that rare contexts do not dominate."""


def ppmi_svd(
    texts: Sequence[Sequence[int]], vocab_size: int, width: int, window: int, seed: int
) -> torch.Tensor:
    """Vectors from the positive pointwise mutual information of tokens within a window.

    Args:
        texts: Token ids of every text.
        vocab_size: Number of tokens V; V x V fp32 numbers must fit into memory.
        width: Dimensions d of a vector.
        window: Tokens on each side that count as context.
        seed: Of the random start of the decomposition.

    Returns:
        [V, d], fp32: U sqrt(S) of the best rank-d approximation, scaled to a root mean square of 1
        over the tokens that occur. Tokens that never occur get random vectors of that size.

    Source: Levy and Goldberg 2014 (PPMI as word vectors), context smoothing as in Levy, Goldberg
    and Dagan 2015; randomized decomposition of Halko, Martinsson and Tropp 2011.
    """
    matrix = _ppmi(_counts(texts, vocab_size, window))
    generator = torch.Generator().manual_seed(seed)
    left, values = _top_vectors(matrix, width, generator)
    vectors = left * values.sqrt()
    seen = matrix.abs().sum(1) > 0
    vectors = vectors / vectors[seen].square().mean().sqrt()
    # Longer vectors would only repeat how often a token occurs.
    norms = vectors.norm(dim=1, keepdim=True).clamp(min=1e-6)
    vectors = vectors / norms * width**0.5
    random = torch.randn(vocab_size, width, generator=generator)
    return torch.where(seen[:, None], vectors, random)


def _counts(texts: Sequence[Sequence[int]], vocab_size: int, window: int) -> torch.Tensor:
    """How often two tokens stand within a window of each other, [V, V], symmetric."""
    codes = []
    tokens = torch.tensor([t for text in texts for t in text], dtype=torch.long)
    owner = torch.repeat_interleave(
        torch.arange(len(texts)), torch.tensor([len(text) for text in texts])
    )
    for distance in range(1, window + 1):
        same = owner[:-distance] == owner[distance:]
        codes.append((tokens[:-distance] * vocab_size + tokens[distance:])[same])
    pairs, counts = torch.unique(torch.cat(codes), return_counts=True)
    dense = torch.zeros(vocab_size * vocab_size)
    dense[pairs] = counts.float()
    dense = dense.view(vocab_size, vocab_size)
    return dense + dense.T


def _ppmi(counts: torch.Tensor) -> torch.Tensor:
    """max(0, log p(a, b) / (p(a) p'(b))), symmetrised; computed in place."""
    row = counts.sum(1)
    context = row.pow(SHIFT_POWER)
    context = context / context.sum()
    expected = row.clamp(min=1e-9)
    for start in range(0, len(counts), 1024):
        part = slice(start, start + 1024)
        ratio = counts[part] / expected[part, None] / context.clamp(min=1e-12)
        counts[part] = ratio.clamp(min=1.0).log()
    return (counts + counts.T) / 2


def _top_vectors(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading singular vectors and values of a symmetric matrix by subspace iteration."""
    start = torch.randn(matrix.shape[1], rank + 16, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(3):
        basis = torch.linalg.qr(matrix @ basis).Q
    small_left, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    left = basis @ small_left[:, :rank]
    # The sign of a singular vector is free: fix it, so that results can be compared.
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return left * signs, values[:rank]
