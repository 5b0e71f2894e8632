"""Small run folders with chosen rows, for the report and the comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("a", "b")


def write_run(
    folder: Path,
    cells: Sequence[Sequence[Sequence[float]]],
    *,
    tasks: Sequence[str] = TASKS,
    ids: Sequence[str] | None = None,
    name: str = "demo",
    method: str = "sequential",
    model: str | dict[str, Any] = "tiny_t5",
    seed: int | None = 0,
    data: dict[str, Any] | None = None,
    sections: Mapping[str, dict[str, Any]] | None = None,
    of_tasks: Mapping[str, dict[str, Any]] | None = None,
    prepared: Mapping[str, dict[str, Any]] | None = None,
    events: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a run whose `cells[t][i]` has the score of each row of task i after stage t.

    Args:
        folder: Where to; must not exist.
        cells: Scores from 0 to 1; a row is `correct` if it has 1.
        tasks: Names of the tasks.
        ids: Ids of the rows of every task.
        name: Of the recipe.
        method: Its kind.
        model: Builder, or the recipe's section.
        seed: Of the run.
        data: More settings of the recipe's section `data`.
        sections: More settings of other sections of the recipe.
        of_tasks: More settings of tasks.
        prepared: Task -> what prepared.json says of it; None: there is no such file.
        events: What is recorded.
    """
    folder.mkdir(parents=True)
    recipe: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "method": {"kind": method},
        "model": {"builder": model, "path": None} if isinstance(model, str) else model,
        "data": {"template": "plain", **(data or {})},
        "tasks": [
            {"name": task, "metric": None, **(of_tasks or {}).get(task, {})} for task in tasks
        ],
    }
    for section, settings in (sections or {}).items():
        recipe[section] = {**recipe.get(section, {}), **settings}
    if prepared is not None:
        content = {"tasks": [{"name": task, **said} for task, said in prepared.items()]}
        (folder / "prepared.json").write_text(json.dumps(content))
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
            for k, score in enumerate(cell):
                row_id = ids[k] if ids else f"{task}-{k}"
                line = {"task": task, "id": row_id, "correct": score == 1, "prediction": None}
                # Files of 0-or-1 tasks need no score.
                lines.append(json.dumps(line if score in (0, 1) else {**line, "score": score}))
        (stage / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
