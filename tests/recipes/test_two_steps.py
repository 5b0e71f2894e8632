"""Two steps of every task on real rows, by one plain process inside this one.

The toy model learns nothing: rows, prompts, scoring by both ways, methods and files are on trial.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accrete.eval import report
from accrete.launch.execute import announce, build
from accrete.launch.folder import write_start
from accrete.launch.prepare import prepare
from accrete.pipeline.config.library import recipe_names
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.run_dir import RunDir
from accrete.pipeline.stage_runner import StageRunner

COLLECTIONS = ("standard_cl", "long_sequence", "long_sequence_sapt", "superni")


WITH_ROWS = [name for name in recipe_names() if name.split("/")[0] in COLLECTIONS]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_two_steps_of_every_task(
    name: str, compact: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    # After each of fifteen tasks it takes longer than the task.
    monkeypatch.setattr(report, "write_report", lambda _: None)
    own = load_recipe(name).config
    recipe = load_recipe(
        name,
        [
            f"data.root={compact}",
            f"model.path={tiny_t5}",
            "model.builder=null",
            *(["method.fisher_rows=4"] if own.method.kind == "ewc_lora" else []),
            "engine.kind=plain",
            "engine.procs=1",
            "engine.device=cpu",
            "data.max_train_examples=16",
            "data.max_eval_examples=2",
            "data.max_source_tokens=256",
            "data.max_target_tokens=30",
            "train.global_batch_size=8",
            "train.max_steps=2",
            "eval.forward_transfer=false",
            "log.console=quiet",
        ],
    )
    folder = RunDir(tmp_path / "run")
    prepared = prepare(recipe.config, lambda _: None)
    folder.create()
    write_start(folder, recipe, prepared)
    parts = build(folder, recipe.config, Ranks(0, 1, torch.device("cpu")))
    with parts.recorder:
        announce(parts)
        StageRunner(parts).run()
    tasks = [task.name for task in recipe.config.tasks]
    content = json.loads(folder.matrix.read_text())
    assert content["tasks"] == tasks
    assert [len(row) for row in content["matrix"]] == list(range(1, len(tasks) + 1))
    assert all(0.0 <= score <= 100.0 for row in content["matrix"] for score in row)
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 2 * len(tasks)
    metric = "rouge_l" if name.startswith("superni/") else "exact_match"
    assert {task.metric for task in prepared.tasks} == {metric}
