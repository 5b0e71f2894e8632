"""The augmented triplet loss: hardest positive and negative among candidates and old prototypes.

Pure tensor functions on L2-normalised features, so distances lie in [0, 2].
"""

from __future__ import annotations

import torch


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of [n, d] at length 1."""
    return torch.nn.functional.normalize(x, dim=-1)


def triplet_losses(
    anchors: torch.Tensor,
    classes: torch.Tensor,
    candidates: torch.Tensor,
    candidate_classes: torch.Tensor,
    old: torch.Tensor | None,
    margin: float,
    groups: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """max(0, d(hardest positive) - d(hardest negative) + margin) of every anchor.

    Args:
        anchors: [b, d], unit length; the gradient goes through them alone.
        classes: [b] integers >= 0.
        candidates: [n, d], unit length, without gradient; an anchor may be among them (its own
            distance is 0 and gives no gradient).
        candidate_classes: [n]; -1 marks padding, which is nobody's positive or negative.
        old: [p, d] prototypes of earlier classes, unit length: negatives of every anchor. Or None.
        margin: Wanted difference of the two distances.
        groups: Group numbers of the anchors [b] and of the candidates [n]: an anchor has the
            candidates of its own group alone. None: all of them are one group. `old` is in every
            group.

    Returns:
        [b]; 0 for an anchor without any negative.

    Source: ATL of LoRA- (Drift-Resistant Space): farthest candidate of the same class, nearest of
    another class or prototype, Euclidean. Deviation: candidates carry no gradient, so that the
    result is the same whichever process holds them.
    """
    if old is not None:
        candidates = torch.cat([candidates, old])
        foreign = candidate_classes.new_full((old.shape[0],), -2)
        candidate_classes = torch.cat([candidate_classes, foreign])
    same = classes[:, None] == candidate_classes
    other = ~same & (candidate_classes != -1)
    if groups is not None:
        own = groups[0][:, None] == groups[1]
        own = torch.nn.functional.pad(own, (0, same.shape[1] - own.shape[1]), value=True)
        same, other = same & own, other & own
    with torch.no_grad():
        # Exact differences: products would lose small distances to cancellation.
        distances = torch.cdist(anchors, candidates, compute_mode="donot_use_mm_for_euclid_dist")
        positive = distances.masked_fill(~same, -1.0).argmax(1)
        negative = distances.masked_fill(~other, torch.inf).argmin(1)
    gap = _distance(anchors, candidates[positive]) - _distance(anchors, candidates[negative])
    usable = same.any(1) & other.any(1)
    return torch.where(usable, (gap + margin).clamp(min=0), torch.zeros_like(gap))


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[b] Euclidean distances of rows; the gradient at distance 0 is 0."""
    lengths: torch.Tensor = torch.linalg.vector_norm(x - y, dim=1)
    return lengths
