"""Small run folders with chosen rows, for the report and the comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("a", "b")


def write_run(
    folder: Path,
    cells: Sequence[Sequence[Sequence[int]]],
    *,
    tasks: Sequence[str] = TASKS,
    ids: Sequence[str] | None = None,
    name: str = "demo",
    method: str = "sequential",
    model: str = "tiny_t5",
    seed: int | None = 0,
    data: dict[str, Any] | None = None,
    events: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a run whose `cells[t][i]` has a 1 or 0 for each row of task i after stage t."""
    folder.mkdir(parents=True)
    recipe = {
        "name": name,
        "seed": seed,
        "method": {"kind": method},
        "model": {"builder": model, "path": None},
        "data": {"template": "plain", **(data or {})},
        "tasks": [{"name": task, "metric": None} for task in tasks],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "run.json").write_text(json.dumps({"name": name, "command": "accrete run demo"}))
    rows = [[100 * sum(cell) / len(cell) for cell in row] for row in cells]
    matrix = {"tasks": list(tasks), "matrix": rows, "metrics": {}}
    (folder / "matrix.json").write_text(json.dumps(matrix))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    for t, row in enumerate(cells):
        stage = folder / "stages" / str(t)
        stage.mkdir(parents=True)
        lines = []
        for task, cell in zip(tasks, row, strict=False):
            for k, right in enumerate(cell):
                row_id = ids[k] if ids else f"{task}-{k}"
                line = {"task": task, "id": row_id, "correct": bool(right), "prediction": None}
                lines.append(json.dumps(line))
        (stage / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
