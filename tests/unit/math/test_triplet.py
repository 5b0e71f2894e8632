"""The triplet loss against loops, and the projector against dense NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accrete.pipeline.math import subspace
from accrete.pipeline.math.projector import Projector
from accrete.pipeline.math.triplet import triplet_losses, unit


def brute_force(anchors, classes, candidates, candidate_classes, old, margin):
    """[b] by the words of the definition, in fp64."""
    losses = []
    for anchor, own in zip(anchors.tolist(), classes.tolist(), strict=True):
        pairs = zip(candidates.tolist(), candidate_classes.tolist(), strict=True)
        distances = [(math.dist(anchor, other), theirs) for other, theirs in pairs if theirs >= 0]
        positive = [d for d, theirs in distances if theirs == own]
        negative = [d for d, theirs in distances if theirs != own]
        negative += [math.dist(anchor, other) for other in ([] if old is None else old.tolist())]
        losses.append(max(0.0, max(positive) - min(negative) + margin) if negative else 0.0)
    return np.array(losses)


def grouped(anchors, classes, candidates, candidate_classes, old, margin, groups):
    """[b] as of one group after another, each without the others' candidates."""
    losses = np.zeros(len(anchors))
    for group in set(groups[0].tolist()):
        mine, theirs = groups[0] == group, groups[1] == group
        own = (candidates[theirs], candidate_classes[theirs])
        losses[mine.numpy()] = brute_force(anchors[mine], classes[mine], *own, old, margin)
    return losses


