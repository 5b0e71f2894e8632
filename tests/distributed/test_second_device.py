"""Every method on a device that is not the CPU, as on the CPU: what a GPU would refuse, and waits.

The cases are those of one plain process and of two at ZeRO 2 and 3, each compared with itself on
the CPU. What ranks send one another has to be on the device, as for NCCL.
"""

from __future__ import annotations

import pytest
import second_device
import torch
from comparison import assert_resumed, assert_same_run, assert_same_values
from harness import Case, Launch
from method_settings import FOUR, SETTINGS
from plan import WORLDS
from plan_base import BATCH
from plan_methods import CUT, STEPS, TASKS, TOYS, TRIPLET, method_resumes, resumed_model

MISSING = second_device.missing()

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(MISSING is not None, reason=f"the device cannot be built: {MISSING}"),
]

PLAIN = [case for case in WORLDS[1] if case.params.get("zero", 0) is None]
RUNS = [case.name for case in PLAIN if case.kind == "sequence"]
OTHERS = [case.name for case in PLAIN if case.kind != "sequence"]
MODEL = "llama"
PARAMS = {"model": TOYS[MODEL], "zero": None, "micro": BATCH, **TASKS}
CLUMSY = [Case(how, "clumsy", {**PARAMS, "how": how}) for how in ("reads", "mixes")]
SECOND_FORWARD = ("lwf", "lwf_reversed", "sr2_lora_uncached", TRIPLET)
"""Kinds that go through the model twice in a step, or in two micro-batches."""
CLOSE = 1e-4
"""Relative error: sums over tensors that lie otherwise in memory."""
LOW = 1e-1
"""Of factors, where weights are multiplied in bf16: a GPU rounds other operations than a CPU, and
what a second task moves differs as much between engines (`test_methods`, `test_sharding`)."""
MATRICES = ("keep_lora", "full", "gpm", "lora_subtraction_triplet")
"""Kinds that keep matrices in a checkpoint, each in another way."""
TWO = [
    *[f"ewc_lora-{model}-zero{zero}-acc1" for model, zero in (("t5", 3), ("llama", 2))],
    *[
        f"method-{kind}-{'t5-zero3' if number % 2 else 'llama-zero2'}"
        for number, kind in enumerate(FOUR)
    ],
    *[f"{name}-{kind}" for kind in MATRICES for name in ("methodcut", "methodresumed")],
    *["scoring-t5-zero3", "rows-5"],
]
"""Cases of two ranks, one of each kind of mechanism; the tensors of `rows-5` are on the CPU."""


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    cases = [*PLAIN, *method_resumes(1), *CLUMSY]
    return Launch(1, cases, tmp_path_factory.mktemp("second") / "one", 500, "second")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = [case for case in WORLDS[2] if case.name in TWO]
    assert len(cases) == len(TWO)
    return Launch(2, cases, tmp_path_factory.mktemp("second") / "two", 500, "second")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu(second, launches, name):
    got, expected = second.result(name)[0], launches(1).result(name)[0]
    assert got["dtypes"] == expected["dtypes"]
    low = name.startswith(("low", "half"))
    assert got["losses"] == pytest.approx(expected["losses"], rel=2e-3 if low else CLOSE)
    assert_same_run(got, expected, LOW if low else CLOSE)


@pytest.mark.parametrize(
    "name", [name for name in TWO if name.startswith(("ewc", "method-", "methodr"))]
)
def test_two_ranks_are_those_of_the_cpu(two, launches, name):
    got, expected = two.result(name), launches(2).result(name)
    assert [mine["bytes"] for mine in got] == [other["bytes"] for other in expected]
    assert_same_values(got[0], expected[0], CLOSE)


def test_two_ranks_score_as_on_the_cpu(two, launches):
    assert two.result("scoring-t5-zero3") == launches(2).result("scoring-t5-zero3")


@pytest.mark.parametrize("name", OTHERS)
def test_a_part_is_that_of_the_cpu(second, launches, name):
    got, expected = second.result(name)[0], launches(1).result(name)[0]
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6)
        elif not isinstance(value, float):
            assert got[key] == value, key


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_interrupted_equals_uninterrupted(second, kind):
    got = second.result(f"methodresumed-{kind}")[0]
    whole = second.result(f"method-{kind}-{resumed_model(kind)}-zeroNone")[0]
    assert_resumed(got, whole, STEPS + CUT)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_no_step_waits_more_often_than_that_of_sequential(second, kind):
    """Whoever reads a number from a GPU in a step stops it until it has caught up."""
    plain = second.result(f"method-sequential-{MODEL}-zeroNone")[0]["waits"]
    got = second.result(f"method-{kind}-{MODEL}-zeroNone")[0]["waits"]
    assert 0 < got <= plain * (2 if kind in SECOND_FORWARD else 1)


def test_controls(second, two):
    """What mixes devices or sends from the CPU ends; who reads a number of every layer waits."""
    with pytest.raises(AssertionError, match="all tensors to be on the same device"):
        second.result("mixes")
    with pytest.raises(AssertionError, match="no backend for a tensor on cpu"):
        two.result("rows-5")
    plain = second.result(f"method-sequential-{MODEL}-zeroNone")[0]["waits"]
    assert second.result("reads")[0]["waits"] >= plain + 4
