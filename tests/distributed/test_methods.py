"""Every method: the same at every shard, the same after an interruption, and not a no-op."""

from __future__ import annotations

import pytest
import torch
from method_settings import FOUR, PLAIN_RELATIVE, SETTINGS
from plan import CUT, MODELS, STAGES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

STEPS = 3


def groups(result):
    """Factors of a stage as one vector for A and one for B; the method's state by kind.

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
    assert len(got["losses"]) == len(expected["losses"]) >= 2 * STEPS
    for a, b in zip(got["losses"], expected["losses"], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    a, b = groups(got), groups(expected)
    assert a.keys() == b.keys()
    for kind, value in b.items():
        worst = float((a[kind] - value).norm() / value.norm().clamp(min=1e-12))
        assert worst <= tolerance, (kind, worst)


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_two_processes_equal_one(launches, kind, model, zero):
    got = launches(2).result(f"method-{kind}-{model}-zero{zero}")
    assert_same_run(got[0], launches(1).result(f"method-{kind}-{model}-zeroNone")[0])


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", FOUR)
def test_four_processes_equal_one(launches, kind, model, zero):
    got = launches(4).result(f"method-{kind}-{model}-zero{zero}")
    assert_same_run(got[0], launches(1).result(f"method-{kind}-{model}-zeroNone")[0])


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_interrupted_equals_uninterrupted(launches, kind):
    got = launches(2).result(f"methodresumed-{kind}")[0]
    whole = launches(2).result(f"method-{kind}-llama-zero2")[0]
    assert got["losses"] == whole["losses"][-len(got["losses"]) :]
    assert len(got["losses"]) == len(whole["losses"]) * 2 // 3 - CUT
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", list(PLAIN_RELATIVE))
def test_it_is_not_a_no_op(launches, kind, model):
    """Control: without its mechanism the last task's factors would differ by far more."""
    got = groups(launches(1).result(f"method-{kind}-{model}-zeroNone")[0])
    free = groups(launches(1).result(f"method-{PLAIN_RELATIVE[kind]}-{model}-zeroNone")[0])
    last = ("2", "B")
    assert float((got[last] - free[last]).norm() / free[last].norm()) > 1e-3
