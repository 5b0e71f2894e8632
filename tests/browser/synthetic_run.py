"""A run folder with invented content: what a real run of four tasks would leave behind."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
CELLS = ((91, 0, 0, 0), (79, 31, 0, 0), (68, 27, 52, 0), (44, 31, 49, 80))
"""Right rows of 100; row t holds tasks 0 to t."""
BEFORE = (0, 4, 12, 21)
UNTRAINED = (0, 0, 0, 8)
NUM_ROWS = 100
STEPS = 40

RECIPE = """\
name: standard_cl/order1
seed: 3
model: {path: /models/smollm2-135m, dtype: auto}
method: {kind: ewc_lora, weight: 0.4}
adapter: {rank: 8, alpha: 16.0, targets: qv}
train: {learning_rate: 0.001, global_batch_size: 8, max_grad_norm: null}
"""


def write_run(
    folder: Path,
    *,
    tasks: Sequence[str] = TASKS,
    finished_stages: int = 4,
    prediction: str = "Company",
    row_id: str = "row",
) -> Path:
    """Write a run of four tasks of which `finished_stages` are scored."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = "".join(
        f"  - {json.dumps({'name': task, 'metric': 'exact_match'})}\n" for task in tasks
    )
    (folder / "recipe.yaml").write_text(f"{RECIPE}tasks:\n{listed}")
    _write(folder / "run.json", _run_json())
    events = _events(tasks, finished_stages)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines)
    if finished_stages:
        _write(folder / "matrix.json", _matrix(tasks, finished_stages))
    for t in range(finished_stages):
        stage = folder / "stages" / str(t)
        stage.mkdir(parents=True)
        rows = _predictions(tasks, t, prediction, row_id)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (stage / "predictions.jsonl").write_text(text)
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _run_json() -> dict[str, Any]:
    return {
        "name": "standard_cl/order1",
        "command": ["accrete", "run", "standard_cl/order1", "seed=3", "--run-dir", "runs/a b"],
        "started": "2026-11-21T10:00:00+00:00",
        "method": "ewc_lora",
        "model": {"path": "/models/smollm2-135m"},
        "versions": {"accrete": "0.1.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
        "hardware": {"cpu": "x86_64, 2 cores", "memory_gib": 24, "gpus": []},
        "origins": {
            "seed": "override",
            "model": "recipes/models/smollm2_135m.yaml:3",
            "method.weight": "recipes/methods/ewc_lora.yaml:8",
            "method": "recipes/methods/ewc_lora.yaml:7",
            "train.learning_rate": "recipes/standard_cl/order1.yaml:12",
            "train": "default",
            "adapter": "default",
        },
        "data": {"dbpedia": "sha256:1f0c77", "amazon": "sha256:9a3d20"},
    }


def _matrix(tasks: Sequence[str], stages: int) -> dict[str, Any]:
    return {
        "tasks": list(tasks),
        "matrix": [list(map(float, CELLS[t][: t + 1])) for t in range(stages)],
        "metrics": {},
        "untrained": UNTRAINED,
        "before": [BEFORE[i] if i <= stages else None for i in range(4)],
        "counts": [NUM_ROWS] * 4,
    }


def _events(tasks: Sequence[str], stages: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    events: list[dict[str, Any]] = [
        {
            "event": "run_started",
            "time": 0.0,
            "recipe": "standard_cl/order1",
            "method": "ewc_lora",
            "model": "smollm2",
            "tasks": list(tasks),
            "procs": 2,
            "zero_stage": 2,
        }
    ]
    for t, task in enumerate(tasks[: stages + 1]):
        events.append(
            {"event": "stage_started", "stage": t, "task": task, "steps": STEPS, "rows": 320}
        )
        num_steps = STEPS if t < stages else STEPS // 2
        for step in range(1, num_steps + 1):
            loss = 0.15 + 2.4 / (1 + 0.3 * step) + 0.25 * draw.random()
            events.append(
                {
                    "event": "step",
                    "stage": t,
                    "task": task,
                    "step": step,
                    "loss": loss,
                    "lr": 1e-3,
                    "tokens": 1100 + draw.randrange(300),
                    "seconds": 4.2 + draw.random(),
                }
            )
        if t == stages:
            break
        events.append({"event": "checkpoint", "stage": t, "step": STEPS, "seconds": 0.7})
        events.append({"event": "consolidated", "stage": t, "seconds": 14.5})
        for i in range(t + 1):
            score = {"score": float(CELLS[t][i]), "rows": NUM_ROWS, "seconds": 11.0 + i}
            events.append({"event": "scored", "stage": t, "task": tasks[i], **score})
        events.append(
            {
                "event": "stage_finished",
                "stage": t,
                "task": task,
                "train_seconds": 190.0 + 3 * t,
                "score_seconds": 12.0 * (t + 1),
                "state_bytes": 1_843_200 * (t + 1),
            }
        )
    message = "3 of 320 rows of amazon had their input cut to 192 tokens."
    events.append({"event": "warning", "message": message})
    if stages == len(tasks):
        events.append({"event": "run_finished", "metrics": {}, "seconds": 906.0})
    return events


def _predictions(
    tasks: Sequence[str], stage: int, prediction: str, row_id: str
) -> list[dict[str, Any]]:
    """Each row keeps its own difficulty, so that a task's scores at two stages belong together."""
    rows = []
    for i in range(stage + 1):
        order = random.Random(i).sample(range(NUM_ROWS), NUM_ROWS)
        # A few rows are right now that were wrong before.
        right = set(order[stage - i : stage - i + CELLS[stage][i]])
        for k in range(NUM_ROWS):
            correct = k in right
            row = {"task": tasks[i], "id": f"{row_id}-{k}", "correct": correct}
            decoded = prediction if correct or k % 2 else None
            rows.append({**row, "prediction": decoded})
    return rows
