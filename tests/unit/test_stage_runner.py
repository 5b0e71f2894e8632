"""What methods may ask of the stage runner, on a toy model in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.pipeline import checkpoint
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.sequential import SequentialConfig
from accrete.pipeline.models.lora import initial_factors, load_factors
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))


class Joined:
    """Rows of two sources, one after the other."""

    def __init__(self, first, second):
        self.all = first.all + second.all
        self.num_rows = len(self.all)
        self.steps_per_epoch = first.steps_per_epoch + second.steps_per_epoch
        self._first, self._second = first, second

    def rows(self, step, rank, world):
        own = step % self.steps_per_epoch
        if own < self._first.steps_per_epoch:
            return self._first.rows(own, rank, world)
        return self._second.rows(own - self._first.steps_per_epoch, rank, world)


class Joint(Method):
    Config = SequentialConfig
    fresh_adapter = False
    restarts = True

    def __init__(self, config):
        super().__init__(config)
        self.calls = []

    def wrap_data(self, stage, rows):
        return Joined(stage.rows_of(0), rows) if stage.index else rows

    def on_sequence_start(self, stage):
        self.calls.append("sequence")

    def on_task_start(self, stage):
        self.calls.append("start")
        self.started = stage.factors()

    def before_step(self, stage):
        self.calls.append("before_step")

    def loss_terms(self, stage, batch, logits):
        self.calls.append("loss")
        return {"small": 1e-3 * logits.square().mean()}

    def before_backward(self, stage, last):
        self.calls.append("last" if last else "backward")

    def after_backward(self, stage):
        self.calls.append("gap")

    def after_step(self, stage):
        self.calls.append("after_step")

    def on_task_end(self, stage):
        self.calls.append("end")

    def after_consolidation(self, stage):
        self.calls.append("consolidated")


@pytest.fixture
def run(tmp_path, monkeypatch):
    def make(method):
        monkeypatch.setattr(toys, "method_class", lambda kind: method)
        parts = toys.make_parts(
            ALONE, tmp_path, model="llama", zero=None, micro=4, method="asked", rows=16
        )
        StageRunner(parts).run()
        parts.recorder.close()
        return parts

    return make


def test_hooks_run_in_their_order(run):
    calls = run(Joint).method.calls
    step = ["before_step", "loss", "backward", "loss", "last", "gap", "after_step"]
    stage = lambda steps: ["start", *step * steps, "end", "consolidated"]  # noqa: E731
    # 16 rows are 2 steps of 8; the second stage sees both tasks.
    assert calls == ["sequence", *stage(2), *stage(4)]


def test_restarts_begin_every_stage_untrained(run):
    parts = run(Joint)
    expected = initial_factors(parts.adapted, parts.config.seed, 1)
    for name, (a, b) in parts.method.started.items():
        assert torch.equal(a, expected[name][0])
        assert torch.equal(b, expected[name][1])
    assert parts.past.stages == []


def test_one_adapter_goes_on_by_default(run):
    class OneAdapter(Joint):
        restarts = False

    parts = run(OneAdapter)
    before = load_factors(parts.run.stage(0).adapter)
    for name, (a, b) in parts.method.started.items():
        assert torch.equal(a, before[name][0])
        assert torch.equal(b, before[name][1])


class Remembers(Method):
    """Measures the untrained model, keeps it as its state."""

    Config = SequentialConfig

    def on_sequence_start(self, stage):
        self.kept = {"start": torch.cat([a.flatten() for a, _ in stage.factors().values()])}

    def state_dict(self):
        return self.kept

    def load_state_dict(self, tensors):
        self.kept = tensors


def test_what_was_measured_at_the_start_outlives_a_cut_in_the_first_task(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "method_class", lambda kind: Remembers)
    params = {"model": "llama_short", "zero": None, "micro": 4, "rows": 16, "every_steps": 1}

    def start():
        parts = toys.make_parts(ALONE, tmp_path, **params)
        return parts, StageRunner(parts)

    parts, runner = start()
    save = runner._save

    def save_and_stop(stage, position):
        save(stage, position)
        raise KeyboardInterrupt

    runner._save = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    parts.recorder.close()
    kept = parts.method.kept["start"]
    again, runner = start()
    runner.run()
    again.recorder.close()
    assert torch.equal(again.method.kept["start"], kept)


class FrozenA(Method):
    Config = SequentialConfig

    def trainable(self, factor):
        return factor == "B"

    def on_task_start(self, stage):
        for layer in stage.adapted.layers.values():
            stage.write(layer.a, torch.full_like(stage.read(layer.a), 0.25))


def test_a_frozen_factor_keeps_what_the_method_wrote(run, monkeypatch):
    parts = run(FrozenA)
    for stage in (0, 1):
        for a, b in load_factors(parts.run.stage(stage).adapter).values():
            assert torch.equal(a, torch.full_like(a, 0.25))
            assert b.abs().max() > 0


@pytest.mark.parametrize("content", [b"", b'{"lora_alpha": 99, "alpha_pattern": {}, "r": 2}'])
def test_a_past_whose_scale_is_damaged_is_passed_over(run, content):
    parts = run(FrozenA)
    (parts.run.stage(1).adapter / "adapter_config.json").write_bytes(content)
    found, problems = checkpoint.newest(parts.run.path)
    assert found.position == checkpoint.Position(stage=0)
    assert "adapter_config.json" in problems[0]


def test_no_checkpoint_is_newer_on_disk_than_its_events(tmp_path, monkeypatch):
    """A step does not wait for the disk, and a node may be lost right after a checkpoint."""
    parts = toys.make_parts(ALONE, tmp_path, model="llama_short", zero=None, micro=4, every_steps=1)
    done = []

    def noted(owner, name):
        function = getattr(owner, name)

        def call(*given, **fields):
            done.append(given[0] if name == "emit" else name)
            return function(*given, **fields)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((parts.recorder, "emit"), (parts.recorder, "sync"), (checkpoint, "save")):
        noted(owner, name)
    StageRunner(parts).run()
    parts.recorder.close()
    saves = [place for place, what in enumerate(done) if what == "save"]
    assert len(saves) == 6
    assert {done[place - 1] for place in saves} == {"sync"}
    assert "step" in [done[place - 2] for place in saves]
