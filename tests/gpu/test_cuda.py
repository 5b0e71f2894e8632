"""On one CUDA GPU: every method as on the CPU, DeepSpeed under NCCL as plain, half precision, runs.

The references are the same cases on the CPU (one plain process) in fp32; matrix products are in
full fp32 on both sides (TF32 is off by default in PyTorch). Whoever has a GPU runs these with the
rest of the suite, or alone: `pytest tests/gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from comparison import assert_same_run, groups
from harness import Case, Launch
from method_settings import SETTINGS
from plan_base import BATCH, METHODS, MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

SHARDS = (None, 0, 2, 3)
EVERY = {**METHODS, **SETTINGS}
CLOSE = 1e-3
"""Relative error: other kernels sum in another order, and AdamW enlarges it step by step."""
TIGHT = 1e-4
"""The same between engines on one GPU."""
LOOSE = {("keep_lora_gradients", "t5"): 2e-2}
"""Bases cut between near-equal singular values (see `method_settings.TOLERANCE`)."""


def cases(zeros: tuple[int | None, ...]) -> list[Case]:
    return [
        Case(
            f"{kind}-{model}-{zero}",
            "sequence",
            {"model": model, "zero": zero, "micro": BATCH, "tasks": 3, **settings},
        )
        for kind, settings in EVERY.items()
        for model in MODELS
        for zero in zeros
    ]


HALVES = (
    *("sequential", "ewc_lora", "keep_lora", "lora_subtraction", "sr2_lora"),
    *("full", "ewc", "gpm"),
)
"""Kinds that run in bf16: a frozen base that is kept in it, or trained weights multiplied in it."""


def halves() -> list[Case]:
    return [
        Case(
            f"half-{kind}-{model}-{zero}",
            "sequence",
            {
                "model": model,
                "zero": zero,
                "micro": BATCH,
                "tasks": 3,
                "dtype": "bf16",
                "past": "branch",
                **EVERY[kind],
            },
        )
        for kind in HALVES
        for model in MODELS
        for zero in (None, 2, 3)
    ]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The GPU's cases divided over launches side by side, and the CPU's."""
    root = tmp_path_factory.mktemp("gpu")
    wanted = {f"cuda-{zero}": ("cuda", cases((zero,))) for zero in SHARDS}
    wanted["half"] = ("cuda", halves())
    wanted["cpu"] = ("cpu", cases((None,)))

    def launch(name: str) -> Launch:
        device, chosen = wanted[name]
        return Launch(1, chosen, root / name, 800, device)

    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(launch, wanted), strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", list(EVERY))
def test_a_gpu_learns_what_a_cpu_learns(launches, kind, model):
    got = launches["cuda-None"].result(f"{kind}-{model}-None")[0]
    expected = launches["cpu"].result(f"{kind}-{model}-None")[0]
    assert_same_run(got, expected, LOOSE.get((kind, model), CLOSE))


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", list(EVERY))
def test_deepspeed_on_a_gpu_equals_the_plain_engine(launches, kind, model, zero):
    got = launches[f"cuda-{zero}"].result(f"{kind}-{model}-{zero}")[0]
    expected = launches["cuda-None"].result(f"{kind}-{model}-None")[0]
    assert_same_run(got, expected, LOOSE.get((kind, model), TIGHT))


@pytest.mark.parametrize("case", [case.name for case in halves()])
def test_bf16_with_fp32_for_what_is_trained(launches, case):
    """Near the fp32 run in its losses; factors or weights, gradients and optimizer stay fp32."""
    _, kind, model, _ = case.split("-")
    got = launches["half"].result(case)[0]
    full = launches["cuda-None"].result(f"{kind}-{model}-None")[0]
    assert got["dtypes"] == ["torch.float32"]
    for a, b in zip(got["losses"], full["losses"], strict=True):
        assert a == pytest.approx(b, rel=3e-2)
    assert got["losses"] != full["losses"]
    trained = groups(got)["2", "W" if kind in ("full", "ewc", "gpm") else "B"].float()
    assert not torch.equal(trained, trained.bfloat16().float())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart on the GPU with every default of a GPU: bf16 base, NCCL, one process."""
    root = tmp_path_factory.mktemp("gpu-run")
    environment = {**os.environ, "ACCRETE_CACHE": str(root / "cache")}
    more = ("engine.procs=1", "train.max_steps=30", "train.micro_batch_size=32")
    done = _accrete("run", "quickstart", *more, "--run-dir", root / "run", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, environment, more


def _accrete(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accrete.launch.cli", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_run_with_the_defaults_of_a_gpu(quickstart):
    root, _, _ = quickstart
    started = _events(root / "run", "run_started")[0]
    assert started["device"].startswith("cuda")
    losses = [e["loss"] for e in _events(root / "run", "step") if e["stage"] == 0]
    assert losses[-1] < 0.7 * losses[0]
    matrix = json.loads((root / "run" / "matrix.json").read_text())
    assert len(matrix["matrix"]) == 6


def test_it_resumes_on_a_gpu(quickstart, tmp_path):
    """Branched off after the third task and finished: the later losses are those of the run."""
    root, environment, _ = quickstart
    branch = tmp_path / "branch"
    done = _accrete(
        *("branch", root / "run", "--from-stage", 2, "--run-dir", branch), env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = [e["loss"] for e in _events(branch, "step") if e["stage"] > 2]
    first = [e["loss"] for e in _events(root / "run", "step") if e["stage"] > 2]
    assert len(again) == len(first) == 90
    # A GPU's atomic additions need not repeat to the bit.
    assert again == pytest.approx(first, rel=2e-2)