def make(seed, rows=9, dimension=6, kinds=3, padding=2):
    generator = torch.Generator().manual_seed(seed)
    features = unit(torch.randn(rows, dimension, generator=generator, dtype=torch.float64))
    classes = torch.randint(0, kinds, (rows,), generator=generator)
    classes[rows - padding :] = -1
    features[rows - padding :] = 0.0
    old = unit(torch.randn(4, dimension, generator=generator, dtype=torch.float64))
    return features, classes, old


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_losses_are_those_of_the_definition(seed, with_old, margin):
    features, classes, old = make(seed)
    old = old if with_old else None
    real = classes >= 0
    got = triplet_losses(features[real], classes[real], features, classes, old, margin)
    expected = brute_force(features[real], classes[real], features, classes, old, margin)
    assert np.abs(got.numpy() - expected).max() < 1e-12
    single = triplet_losses(
        features[real].float(),
        classes[real],
        features.float(),
        classes,
        None if old is None else old.float(),
        margin,
    )
    assert np.abs(single.double().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_an_anchor_has_the_candidates_of_its_own_group(seed, with_old):
    features, classes, old = make(seed, rows=14, kinds=2)
    old = old if with_old else None
    real = classes >= 0
    numbers = torch.randint(0, 3, (14,), generator=torch.Generator().manual_seed(seed)) * 5
    groups = (numbers[real], numbers)
    given = (features[real], classes[real], features, classes, old, 0.7)
    got = triplet_losses(*given, groups)
    assert np.abs(got.numpy() - grouped(*given, groups)).max() < 1e-12
    # One group of all is what there is without groups, to the bit; control: several are not.
    one = (torch.full_like(groups[0], 4), torch.full_like(numbers, 4))
    assert torch.equal(triplet_losses(*given, one), triplet_losses(*given))
    assert (got - triplet_losses(*given)).abs().max() > 1e-2


def test_a_group_of_one_row_has_the_old_prototypes_alone():
    features, classes, old = make(2, padding=0)
    alone = torch.arange(len(features))
    got = triplet_losses(features, classes, features, classes, old, 2.0, (alone, alone))
    nearest = torch.cdist(features, old).min(1).values
    assert torch.allclose(got, (2.0 - nearest).clamp(min=0), atol=1e-12)
    assert not triplet_losses(features, classes, features, classes, None, 2.0, (alone, alone)).any()


def test_gradient_is_that_of_finite_differences():
    features, classes, old = make(3)
    real = classes >= 0
    anchors = features[real].clone().requires_grad_()

    def loss(x):
        return triplet_losses(x, classes[real], features, classes, old, 1.0).sum()

    (gradient,) = torch.autograd.grad(loss(anchors), anchors)
    numeric = torch.zeros_like(gradient)
    for place in np.ndindex(*gradient.shape):
        for sign in (1.0, -1.0):
            moved = anchors.detach().clone()
            moved[place] += sign * 1e-6
            numeric[place] += sign * float(loss(moved)) / 2e-6
    # An anchor whose only positive is itself sits on the tip of a cone: no gradient from there.
    counts = (classes[real][:, None] == classes[real]).sum(1)
    assert (counts > 1).sum() > 3
    assert torch.allclose(gradient[counts > 1], numeric[counts > 1], atol=1e-7)
    assert torch.isfinite(gradient).all()


def test_separated_classes_cost_nothing():
    corners = torch.eye(4).repeat_interleave(3, dim=0)
    classes = torch.arange(4).repeat_interleave(3)
    old = -torch.eye(4)
    assert (triplet_losses(corners, classes, corners, classes, old, 1.4) == 0).all()
    # Control: the distance is the root of 2, a wider margin is not met.
    assert (triplet_losses(corners, classes, corners, classes, old, 1.5) > 0.08).all()


def test_without_negatives_there_is_no_loss():
    features, _, old = make(0, padding=0)
    classes = torch.zeros(len(features), dtype=torch.long)
    assert (triplet_losses(features, classes, features, classes, None, 2.0) == 0).all()
    assert (triplet_losses(features, classes, features, classes, old, 2.0) > 0).any()


def dense(projector, dimension):
    eye = torch.eye(dimension, dtype=projector.basis.dtype)
    return projector.rows(eye).numpy()


@pytest.mark.parametrize("size", [1, 5, 10, 11, 19, 20])
def test_projector_is_idempotent_and_the_scaled_one_is_not(size):
    d = 20
    rng = np.random.default_rng(size)
    whole, _ = np.linalg.qr(rng.normal(size=(d, d)))
    count, keeps = Projector.layout(d, size)
    assert count == min(size, d - size)
    basis = torch.from_numpy(whole[:, :size] if keeps else whole[:, size:].copy())
    projector = Projector(size, basis, keeps)
    p = dense(projector, d)
    assert np.abs(p - whole[:, :size] @ whole[:, :size].T).max() < 1e-12
    assert np.abs(p @ p - p).max() < 1e-12
    x = torch.from_numpy(rng.normal(size=(3, d)))
    assert (projector.rows(projector.rows(x)) - projector.rows(x)).abs().max() < 1e-12
    scaled = p / np.linalg.norm(p)
    assert np.linalg.norm(p) == pytest.approx(math.sqrt(size), rel=1e-12)
    assert np.abs(scaled @ scaled - scaled / math.sqrt(size)).max() < 1e-12
    if size > 1:
        assert np.abs(scaled @ scaled - scaled).max() > 1e-3


@pytest.mark.parametrize(("double_below", "size"), [(2048, 16), (0, 24), (0, 256)])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.0])
def test_projector_of_a_covariance(monkeypatch, share, double_below, size):
    """Also where decompositions are made in fp32, as they are of large layers."""
    monkeypatch.setattr(subspace, "_DOUBLE_BELOW", double_below)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2000, size)) * np.geomspace(3.0, 0.05, size)
    covariance = x.T @ x
    projector = Projector.of(torch.from_numpy(covariance).float(), share)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    reached = np.cumsum(values) / values.sum()
    assert projector.size == int(np.argmax(reached >= share - 1e-9)) + 1
    top = vectors[:, : projector.size]
    p = dense(projector, size).astype(np.float64)
    assert np.linalg.norm(p - top @ top.T) <= 1e-5 * np.linalg.norm(p)
    assert np.linalg.norm(p @ p - p) <= 1e-5 * np.linalg.norm(p)
    gram = projector.basis.T @ projector.basis
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-5 if len(gram) else projector.whole
    assert projector.whole == (share == 1.0)
