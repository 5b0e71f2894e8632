"""Checkpoints: what is written is what is read, and damage is noticed."""

from __future__ import annotations

import json

import pytest
import torch

from accrete.pipeline import checkpoint
from accrete.pipeline.checkpoint import Position
from accrete.pipeline.errors import CheckpointError


def write(run, position, value=1.0, past=()):
    tensors = {"state": {"factor/a": torch.full((3, 2), value), "empty": torch.zeros(0)}}
    if position.step is None:
        tensors["method"] = {"fisher/x": torch.arange(4.0)}
    return checkpoint.save(run, position, tensors, 7, list(past), live=True)


def test_round_trip(tmp_path):
    past = tmp_path / "stages" / "0" / "adapter.bin"
    past.parent.mkdir(parents=True)
    past.write_bytes(b"factors")
    write(tmp_path, Position(stage=0), past=[past])
    manifest, problems = checkpoint.newest(tmp_path)
    assert problems == []
    assert manifest.position == Position(stage=0)
    assert manifest.optimizer_step == 7
    assert manifest.live
    assert list(manifest.past) == ["stages/0/adapter.bin"]
    state = checkpoint.load(tmp_path, Position(stage=0), "state")
    assert torch.equal(state["factor/a"], torch.ones(3, 2))
    assert checkpoint.load(tmp_path, Position(stage=0), "nothing") == {}


def test_a_nan_is_written_as_it_is_and_another_number_is_noticed(tmp_path, monkeypatch):
    """Such as in an unused row of a base's embedding."""
    value = torch.tensor([1.0, float("nan")])
    checkpoint.save(tmp_path, Position(stage=0), {"state": {"w": value}}, 1, [], live=True)
    assert checkpoint.load(tmp_path, Position(stage=0), "state")["w"].isnan().tolist() == [0, 1]
    for other in (torch.tensor([2.0, float("nan")]), value[:1], value[None]):
        monkeypatch.setattr(checkpoint, "load_file", lambda path, other=other: {"w": other})
        with pytest.raises(CheckpointError, match="differs from what was written"):
            checkpoint.save(tmp_path, Position(stage=1), {"state": {"w": value}}, 1, [], live=True)


def test_newest_is_by_position_not_by_name(tmp_path):
    for position in (
        Position(stage=1),
        Position(stage=9),
        Position(stage=2, step=90),
        Position(stage=2, step=100),
        Position(stage=10, step=5),
        Position(stage=2),
    ):
        write(tmp_path, position)
    assert [p.folder for p in checkpoint.positions(tmp_path)] == [
        "stage-1",
        "stage-2-step-90",
        "stage-2-step-100",
        "stage-2",
        "stage-9",
        "stage-10-step-5",
    ]
    assert checkpoint.newest(tmp_path)[0].position == Position(stage=10, step=5)


@pytest.mark.parametrize("damage", ["bytes", "missing", "manifest", "past", "format"])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path, damage):
    past = tmp_path / "adapter.bin"
    past.write_bytes(b"factors")
    write(tmp_path, Position(stage=0))
    folder = write(tmp_path, Position(stage=1), past=[past])
    if damage == "bytes":
        content = bytearray((folder / "state.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "state.safetensors").write_bytes(content)
    elif damage == "missing":
        (folder / "method.safetensors").unlink()
    elif damage == "manifest":
        (folder / "checkpoint.json").write_text("{")
    elif damage == "past":
        past.write_bytes(b"other")
    else:
        raw = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**raw, "format": 99}))
    with pytest.raises(CheckpointError):
        checkpoint.read_manifest(folder)
    manifest, problems = checkpoint.newest(tmp_path)
    assert manifest.position == Position(stage=0)
    assert len(problems) == 1


@pytest.mark.parametrize("damage", ["bytes", "missing"])
def test_in_mid_task_the_boundary_before_counts_as_well(tmp_path, damage):
    """It has the method's state, without which the task would go on with no memory."""
    write(tmp_path, Position(stage=0))
    boundary = write(tmp_path, Position(stage=1))
    write(tmp_path, Position(stage=2, step=4))
    assert checkpoint.newest(tmp_path)[0].position == Position(stage=2, step=4)
    path = boundary / "method.safetensors"
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.unlink()
    manifest, problems = checkpoint.newest(tmp_path)
    assert manifest.position == Position(stage=0)
    assert len(problems) == 2


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    write(tmp_path, Position(stage=0))
    part = tmp_path / "checkpoints" / ".stage-1.part"
    part.mkdir()
    (part / "state.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "stage-1").mkdir()
    assert checkpoint.positions(tmp_path) == [Position(stage=0)]
    write(tmp_path, Position(stage=1))
    assert not part.exists()
    assert checkpoint.newest(tmp_path)[0].position == Position(stage=1)


def test_a_checkpoint_that_somebody_put_aside_does_not_count(tmp_path):
    for position in (Position(stage=0), Position(stage=1), Position(stage=2, step=4)):
        folder = write(tmp_path, position)
    folder.rename(folder.with_name("stage-2-step-4.bad"))
    boundary = tmp_path / "checkpoints" / "stage-1"
    boundary.rename(boundary.with_name("stage-1-old"))
    assert checkpoint.positions(tmp_path) == [Position(stage=0)]
    assert checkpoint.newest(tmp_path)[1] == []


def test_pruning_keeps_the_newest_steps_and_all_boundaries(tmp_path):
    write(tmp_path, Position(stage=0))
    for step in (2, 4, 6, 8):
        write(tmp_path, Position(stage=1, step=step))
    checkpoint.prune_steps(tmp_path, keep=2, written=Position(stage=1, step=8))
    assert [p.folder for p in checkpoint.positions(tmp_path)] == [
        "stage-0",
        "stage-1-step-6",
        "stage-1-step-8",
    ]
    checkpoint.prune_steps(tmp_path, keep=2, written=Position(stage=1))
    assert [p.folder for p in checkpoint.positions(tmp_path)] == ["stage-0"]


def test_pruning_behind_damage_keeps_what_was_just_written(tmp_path):
    """The steps after it are those of a life whose boundary was lost."""
    for stage, step in ((0, None), (1, None), (2, 200), (2, 400)):
        write(tmp_path, Position(stage=stage, step=step))
    damage = tmp_path / "checkpoints" / "stage-1" / "state.safetensors"
    damage.write_bytes(damage.read_bytes()[:-1] + b"x")
    assert checkpoint.newest(tmp_path)[0].position == Position(stage=0)
    for step in (200, 400, 600):
        written = Position(stage=1, step=step)
        write(tmp_path, written)
        checkpoint.prune_steps(tmp_path, keep=2, written=written)
        assert checkpoint.newest(tmp_path)[0].position == written
    assert [p.folder for p in checkpoint.positions(tmp_path)] == [
        "stage-0",
        "stage-1-step-400",
        "stage-1-step-600",
        "stage-1",
    ]


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    for stage in (0, 1):
        write(tmp_path, Position(stage=stage))
    digest = checkpoint.digest

    def failing(path):
        if "stage-1" in str(path):
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr(checkpoint, "digest", failing)
    found, problems = checkpoint.newest(tmp_path)
    assert found.position == Position(stage=0)
    assert "Input/output error" in problems[0]
