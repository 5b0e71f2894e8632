"""Every method on a device that is not the CPU, as on the CPU: what a GPU would refuse, and waits.

The cases are those of one plain process, each compared with itself on the CPU.
"""

from __future__ import annotations

import pytest
import second_device
import torch
from comparison import assert_same_run
from harness import Case, Launch
from method_settings import SETTINGS
from plan import WORLDS
from plan_base import BATCH
from plan_methods import CUT, MICRO, STEPS, TASKS, TOYS, TRIPLET

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        second_device.missing() is not None, reason=f"needs a build: {second_device.missing()}"
    ),
]

PLAIN = [case for case in WORLDS[1] if case.params.get("zero", 0) is None]
RUNS = [case.name for case in PLAIN if case.kind == "sequence"]
OTHERS = [case.name for case in PLAIN if case.kind != "sequence"]
MODEL = "llama"
PARAMS = {"model": TOYS[MODEL], "zero": None, "micro": BATCH, **TASKS}
CUTS = [
    Case(f"{name}-{kind}", how, {**params, **more})
    for kind, settings in SETTINGS.items()
    for params in [{**PARAMS, "micro": MICRO.get(kind, BATCH), "every_steps": 1, **settings}]
    for name, how, more in (
        ("cut", "interrupted", {"cut": CUT}),
        ("resumed", "resumed", {"source": f"cut-{kind}"}),
    )
]
CLUMSY = [Case(how, "clumsy", {**PARAMS, "how": how}) for how in ("reads", "mixes")]
SECOND_FORWARD = ("lwf", "lwf_reversed", "sr2_lora_uncached", TRIPLET)
"""Kinds that go through the model twice in a step, or in two micro-batches."""
CLOSE = 1e-4
"""Relative error: sums over tensors that lie otherwise in memory."""
LOW = 1e-1
"""Of factors, where weights are multiplied in bf16: a GPU rounds other operations than a CPU, and
what a second task moves differs as much between engines (`test_methods`, `test_sharding`)."""


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    cases = [*PLAIN, *CUTS, *CLUMSY]
    return Launch(1, cases, tmp_path_factory.mktemp("second") / "one", 500, "second")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_the_cpu(second, launches, name):
    got, expected = second.result(name)[0], launches(1).result(name)[0]
    assert got["dtypes"] == expected["dtypes"]
    low = name.startswith(("low", "half"))
    assert got["losses"] == pytest.approx(expected["losses"], rel=2e-3 if low else CLOSE)
    assert_same_run(got, expected, LOW if low else CLOSE)


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
    got = second.result(f"resumed-{kind}")[0]
    whole = second.result(f"method-{kind}-{MODEL}-zeroNone")[0]
    assert len(got["losses"]) == len(whole["losses"]) - STEPS - CUT
    assert got["losses"] == whole["losses"][-len(got["losses"]) :]
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_no_step_waits_more_often_than_that_of_sequential(second, kind):
    """Whoever reads a number from a GPU in a step stops it until it has caught up."""
    plain = second.result(f"method-sequential-{MODEL}-zeroNone")[0]["waits"]
    got = second.result(f"method-{kind}-{MODEL}-zeroNone")[0]["waits"]
    assert 0 < got <= plain * (2 if kind in SECOND_FORWARD else 1)


def test_controls(second):
    """A method that mixes devices ends; one that reads a number of every layer waits for each."""
    with pytest.raises(AssertionError, match="all tensors to be on the same device"):
        second.result("mixes")
    plain = second.result(f"method-sequential-{MODEL}-zeroNone")[0]["waits"]
    assert second.result("reads")[0]["waits"] >= plain + 4
