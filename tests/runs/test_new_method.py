"""The method in docs/new-method.md: as the page prints it, from a file and from a package."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from inprocess import PLAIN
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import cases
import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods import registry
from accrete.pipeline.models.lora import initial_factors
from accrete.pipeline.stage_runner import StageRunner

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def hold(tmp_path_factory) -> Path:
    """The page's own code, as a reader would save it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) < 60
    path = tmp_path_factory.mktemp("own") / "hold.py"
    path.write_text(blocks[0])
    return path


def test_two_processes_run_it_from_a_file(hold, accrete, recipe, tmp_path):
    """Through the command line, at ZeRO 2."""
    short = ("train.max_steps=2", "eval.forward_transfer=false", "method.strength=30")
    accrete("run", recipe, f"method={hold}", *short, "--run-dir", tmp_path / "run")
    matrix = json.loads((tmp_path / "run" / "matrix.json").read_text())["matrix"]
    assert [len(row) for row in matrix] == [1, 2, 3]
    state = load_file(tmp_path / "run" / "checkpoints" / "stage-2" / "method.safetensors")
    assert state
    assert all(float(value) > 0 for value in state.values())


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_it_holds_back_from_the_second_task_on(hold, model, tmp_path):
    params = {"model": model, "zero": None, "micro": 8}
    free = cases.sequence(ALONE, tmp_path / "free", method="inc_lora", **params)
    off, held = (
        cases.sequence(
            ALONE, tmp_path / f"{s}", method=str(hold), settings={"strength": s}, **params
        )
        for s in (0, 30.0)
    )
    assert off["losses"] == free["losses"]
    assert held["losses"][:4] == free["losses"][:4]
    assert held["bytes"] == 4 * sum(key.startswith("state/") for key in held)

    def size(result):
        layers = [key[:-1] for key in result if key.startswith("1/") and key.endswith("/A")]
        return sum(float((result[f"{la}B"] @ result[f"{la}A"]).square().sum()) for la in layers)

    assert size(off) == size(free)
    assert size(held) < 0.9 * size(free)


@pytest.fixture
def anew():
    """Packages are looked for once a process; what this test shows must not stay."""
    yield
    registry._plugins.cache_clear()
    sys.modules.pop("my_package.hold", None)
    sys.modules.pop("my_package", None)


def test_a_package_makes_its_name_known(hold, recipe, accrete_here, anew, monkeypatch, tmp_path):
    """By a real entry point; a setting out of range leaves no run folder."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "hold.py").write_text(hold.read_text())
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    point = re.search(r"^hold = \"(.+)\"$", PAGE.read_text(encoding="utf-8"), re.M)
    assert point is not None
    (info / "entry_points.txt").write_text(f"[accrete.methods]\nhold = {point[1]}\n")

    monkeypatch.syspath_prepend(tmp_path)
    registry._plugins.cache_clear()
    card = json.loads(accrete_here("methods", "show", "hold", "--json").stdout)
    assert card["code"] == "my_package.hold:Hold"
    assert card["settings"][0]["description"] == "Weight of the penalty; 0 is inc_lora."
    wrong = ("method.strength=-1", "--run-dir", tmp_path / "bad")
    bad = accrete_here("run", recipe, "method=hold", *wrong, check=False)
    assert bad.returncode == 2
    assert "a number >= 0" in bad.stderr
    assert not (tmp_path / "bad").exists()
    short = (*PLAIN, "train.max_steps=1")
    accrete_here("run", recipe, "method=hold", *short, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "2" / "adapter").is_dir()


def test_its_pull_is_the_gradient_of_what_it_says(hold, tmp_path):
    parts = toys.make_parts(
        ALONE, tmp_path, model="llama", zero=None, micro=8, method=str(hold),
        settings={"strength": 0.7},
    )  # fmt: skip
    runner = StageRunner(parts)
    method, engine = parts.method, parts.engine
    runner._learn(0, None)
    earlier = {
        name: float((parts.adapted.layers[name].scale * b @ a).square().sum())
        for name, (a, b) in parts.past.stages[0].items()
    }
    stage = runner._stage(1)
    generator = torch.Generator().manual_seed(0)
    stage.write_factors(
        {
            name: (a, torch.randn(b.shape, generator=generator))
            for name, (a, b) in initial_factors(parts.adapted, 3, 1).items()
        }
    )
    method.on_task_start(stage)
    method.before_step(stage)
    method.before_backward(stage, last=True)
    live = {name: engine.value(name).double().requires_grad_() for name in engine.parameters}
    penalty = sum(
        0.7 / 2 * earlier[name] * (layer.scale * live[layer.b] @ live[layer.a]).square().sum()
        for name, layer in parts.adapted.layers.items()
    )
    for name, expected in zip(live, torch.autograd.grad(penalty, live.values()), strict=True):
        got = method.added[name].double()
        assert float((got - expected).norm() / expected.norm()) < 1e-5
        parameter = engine.parameters[name]
        (hooked,) = torch.autograd.grad(2 * parameter.sum(), parameter)
        torch.testing.assert_close(hooked, 2 + method.added[name])


def test_it_resumes_to_the_bit(hold, tmp_path, monkeypatch):
    params = {"model": "llama", "zero": None, "micro": 8, "method": str(hold), "tasks": 3,
              "settings": {"strength": 30.0}, "every_steps": 1}  # fmt: skip
    whole = cases.sequence(ALONE, tmp_path / "whole", **params)
    cases.interrupted(ALONE, tmp_path / "cut", cut=2, **params)
    again = cases.sequence(ALONE, tmp_path / "cut", **params)
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(again[key], value), key
