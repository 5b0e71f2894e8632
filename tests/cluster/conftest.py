"""A virtual cluster, a small recipe for it, and the same run on one machine, undisturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_sequence import write_rows, write_tokenizer
from virtual import VirtualCluster, virtual_cluster, why_not

SLOW = '''
"""EWC-LoRA that waits before every step of a launch, so that a fast machine takes its time too."""

import os
import time

from accrete.pipeline.methods.ewc_lora import EwcLora

LAUNCHED = "ACCRETE_WORLD_SIZE" in os.environ
SECONDS = float(os.environ.get("STEP_SECONDS", 0.1))


class Slow(EwcLora):
    def before_step(self, stage):
        if LAUNCHED:
            time.sleep(SECONDS)
        super().before_step(stage)
'''


def pytest_collection_modifyitems(config, items):
    """Minutes on a virtual cluster are asked for: `make test-cluster`."""
    if "cluster" in (config.getoption("markexpr") or ""):
        return
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and root: make test-cluster"))


@pytest.fixture(scope="session")
def vcluster(tmp_path_factory) -> VirtualCluster:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with virtual_cluster(tmp_path_factory.mktemp("virtual") / "cluster") as cluster:
        yield cluster


def write_model(folder: Path) -> None:
    """A T5 of two layers with random weights, and whole words as tokens."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = write_tokenizer(folder)
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A sequence that takes about a minute on two nodes, so that it can be disturbed."""
    folder = tmp_path_factory.mktemp("recipe")
    model = folder / "model"
    write_model(model)
    (folder / "slow.py").write_text(SLOW)
    path = folder / "toy.yaml"
    content = {
        "name": "toy",
        "tasks": write_rows(folder),
        "model": {"path": str(model)},
        "method": {"kind": str(folder / "slow.py"), "lambda": 100.0},
        "adapter": {"rank": 4, "alpha": 8, "targets": "all_linear"},
        "data": {"format": "files", "max_source_tokens": 64, "max_target_tokens": 8},
        "train": {"learning_rate": 0.01, "global_batch_size": 8, "max_steps": 120},
        "engine": {"procs": 2, "zero_stage": 2, "device": "cpu", "timeout_s": 60},
        "checkpoint": {"every_steps": 20},
        "log": {"console": "plain"},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables of whoever calls `accrete`, on any node."""
    return {
        "ACCRETE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }


@pytest.fixture(scope="session")
def undisturbed(recipe, environment, tmp_path_factory) -> Path:
    """The same run on one machine, from start to end; nothing may write into it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(
        [sys.executable, "-m", "accrete.launch.cli", "run", recipe, "--run-dir", folder],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return folder


def same_results(run: Path, other: Path) -> None:
    """Matrix, scores and every adapter of two runs are the same, to the bit."""
    matrices = [json.loads((folder / "matrix.json").read_text()) for folder in (run, other)]
    assert matrices[0]["matrix"] == matrices[1]["matrix"]
    assert matrices[0]["metrics"] == matrices[1]["metrics"]
    stages = sorted(path.name for path in (other / "stages").iterdir())
    assert stages == sorted(path.name for path in (run / "stages").iterdir())
    for stage in stages:
        for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
            mine, theirs = (folder / "stages" / stage / name for folder in (run, other))
            assert mine.read_bytes() == theirs.read_bytes(), f"stage {stage}: {name}"


@pytest.fixture(scope="session")
def require_same():
    return same_results
