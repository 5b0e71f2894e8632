"""Whole runs through the command line: contracts, kill and resume, branch, score, export."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TASKS = ["one", "two", "three"]
METRICS = {
    "average_performance",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "plasticity",
    "incremental_accuracy",
}


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def steps(folder: Path) -> list[tuple]:
    return [(e["stage"], e["task"], e["step"], e["loss"]) for e in events(folder, "step")]


def assert_same_bits(got: Path, expected: Path) -> None:
    assert steps(got) == steps(expected)
    for name in ("matrix.json", *(f"stages/{t}/predictions.jsonl" for t in range(3))):
        assert (got / name).read_text() == (expected / name).read_text(), name
    for stage in range(3):
        file = f"stages/{stage}/adapter/adapter_model.safetensors"
        assert (got / file).read_bytes() == (expected / file).read_bytes(), file
    a, b = (load_file(f / "checkpoints/stage-2/method.safetensors") for f in (got, expected))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_run_leaves_behind(whole):
    content = json.loads((whole / "matrix.json").read_text())
    assert content["tasks"] == TASKS
    assert [len(row) for row in content["matrix"]] == [1, 2, 3]
    assert all(0 <= score <= 100 for row in content["matrix"] for score in row)
    assert set(content["metrics"]) == METRICS
    assert all(isinstance(value, float) for value in content["metrics"].values())
    assert [(s, k) for s, _, k, _ in steps(whole)] == [
        (stage, step) for stage in range(3) for step in range(1, 25)
    ]
    for stage in range(3):
        adapter = whole / "stages" / str(stage) / "adapter"
        assert (adapter / "adapter_config.json").is_file()
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}
        assert len(tensors) == 28
        lines = (whole / "stages" / str(stage) / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["task"] for row in rows] == [t for t in TASKS[: stage + 1] for _ in range(12)]
        right = [row["correct"] for row in rows if row["task"] == "one"]
        assert content["matrix"][stage][0] == pytest.approx(100 * sum(right) / len(right))
        assert all((row["prediction"] is None) == (not row["correct"]) for row in rows)
    assert "<html" in (whole / "report.html").read_text()


def test_the_loss_falls_and_the_penalty_is_logged(whole):
    first = [e for e in events(whole, "step") if e["stage"] == 0]
    assert first[-1]["loss"] < 0.8 * first[0]["loss"]
    assert all("penalty" not in event for event in first)
    later = [e for e in events(whole, "step") if e["stage"] == 1]
    assert later[0]["penalty"] == 0.0  # B = 0 at the start of a task
    assert 0 < later[-1]["penalty_share"] < 1


def kill_in_mid_task(recipe: Path, folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "accrete.launch.cli", "run", recipe, "--run-dir", folder]
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = folder / "events.jsonl"
    deadline = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        text = path.read_text() if path.is_file() else ""
        if '"stage": 1, "task": "two", "step": 12,' in text:
            break
        time.sleep(0.005)
    # The launcher alone: its workers must die with it.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_is_bit_identical(whole, recipe, environment, accrete, tmp_path):
    folder = tmp_path / "killed"
    kill_in_mid_task(recipe, folder, environment)
    seen = len(steps(folder))
    assert 24 + 12 <= seen < 72
    before = (folder / "events.jsonl").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    accrete("resume", folder)
    assert_same_bits(folder, whole)
    # Append-only: what was there is still there, and no step stands twice.
    kept = before[: before.rfind(b"\n") + 1]
    assert (folder / "events.jsonl").read_bytes().startswith(kept)
    (event,) = events(folder, "resumed")
    assert event["stage"] == 1
    assert event["step"] in (5, 10, 15, 20)
    # A damaged checkpoint is passed over with a warning; other shards give the same to 1e-5.
    newest = max((copy / "checkpoints").glob("stage-1-step-*"), key=lambda p: int(p.name[13:]))
    with (newest / "state.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    accrete("resume", copy, "engine.zero_stage=3")
    assert any("checksum" in e["message"] for e in events(copy, "warning"))
    for got, expected in zip(steps(copy), steps(whole), strict=True):
        assert got[:3] == expected[:3]
        assert got[3] == pytest.approx(expected[3], rel=1e-5)


def test_a_finished_run_is_only_read(whole, accrete_here):
    before = (whole / "events.jsonl").read_bytes()
    done = accrete_here("resume", whole)
    assert "average performance" in done.stdout
    assert (whole / "events.jsonl").read_bytes() == before


def test_python_in_three_lines(recipe, environment, tmp_path):
    folder = tmp_path / "run"
    script = (
        "import json\n"
        "from accrete.launch.api import load_recipe, run\n"
        f"result = run(load_recipe({str(recipe)!r}, 'train.max_steps=2', 'method=sequential'),"
        f" {str(folder)!r}, procs=1)\n"
        "print(json.dumps([result.finished, result.matrix, result.metrics]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    finished, matrix, metrics = json.loads(done.stdout.splitlines()[-1])
    assert finished
    assert [len(row) for row in matrix] == [1, 2, 3]
    written = json.loads((folder / "matrix.json").read_text())
    assert (matrix, metrics) == (written["matrix"], written["metrics"])
    assert set(metrics) == METRICS
    # One adapter for all tasks: no Fisher in the checkpoint, and the factors go on.
    stage = folder / "checkpoints" / "stage-1"
    assert not load_file(stage / "method.safetensors")
    assert json.loads((stage / "checkpoint.json").read_text())["live"]


def test_branch_shares_the_beginning(whole, accrete, accrete_here, tmp_path):
    folder = tmp_path / "branch"
    accrete(
        "branch",
        whole,
        "method.lambda=0",
        "train.max_steps=3",
        "--from-stage",
        0,
        "--run-dir",
        folder,
    )
    assert steps(folder)[:24] == steps(whole)[:24]
    assert len(steps(folder)) == 24 + 6
    # It says its own plan, after the parent's.
    plans = [[t["steps"] for t in e["plan"]] for e in events(folder, "run_started")]
    assert plans == [[24, 24, 24], [3, 3, 3]]
    first = json.loads((folder / "matrix.json").read_text())["matrix"][0]
    assert first == json.loads((whole / "matrix.json").read_text())["matrix"][0]
    assert steps(folder)[24][3] == steps(whole)[24][3]  # B = 0: no penalty in the first step yet
    assert steps(folder)[26][3] != steps(whole)[26][3]
    done = accrete_here("branch", whole, "seed=5", "--from-stage", 0, check=False)
    assert done.returncode == 2
    assert "seed" in done.stderr


def test_score_again_says_the_same(whole, accrete_here):
    done = accrete_here("score", whole, "--json")
    content = json.loads(done.stdout)
    row = json.loads((whole / "matrix.json").read_text())["matrix"][-1]
    assert [item["score"] for item in content["scores"]] == row
    done = accrete_here("score", whole, "eval.mode=generate", "--stage", 1, "--json")
    row = json.loads((whole / "matrix.json").read_text())["matrix"][1]
    assert [item["score"] for item in json.loads(done.stdout)["scores"]] == row


def test_what_auto_decided_outlives_a_change_of_device(whole, tmp_path):
    """A run that began on a GPU: its base stays bf16 and its past a branch, wherever it goes on."""
    from accrete.launch.rebuild import rebuild

    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    file = moved / "events.jsonl"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "cuda:0"', 1))
    assert file.read_text() != (whole / "events.jsonl").read_text()
    for folder, dtype, mode in ((whole, torch.float32, "fold"), (moved, torch.bfloat16, "branch")):
        parts = rebuild(folder, 1).parts
        frozen = {p.dtype for p in parts.adapted.module.parameters() if not p.requires_grad}
        assert frozen == {dtype}
        assert parts.past.mode == mode
    assert rebuild(moved, 1, ["model.dtype=fp32"]).parts.past.mode == "fold"


def test_exported_models_are_the_scored_one(whole, accrete_here, llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from accrete.launch.rebuild import rebuild

    accrete_here("export", whole, "--out", tmp_path / "merged")
    accrete_here("export", whole, "--out", tmp_path / "adapter", "--form", "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("Say which task one w3 w5 Answer :", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        untouched = base(ids).logits
        expected = merged(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        live = rebuild(whole, None).parts.adapted.module.eval()(ids).logits
    torch.testing.assert_close(expected, live, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted, live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untouched, live, atol=1e-2)


def test_a_finished_run_is_exported_without_its_rows_or_its_gpu(
    whole, accrete_here, llama, tmp_path
):
    """Another tokenizer than the model's own goes along; the row cache has been cleared."""
    from transformers import AutoTokenizer

    moved, other = tmp_path / "run", tmp_path / "tokenizer"
    shutil.copytree(whole, moved)
    AutoTokenizer.from_pretrained(llama, additional_special_tokens=["<own>"]).save_pretrained(other)
    prepared = json.loads((moved / "prepared.json").read_text())
    prepared["tokenizer_path"] = str(other)
    for task in prepared["tasks"]:
        task["train_dir"] = task["eval_dir"] = str(tmp_path / "cleared")
    (moved / "prepared.json").write_text(json.dumps(prepared))
    text = (moved / "recipe.yaml").read_text()
    text, changed = re.subn(r"device: (auto|cpu)", "device: cuda", text)
    assert changed == 1
    (moved / "recipe.yaml").write_text(text)
    for form in ("merged", "adapter"):
        accrete_here("export", moved, "--out", tmp_path / form, "--form", form)
    exported = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "<own>" in exported.get_vocab()
    assert "<own>" not in AutoTokenizer.from_pretrained(llama).get_vocab()


def test_stage_adapters_load_with_peft(whole, llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(base, whole / "stages/0/adapter")
    written = load_file(whole / "stages/0/adapter/adapter_model.safetensors")
    loaded = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    assert written.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in written.items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.learning_rte=1"], "learning_rate"),
        (["method=ewc_lra"], "ewc_lora"),
        (["tasks.one.files.train=missing.jsonl"], "missing.jsonl"),
        (["model.path=./no-such-folder"], "no-such-folder"),
        (["tasks.one.metric=rouge_l", "eval.mode=forward"], "set eval.mode to auto"),
    ],
)
def test_bad_input_leaves_no_folder(accrete_here, recipe, tmp_path, overrides, words):
    folder = tmp_path / "run"
    done = accrete_here("run", recipe, *overrides, "--run-dir", folder, check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()
