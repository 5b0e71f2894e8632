"""Whether two runs of a case came to the same losses, factors or weights, and state."""

from __future__ import annotations

import pytest
import torch

STEPS = 3
"""Steps of every task of a case."""


def groups(result):
    """A stage's factors as one vector for A and one for B, or its weights; the method's state.

    A basis is compared as the projector on its span: near-equal directions may turn.
    """
    found = {}
    for name, value in sorted(result.items()):
        if not isinstance(value, torch.Tensor):
            continue
        kind = (name[0], name[-1])
        if name.startswith("state/"):
            kind = name.split("/")[1]
            if kind == "basis":
                value = value @ value.T
        found.setdefault(kind, []).append(value.double().flatten())
    return {kind: torch.cat(values) for kind, values in found.items()}


def assert_same_run(got, expected, tolerance=1e-5):
    assert len(expected["losses"]) >= 2 * STEPS
    assert_same_values(got, expected, tolerance)


def assert_same_values(got, expected, tolerance=1e-5):
    """Also of a resumed run, which has fewer steps."""
    assert len(got["losses"]) == len(expected["losses"])
    for a, b in zip(got["losses"], expected["losses"], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    a, b = groups(got), groups(expected)
    assert a.keys() == b.keys()
    for kind, value in b.items():
        worst = float((a[kind] - value).norm() / value.norm().clamp(min=1e-12))
        assert worst <= tolerance, (kind, worst)


def assert_resumed(got, whole, missed):
    """A run resumed after so many steps against the uninterrupted one: equal to the bit."""
    assert len(got["losses"]) == len(whole["losses"]) - missed
    assert got["losses"] == whole["losses"][-len(got["losses"]) :]
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
