"""`make bench-methods` runs, and its figures are what they say; the figures themselves are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import bench_tables
import methods as bench
from bench_parts import SHAPES, method_of

from accrete.pipeline.methods.registry import METHODS

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def out(environment, tmp_path_factory) -> Path:
    """Two methods on the tiny T5."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    done = subprocess.run(
        [
            *(sys.executable, BENCH / "methods.py", "--tiny", "--threads", "1", "--out", folder),
            *("--device", "cpu", "--shapes", "tiny_t5", "--methods", "sequential", "ewc_lora"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_measures_two_methods(out):
    result = json.loads((out / "methods.json").read_text())
    tasks = {row["method"]: row["tasks"] for row in result["rows"]}
    assert list(tasks) == ["sequential", "ewc_lora"]
    for measured in tasks.values():
        assert list(measured) == ["2", "3"]
        for values in measured.values():
            assert values["step_seconds"] > 0
            assert 0.01 < values["step_ratio"] < 100
            assert values["step_peak"] > 50 * 2**20
            assert values["plain_pass_seconds"] > 0
            # The traffic of EWC-LoRA's steps is that of `sequential`.
            plain = tasks["sequential"]["2"]
            assert (values["calls"], values["bytes"]) == (plain["calls"], plain["bytes"])
            assert values["calls"] >= 1
    kept = [tasks["ewc_lora"][task] for task in ("2", "3")]
    # Query and value of six attentions, [32, 32] each, in fp32; half of it on each of two ranks.
    assert [values["state_bytes"] for values in kept] == [12 * 32 * 32 * 4] * 2
    assert [values["rank_state_bytes"] for values in kept] == [12 * 32 * 32 * 2] * 2
    assert kept[0]["end_seconds"] > tasks["sequential"]["2"]["end_seconds"]
    table = (out / "methods.md").read_text()
    assert table.count("| `ewc_lora` |") == 1
    assert "make bench-methods BENCH='--tiny" in table


def test_a_second_call_measures_nothing_again(out, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *arguments: pytest.fail("measured again"))
    again = ["--tiny", "--device", "cpu", "--shapes", "tiny_t5", "--out", str(out)]
    assert bench.main([*again, "--methods", "ewc_lora"]) == 0
    # Figures of other settings do not mix.
    assert bench.main([*again, "--methods", "ewc_lora", "--zero", "1"]) == 2


def test_every_method_is_measured_by_default():
    assert set(METHODS) < set(bench.options(["--device", "cpu"]).methods)
    assert bench.options(["--device", "cpu"]).shapes == ["t5_base_like", "llama_like"]
    assert bench.options(["--device", "cuda"]).shapes == ["t5_large", "llama32_1b"]


def test_shapes_have_2048_tokens_a_step():
    for name in (*bench.CPU_SHAPES, *bench.GPU_SHAPES):
        assert SHAPES[name].tokens == 2048
    assert method_of("ewc_lora:lambda=2.5,fisher=rank1").config.lambda_ == 2.5


def test_missed_targets_are_said():
    def row(method, **values):
        plain = {
            "step_ratio": 1.0,
            "end_seconds": 1.0,
            "plain_pass_seconds": 1.0,
            "calls": 4,
            "state_bytes": 100,
            "rank_state_bytes": 50,
        }
        tasks = {"2": plain, "15": {**plain, **values}}
        return {"method": method, "shape": "s", "tasks": tasks}

    def said(**values):
        rows = [row("sequential"), row("ewc_lora", **values)]
        return bench_tables.missed({"rows": rows}, "s")

    assert said() == []
    assert bench_tables.verdicts({"rows": [row("ewc_lora", calls=9)]}, "tiny_t5")[0][:4] == "Tiny"
    for values, word in (
        ({"step_ratio": 1.06}, "a step takes 1.060 x"),
        ({"end_seconds": 1.6}, "its pass takes 1.60 x"),
        ({"calls": 5}, "5 collectives"),
        ({"state_bytes": 200}, "its state grows"),
        ({"rank_state_bytes": 100}, "a rank of two holds"),
    ):
        (text,) = said(**values)
        assert "`ewc_lora`" in text
        assert word in text
