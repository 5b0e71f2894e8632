"""What a branch takes along of its parent: no more than the shared stages."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.launch.branch import adopt_adapter, copy_stages, write_lineage
from accrete.launch.execute import announce
from accrete.pipeline import checkpoint
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import CheckpointError
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.sequential import SequentialConfig
from accrete.pipeline.records import Recorder, read_events
from accrete.pipeline.run_dir import RunDir, read_json, write_json
from accrete.pipeline.scoring import TaskScore
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))


class Talking(Method):
    """Has something to say before and after every task; one adapter goes through all."""

    Config = SequentialConfig
    fresh_adapter = False

    def on_task_start(self, stage):
        stage.warnings.append("begins")

    def on_task_end(self, stage):
        stage.warnings.append("ends")


def outside(view, tasks):
    return [TaskScore(task=t.name, score=50.0, rows=[], seconds=1.0, outside=40.0) for t in tasks]


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "method_class", lambda kind: Talking)
    parts = toys.make_parts(
        ALONE, tmp_path, model="llama", zero=None, micro=4, rows=8, evaluator=outside
    )
    StageRunner(parts).run()
    parts.recorder.close()
    write_json(parts.run.run, {"method": "sequential"})
    return parts


def branched(parent, folder):
    child = RunDir(folder)
    child.create()
    copy_stages(parent.run, child, 0, same_method=True)
    return child


def warnings_of(run):
    return [e["message"] for e in read_events(run.events) if e["event"] == "warning"]


def test_what_later_stages_warned_of_stays_with_the_parent(parent, tmp_path):
    told = warnings_of(parent.run)
    assert [message.split()[-1] for message in told] == ["begins", "ends", "them"] * 2
    child = branched(parent, tmp_path / "child")
    assert warnings_of(child) == told[:3]


def test_a_branch_of_a_branch_from_before_its_settings_were_written_down(tmp_path):
    parent, child = RunDir(tmp_path / "parent"), RunDir(tmp_path / "child")
    parent.create()
    child.create()
    load_recipe("quickstart").dump_yaml(parent.recipe)
    write_json(parent.lineage, {"parent": "x", "stage": 0, "parent_method": "sequential"})
    write_lineage(parent, child, 1)
    (learned,) = read_json(child.lineage)["learned"]
    assert learned["stage"] == 1


@pytest.mark.parametrize("change", [None, "method", "eval"])
def test_a_branch_announces_what_is_not_as_its_parent_said(parent, change):
    split = SimpleNamespace(mean_prompt_tokens=10.0, mean_answer_tokens=2.0)
    stats = SimpleNamespace(train=split, warnings=["odd"])
    tasks = [
        SimpleNamespace(name=t.name, num_train=8, num_eval=4, stats=stats) for t in parent.tasks
    ]
    config = parent.config

    def announced(config):
        with Recorder(parent.run.events) as recorder:
            announce(dataclasses.replace(parent, config=config, tasks=tasks, recorder=recorder))
        return [e for e in read_events(parent.run.events) if e["event"] == "run_started"]

    assert len(announced(config)) == 1
    if change == "method":
        config = dataclasses.replace(config, method=SequentialConfig(kind="inc_lora"))
    elif change == "eval":
        wanted = not config.eval.forward_transfer
        config = dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, forward_transfer=wanted)
        )
    found = announced(config)
    assert len(found) == (1 if change is None else 2)
    assert found[-1]["forward_transfer"] == config.eval.forward_transfer


@pytest.mark.parametrize("damage", [None, "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_becomes_the_past_is_checked_whole(parent, tmp_path, damage):
    """Its scale, too, which stands in the file beside the factors."""
    child = branched(parent, tmp_path / "child")
    adopt_adapter(child, 0, fresh_adapter=True)
    shared = child.checkpoints / "stage-0"
    assert not json.loads((shared / "checkpoint.json").read_text())["live"]
    if damage is None:
        checkpoint.read_manifest(shared)
        return
    file = child.stage(0).adapter / damage
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=damage):
        checkpoint.read_manifest(shared)
