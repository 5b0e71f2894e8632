"""Task by task: begin, train, consolidate, checkpoint, score all tasks so far, record."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from accrete.pipeline import checkpoint
from accrete.pipeline.checkpoint import Position
from accrete.pipeline.distributed import comm
from accrete.pipeline.distributed.engine import MOMENTS
from accrete.pipeline.errors import CheckpointError, MethodError
from accrete.pipeline.interruption import InterruptionError
from accrete.pipeline.models.lines import scale_by_depth
from accrete.pipeline.models.lora import (
    ADAPTER_FILE,
    SCALE_FILE,
    Factors,
    initial_factors,
    load_factors,
    load_scales,
    save_adapter,
)
from accrete.pipeline.parts import Parts, Scores
from accrete.pipeline.records import Event
from accrete.pipeline.scorebook import Scorebook
from accrete.pipeline.stage import Live, Stage
from accrete.pipeline.train_task import train_task
from accrete.pipeline.view import LiveModel

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.prepare import TaskHandle
    from accrete.pipeline.methods.base import Method
    from accrete.pipeline.scoring import TaskScore


LIVE = "factor"
"""What the names of live factors (or weights, where those are trained) begin with."""


class StageRunner:
    """Runs a sequence from where its folder stands to its end. Collective: every method."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config = parts.config
        self.engine = parts.engine
        self.chief = parts.engine.rank == 0
        self.live = Live(engine=parts.engine, adapted=parts.adapted)
        self._past: list[Path] = []
        self.carried = False
        """Whether the live factors hold something that goes on."""
        self.opened = -1
        """The stage that `open_stage` put in place."""
        _require_consistent(parts.method)
        parts.method.bind(self.engine.rank, self.engine.world, self.engine.device)
        self._view = LiveModel(
            self.engine,
            parts.adapted,
            parts.facts,
            synced=self.config.engine.kind == "deepspeed" and self.config.engine.zero_stage == 3,
        )
        self.book = Scorebook(parts, self._view)

    def run(self) -> Scores:
        """Go from the newest checkpoint, or from the start, to the last task's scores."""
        began = time.perf_counter()
        position = self._restore()
        if position is None or (position.stage == 0 and position.step is not None):
            # No boundary holds the method's state yet, and the model is still untrained.
            self.parts.method.on_sequence_start(self._stage(0))
        if position is None:
            self.book.score_untrained()
        first = 0 if position is None else position.stage
        for index in range(first, len(self.parts.tasks)):
            here = position if position is not None and position.stage == index else None
            if here is None or here.step is not None:
                with self.parts.stop.deferred():
                    self._learn(index, here)
                    self._leave_if_asked()
                if self.parts.stop.received is not None:  # since the ranks have told each other
                    raise InterruptionError(self.parts.stop.reason)
            self.book.score_stage(index)
            position = None
        seconds = time.perf_counter() - began
        self.parts.recorder.emit(Event.RUN_FINISHED, **self.book.finish(), seconds=seconds)
        return self.book.scores

    # -- one stage ----------------------------------------------------------------------------

    def _stage(self, index: int) -> Stage:
        task = self.parts.tasks[index]
        rows = self.parts.open_rows(task, index)
        stage = Stage(
            index=index,
            task=task,
            config=self.config,
            engine=self.engine,
            adapted=self.parts.adapted,
            past=self.parts.past,
            facts=self.parts.facts,
            collator=self.parts.collator,
            rows=rows,
            rows_of=lambda other: self.parts.open_rows(self.parts.tasks[other], other),
            steps=0,
        )
        stage.rows = self.parts.method.wrap_data(stage, rows)
        stage.steps = planned_steps(self.config, index, stage.rows.steps_per_epoch)
        return stage

    def _learn(self, index: int, position: Position | None) -> None:
        """Train stage `index`, let its factors join the past, save."""
        method, recorder = self.parts.method, self.parts.recorder
        began = time.perf_counter()
        stage = self._stage(index)
        self.book.forget(index)
        if self.chief:  # what an earlier life scored belongs to a model that is no more
            self.parts.run.stage(index).score.unlink(missing_ok=True)
        if position is None:
            recorder.emit(
                Event.STAGE_STARTED,
                stage=index,
                task=stage.name,
                steps=stage.steps,
                rows=stage.rows.num_rows,
            )
        new = method.fresh_adapter or method.restarts or not self.carried
        if method.trains == "factors" and new:
            stage.write_factors(initial_factors(self.parts.adapted, self.config.seed, index))
        self.engine.reset_optimizer()
        stage.restored = position is not None and position.step is not None
        method.on_task_start(stage)
        self._warn(stage)
        start = 0
        if position is not None and position.step is not None:
            self._load_live(stage, position)
            start = position.step
        train_task(
            stage,
            method,
            recorder,
            start=start,
            after_step=lambda step, stopping: self._saved(stage, step, stopping),
            stop=self.parts.stop,
        )
        trained = time.perf_counter() - began
        self._finish(stage)
        self._warn(stage)
        recorder.emit(
            Event.CONSOLIDATED,
            stage=index,
            task=stage.name,
            train_seconds=trained,
            seconds=time.perf_counter() - began - trained,
            state_bytes=method.state_bytes(),
            **stage.notes,
        )

    def _warn(self, stage: Stage) -> None:
        """Show what the method's hooks have to say."""
        for message in stage.warnings:
            self.parts.recorder.emit(
                Event.WARNING,
                message=f"{stage.name}: {message}",
                stage=stage.index,
                task=stage.name,
            )
        stage.warnings.clear()

    def _finish(self, stage: Stage) -> None:
        """From trained factors or weights to the checkpoint of a finished stage."""
        method = self.parts.method
        folder = self.parts.run.stage(stage.index)
        factors: Factors = {}
        if method.trains == "factors":
            factors = self._consolidated(stage)
            if self.chief:
                model_path = self.parts.model_path
                if self.parts.fence is not None:
                    self.parts.fence.check()
                save_adapter(self.parts.adapted, factors, model_path, folder.adapter)
        elif self.chief:
            folder.path.mkdir(parents=True, exist_ok=True)
        method.on_task_end(stage)
        self.carried = not method.fresh_adapter
        if method.fresh_adapter:
            self._past += [folder.adapter / name for name in (ADAPTER_FILE, SCALE_FILE)]
            error = self.parts.past.add(factors)
            stage.notes["fold_error"] = error
            fresh = initial_factors(self.parts.adapted, self.config.seed, stage.index + 1)
            stage.write_factors(fresh)
        self.engine.reset_optimizer()
        method.after_consolidation(stage)
        self._save(stage, Position(stage=stage.index))

    def _consolidated(self, stage: Stage) -> Factors:
        """The trained factors as they go on: scaled if the recipe says so. Collective: yes.

        Scaled before anything looks at them: what the method measures at the task's end, the saved
        adapter, the past and the scored model are the same.
        """
        factors = stage.factors()
        shallowest = self.config.adapter.lines
        if shallowest is not None:
            factors = scale_by_depth(self.parts.adapted, factors, shallowest)
            stage.write_factors(factors)
        return factors

    # -- checkpoints --------------------------------------------------------------------------

    def _saved(self, stage: Stage, step: int, stopping: bool) -> None:
        """Save after a step if it is time, and leave if a rank was asked to stop.

        Raises:
            InterruptionError: On every rank, after the checkpoint was written.
        """
        every = self.config.checkpoint.every_steps
        # After the last step only a wish to stop is worth a checkpoint: consolidation, which ends
        # with one, may take longer than the time that is left.
        if stopping or (every is not None and step % every == 0 and step < stage.steps):
            self._save(stage, Position(stage=stage.index, step=step))
        if stopping:
            raise InterruptionError(self.parts.stop.reason)

    def _leave_if_asked(self) -> None:
        """At the end of a stage, with everything saved: leave if a rank was asked to stop.

        Collective: yes.

        Raises:
            InterruptionError: On every rank.
        """
        asked = self.parts.stop.received is not None
        if any(comm.gather(asked, self.engine.world)):
            raise InterruptionError(self.parts.stop.reason)

    def _save(self, stage: Stage, position: Position) -> None:
        """Write a checkpoint of the live state. Collective: yes."""
        began = time.perf_counter()
        state: dict[str, torch.Tensor] = {}
        # One tensor at a time, and kept by rank 0 alone: they may be all weights of the model.
        for name in self.parts.adapted.carried():
            self._keep(state, f"{LIVE}/{name}", stage.read(name))
        if position.step is not None:
            for name in self.engine.parameters:
                for key in MOMENTS:
                    self._keep(state, f"{key}/{name}", self.engine.moment(name, key))
        tensors = {"state": state}
        if position.step is None:
            kept = self.parts.method.state_dict()
            tensors["method"] = {name: value.cpu() for name, value in kept.items()}
        if self.chief:
            run = self.parts.run
            self.parts.recorder.sync()
            path = checkpoint.save(
                run.path,
                position,
                tensors,
                self.engine.optimizer_step,
                self._past,
                live=self.carried and position.step is None,
                fence=self.parts.fence,
            )
            checkpoint.prune_steps(run.path, self.config.checkpoint.keep, position)
            self.parts.recorder.emit(
                Event.CHECKPOINT,
                stage=position.stage,
                step=position.step,
                path=str(path.relative_to(run.path)),
                bytes=sum(file.stat().st_size for file in path.iterdir()),
                seconds=time.perf_counter() - began,
            )
        self._barrier()

    def _keep(self, state: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
        if self.chief:
            state[key] = value.cpu()

    def _load_live(self, live: Live, position: Position) -> None:
        """Put a checkpoint's parameters and moments back. Collective: yes."""
        manifest = checkpoint.read_manifest(
            self.parts.run.checkpoints / position.folder, verify=False
        )
        for key, value in checkpoint.load_each(self.parts.run.path, position, "state"):
            kind, _, name = key.partition("/")
            if kind == LIVE:
                live.write(name, value)
            else:
                self.engine.write_moment(name, kind, value.to(self.engine.device))
        if position.step is not None:
            self.engine.write_optimizer_step(manifest.optimizer_step)

    def _restore(self) -> Position | None:
        """Bring back what the newest sound checkpoint says; None: start from the beginning."""
        run = self.parts.run
        # Checksums are read once, by rank 0.
        seen = checkpoint.newest(run.path) if self.chief else None
        found, problems = comm.gather(seen, self.engine.world)[0]
        for problem in problems:
            self.parts.recorder.emit(Event.WARNING, message=f"checkpoint passed over: {problem}")
        if found is None:
            if problems:
                raise CheckpointError(
                    f"{run.checkpoints}: no sound checkpoint is left. Restore one from a copy, or "
                    "start a new run:\n  " + "\n  ".join(problems)
                )
            return None
        position: Position = found.position
        done = position.stage + 1 if position.step is None else position.stage
        self._load_past(found)
        if done:
            self._load_boundary(done - 1)
        self.book.read(done)
        self.parts.recorder.emit(
            Event.RESUMED,
            stage=position.stage,
            step=position.step,
            checkpoint=position.folder,
            world=self.engine.world,
        )
        return position

    def open_stage(self, index: int) -> None:
        """Put the model as it stood after stage `index`, for scoring or export. Collective: yes.

        Raises:
            CheckpointError: That stage is not finished, or its checkpoint is damaged.
        """
        folder = self.parts.run.checkpoints / Position(stage=index).folder
        self._load_past(checkpoint.read_manifest(folder))
        self._load_boundary(index)
        self.opened = index

    def evaluate(self, tasks: list[TaskHandle]) -> list[TaskScore]:
        """Score tasks on the model as it stands, without recording. Collective: yes."""
        return self.parts.evaluator(self._view, tasks)

    def _load_past(self, manifest: checkpoint.Manifest) -> None:
        for name in manifest.past:
            file = self.parts.run.path / name
            self._past.append(file)
            if file.name == ADAPTER_FILE:
                factors = load_factors(file.parent)
                self.parts.past.add(factors, load_scales(file.parent, factors))

    def _load_boundary(self, index: int) -> None:
        """The method's state after stage `index`, and the live factors if they go on."""
        run, method = self.parts.run, self.parts.method
        boundary = Position(stage=index)
        manifest = checkpoint.read_manifest(run.checkpoints / boundary.folder, verify=False)
        method.load_state_dict(checkpoint.load(run.path, boundary, "method"))
        self.carried = manifest.live
        if manifest.live:
            self._load_live(self.live, boundary)

    def _barrier(self) -> None:
        """No rank runs ahead of rank 0's writing."""
        if self.engine.world > 1:
            dist.barrier()


def _require_consistent(method: Method) -> None:
    if method.trains == "weights" and (method.fresh_adapter or method.restarts):
        raise MethodError(
            f"method {method.config.kind} trains the model's own weights, which go on from task to "
            "task: its class must say `fresh_adapter = False` and leave `restarts` False."
        )


def planned_steps(config: RunConfig, index: int, steps_per_epoch: int) -> int:
    """Optimizer steps of the task at `index`: its own number, the recipe's, or its epochs.

    A task's own epochs end at the recipe's number of steps.
    """
    task, limit = config.tasks[index], config.train.max_steps
    if task.max_steps is not None:
        return task.max_steps
    if task.epochs is None and limit is not None:
        return limit
    epochs = task.epochs if task.epochs is not None else config.train.epochs
    steps = max(1, math.ceil(epochs * steps_per_epoch))
    return steps if limit is None else min(steps, limit)
