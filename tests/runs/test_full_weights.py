"""Whole runs of methods that train the model's own weights, through the command line.

In one process, this one: tests/distributed has these methods at every shard, cut and resumed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from inprocess import PLAIN
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SMALL = ("train.max_steps=3", "eval.forward_transfer=false", *PLAIN)


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def full(accrete_here, recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    accrete_here("run", recipe, "method=full", *SMALL, "--run-dir", folder)
    return folder


def test_a_run_ends_and_scores_again_the_same(full, accrete_here):
    content = json.loads((full / "matrix.json").read_text())
    assert [len(row) for row in content["matrix"]] == [1, 2, 3]
    assert not list(full.glob("stages/*/adapter"))
    for stage in range(3):
        state = load_file(full / f"checkpoints/stage-{stage}/state.safetensors")
        assert len(state) == 21  # every weight of the model, no moments
        assert {value.dtype for value in state.values()} == {torch.float32}
    done = accrete_here("score", full, "--stage", 1, "--json")
    again = [item["score"] for item in json.loads(done.stdout)["scores"]]
    assert again == content["matrix"][1]


def test_export_is_the_trained_model(full, accrete_here, llama, tmp_path):
    from transformers import AutoModelForCausalLM

    accrete_here("export", full, "--out", tmp_path / "merged", "--stage", 1)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    state = load_file(full / "checkpoints/stage-1/state.safetensors")
    assert {f"factor/{name}" for name in exported} == set(state)
    for name, value in exported.items():
        assert torch.equal(value, state[f"factor/{name}"])
        assert not torch.equal(value, base[name])
    done = accrete_here(
        "export", full, "--out", tmp_path / "adapter", "--form", "adapter", check=False
    )
    assert done.returncode == 2
    assert "--form merged" in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_resumed_after_a_task_is_bit_identical(full, accrete_here, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(full, cut)
    # As after a kill in the third task: its end was never written.
    for name in ("checkpoints/stage-2", "stages/2"):
        shutil.rmtree(cut / name)
    (cut / "matrix.json").unlink()
    accrete_here("resume", cut)
    assert events(cut, "resumed")[-1]["stage"] == 1
    name = "checkpoints/stage-2/state.safetensors"
    assert (cut / name).read_bytes() == (full / name).read_bytes()
    assert (cut / "matrix.json").read_text() == (full / "matrix.json").read_text()


def test_branches_keep_to_weights(full, accrete_here, tmp_path):
    """To GPM, whose frozen weights are those of the shared stage; not to an adapter."""
    folder = tmp_path / "branch"
    accrete_here("branch", full, "method=gpm", "--from-stage", 0, "--run-dir", folder)
    first = [e["loss"] for e in events(full, "step")]
    branched = [e["loss"] for e in events(folder, "step")]
    assert branched[:3] == first[:3]
    assert branched[3] == pytest.approx(first[3], rel=1e-5)
    state, started, further = (
        load_file(run / f"checkpoints/stage-{stage}/state.safetensors")
        for run, stage in ((folder, 2), (full, 0), (full, 2))
    )
    frozen = [n for n in state if "embed" in n or "norm" in n or "lm_head" in n]
    assert len(frozen) == 7
    assert all(torch.equal(state[name], started[name]) for name in frozen)
    assert not any(torch.equal(state[name], further[name]) for name in frozen)
    done = accrete_here(
        "branch",
        full,
        "method=inc_lora",
        "--from-stage",
        0,
        "--run-dir",
        tmp_path / "no",
        check=False,
    )
    assert done.returncode == 2
    assert "the model's own weights" in done.stderr
    assert not (tmp_path / "no").exists()


def test_products_in_bf16_and_weights_in_fp32(full, accrete_here, recipe, tmp_path):
    folder = tmp_path / "run"
    accrete_here("run", recipe, "method=full", "model.dtype=bf16", *SMALL, "--run-dir", folder)
    low, whole = (
        load_file(run / "checkpoints/stage-2/state.safetensors") for run in (folder, full)
    )
    assert {value.dtype for value in low.values()} == {torch.float32}
    assert not any(torch.equal(value, value.bfloat16().float()) for value in low.values())
    far = [float((low[name] - value).norm() / value.norm()) for name, value in whole.items()]
    assert 0 < max(far) < 0.1
    content = json.loads((folder / "matrix.json").read_text())
    done = accrete_here("score", folder, "--stage", 2, "--json")
    assert [s["score"] for s in json.loads(done.stdout)["scores"]] == content["matrix"][2]
