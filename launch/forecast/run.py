"""The forecast of a whole run, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from accrete.launch.forecast.disk import Disk, disk
from accrete.launch.forecast.memory import STAGES, RankMemory, rank_memory
from accrete.launch.forecast.methods import MethodCost, Situation, epoch_rows, method_cost
from accrete.launch.forecast.rows import TaskRows
from accrete.launch.forecast.scoring import Scoring, TaskScoring, decoding_notes
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.speed import Speed, Timing
from accrete.launch.forecast.trace import BatchShape, Trace, Tracer
from accrete.launch.forecast.traffic import step_traffic
from accrete.pipeline.progress import format_duration
from accrete.pipeline.stage import accumulation, batch_share
from accrete.pipeline.stage_runner import planned_steps

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig

GRAIN = 8
"""Lengths are rounded up to a multiple of this, so that like tasks share a trace."""


@dataclass(frozen=True, kw_only=True)
class StageForecast:
    """What one stage will need."""

    task: str
    steps: int
    tokens: int
    """Prompt and answer tokens of all steps, padding left out."""
    scored_rows: int
    step_seconds: float | None
    train_seconds: float | None
    method_seconds: float | None
    """Of the method's passes at the start and the end of the stage, decompositions included."""
    scoring_seconds: float | None
    scoring_most_seconds: float | None
    """If no decoded row ends before the evaluator's limit."""
    memory: list[RankMemory]
    """At ZeRO 0 to 3; one for the plain engine."""
    state_bytes: float
    """Of the method on a rank, when the stage has ended; a bound where it depends on the rows."""
    flops: float
    """Matrix products and attention of all steps, over all ranks."""

    @property
    def seconds(self) -> float | None:
        """All of it."""
        return _total([self.train_seconds, self.method_seconds, self.scoring_seconds])

    @property
    def most_seconds(self) -> float | None:
        """All of it, if no decoded row ends before the limit."""
        return _total([self.train_seconds, self.method_seconds, self.scoring_most_seconds])


@dataclass(frozen=True, kw_only=True)
class RunForecast:
    """What a run will need."""

    parameters: int
    trained: int
    layers: int
    world: int
    device: str
    zero_stage: int | None
    accumulation: int
    speed: str
    rough: bool
    """Whether the seconds rest on an assumed share of a peak."""
    stages: list[StageForecast]
    traffic_bytes: dict[str, float]
    """ZeRO stage -> bytes that a rank sends in a step."""
    load_bytes: float
    """In a node's host memory at the start: each of its processes loads the whole model."""
    untrained_scoring_seconds: float | None
    untrained_scoring_most_seconds: float | None
    scoring: list[TaskScoring]
    """Each task's, once; none if the speed is not known."""
    disk: Disk
    notes: list[str]

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return _total([self.untrained_scoring_seconds, *(stage.seconds for stage in self.stages)])

    @property
    def most_seconds(self) -> float | None:
        """Of the whole run, if no decoded row ends before the evaluator's limit."""
        stages = (stage.most_seconds for stage in self.stages)
        return _total([self.untrained_scoring_most_seconds, *stages])

    @property
    def peaks(self) -> list[RankMemory]:
        """The stage with the highest peak, at every ZeRO stage."""
        return [
            max((stage.memory[place] for stage in self.stages), key=lambda m: m.peak)
            for place in range(len(self.stages[0].memory))
        ]

    def to_json(self, price: float | None = None) -> dict[str, Any]:
        """As `accrete plan --json` prints it; seconds and bytes."""
        content = asdict(self)
        for stage, raw in zip(self.stages, content["stages"], strict=True):
            raw["seconds"], raw["most_seconds"] = stage.seconds, stage.most_seconds
        content["seconds"], content["most_seconds"] = self.seconds, self.most_seconds
        content["peaks"] = [asdict(peak) for peak in self.peaks]
        content["disk"]["run_folder"] = self.disk.run_folder
        if price is not None and self.seconds is not None:
            content["price"] = self.seconds / 3600 * self.world * price
        return content


class Forecaster:
    """Forecasts the runs of one recipe."""

    def __init__(
        self, plan: ModelPlan, tasks: Sequence[TaskRows], world: int, procs: int | None = None
    ) -> None:
        """Put the parts together.

        Args:
            plan: The model, with the recipe.
            tasks: The rows, task by task.
            world: Ranks in all.
            procs: Ranks of a node; default: all.
        """
        self.plan = plan
        self.tracer = Tracer(plan)
        self.tasks = list(tasks)
        self.world = world
        self.procs = procs or world
        train = plan.config.train
        self.accumulation = accumulation(train.global_batch_size, train.micro_batch_size, world)
        share = batch_share(train.global_batch_size, world)
        self.rows = -(-share // self.accumulation)
        self.scoring = Scoring(plan, self.tracer, world, self.zero_stage)

    @property
    def config(self) -> RunConfig:
        """The recipe, with the precision that its method needs."""
        return self.plan.config

    @cached_property
    def stages(self) -> tuple[int | None, ...]:
        """ZeRO stages that are forecast; None is the plain engine."""
        return (None,) if self.config.engine.kind == "plain" else STAGES

    @property
    def zero_stage(self) -> int | None:
        """The recipe's own; None is the plain engine."""
        return None if self.config.engine.kind == "plain" else self.config.engine.zero_stage

    # -- batches ------------------------------------------------------------------------------

    def typical(self, task: TaskRows) -> BatchShape:
        """A micro-batch of mean padded lengths."""
        return BatchShape(self.rows, _rounded(task.padded_prompt), task.padded_answer)

    def largest(self, task: TaskRows) -> BatchShape:
        """The micro-batch of the longest rows."""
        return BatchShape(self.rows, task.longest_prompt, task.longest_answer)

    def scored(self, task: TaskRows) -> BatchShape:
        """A scoring batch of rows of mean length."""
        length = task.padded_prompt + task.padded_answer
        rows = max(1, min(self.config.eval.batch_tokens // length, task.scored))
        return BatchShape(rows, _rounded(task.padded_prompt), task.padded_answer)

    def probes(self) -> list[BatchShape]:
        """Micro-batches to calibrate on: the shortest and the longest task's, if they differ."""
        shapes = [self.typical(task) for task in self.tasks]
        shapes.sort(key=lambda shape: (shape.prompt + shape.answer, shape.answer))
        first, last = shapes[0], shapes[-1]
        near = 1.3 * (first.prompt + first.answer) >= last.prompt + last.answer
        return [last] if near else [first, last]

    # -- the parts ----------------------------------------------------------------------------

    @property
    def ahead(self) -> list[TaskRows]:
        """Tasks that the untrained model is scored on."""
        return self.tasks[1:] if self.config.eval.forward_transfer else []

    def seen(self, index: int) -> list[TaskRows]:
        """Tasks that are scored after a stage."""
        return self.tasks[: index + 1 + self.config.eval.forward_transfer]

    @cached_property
    def costs(self) -> list[MethodCost]:
        """The method's, of every stage."""
        return [self.cost(index) for index in range(len(self.tasks))]

    def cost(self, index: int) -> MethodCost:
        """The method's, at a stage."""
        task = self.tasks[index]
        return method_cost(
            Situation(
                plan=self.plan,
                tracer=self.tracer,
                world=self.world,
                index=index,
                rows=task.train,
                batch=self.largest(task),
                classes=sum(seen.classes for seen in self.tasks[: index + 1]),
            )
        )

    def memory(self, index: int, cost: MethodCost) -> list[RankMemory]:
        """Of a stage, at every ZeRO stage."""
        trace = self.tracer.trace(self.largest(self.tasks[index]))
        scoring = max(self.scoring.peak(task, self.scored(task)) for task in self.seen(index))
        trace = replace(trace, scoring=scoring)
        running = self.running(self.tasks[index], cost)
        device = self.plan.device
        return [
            rank_memory(
                self.plan, stage, self.world, self.accumulation, trace, cost, running, device
            )
            for stage in self.stages
        ]

    def running(self, task: TaskRows, cost: MethodCost) -> float:
        """Bytes alive in a micro-batch of the method's passes over a task."""
        shape = self.largest(task)
        if cost.one_by_one:
            shape = replace(shape, rows=1)
        if cost.gradient_rows:
            return self._passes.trace(shape).activations
        return self.tracer.scoring(shape) if cost.forward_rows else 0.0

    @cached_property
    def _passes(self) -> Tracer:
        """Traces passes with gradients; they need no model of their own where A is trained."""
        method = self.plan.method
        alone = method.trains == "factors" and not method.trainable("A")
        return Tracer(self.plan, inputs=True) if alone else self.tracer

    def wire(self, stage: int | None) -> float:
        """Bytes that a rank sends in a step."""
        return step_traffic(self.plan, stage, self.world, self.accumulation).wire(self.world)

    def disk(self) -> Disk:
        """What the whole run writes."""
        scored = [*self.ahead, *(task for i in range(len(self.tasks)) for task in self.seen(i))]
        stored = sum(task.stored for task in self.tasks)
        return disk(self.plan, self.costs, sum(task.scored for task in scored), stored)

    def forecast(self, speed: Speed | None) -> RunForecast:
        """The whole run.

        Args:
            speed: Turns arithmetic into seconds; None: no seconds.
        """
        scoring = [] if speed is None else self._scoring(speed)
        ahead = scoring[1:] if self.ahead else []
        return RunForecast(
            parameters=self.plan.base_parameters,
            trained=sum(self.plan.trained),
            layers=len(self.plan.layers),
            world=self.world,
            device=self.plan.device,
            zero_stage=self.zero_stage,
            accumulation=self.accumulation,
            speed="" if speed is None else speed.basis,
            rough=speed is None or speed.rough,
            stages=[
                self._stage(index, cost, speed, scoring) for index, cost in enumerate(self.costs)
            ],
            traffic_bytes={
                "plain" if stage is None else str(stage): self.wire(stage) for stage in self.stages
            },
            load_bytes=float(self.procs * self.plan.whole_bytes),
            untrained_scoring_seconds=None if speed is None else _seconds(ahead),
            untrained_scoring_most_seconds=None if speed is None else _most_seconds(ahead),
            scoring=scoring,
            disk=self.disk(),
            notes=self._notes(speed),
        )

    def _scoring(self, speed: Speed) -> list[TaskScoring]:
        return [self.scoring.of(task, self.typical(task), speed) for task in self.tasks]

    def _stage(
        self, index: int, cost: MethodCost, speed: Speed | None, scoring: list[TaskScoring]
    ) -> StageForecast:
        task, config = self.tasks[index], self.config
        batch = config.train.global_batch_size
        counts = [other.train for other in self.tasks]
        epoch = epoch_rows(config.method.kind, config.method, counts, index, batch)
        per_epoch = -(-epoch // batch)
        steps = planned_steps(config, index, per_epoch)
        full, rest = divmod(steps, per_epoch)
        rows = full * epoch + min(rest * batch, epoch)
        seen = self.seen(index)
        trace = self.tracer.trace(self.typical(task))
        flops = (trace.forward_flops * (1 + cost.step_forwards) + trace.backward_flops) * (
            self.accumulation
        ) + cost.step_flops
        step = train = passes = None
        if speed is not None:
            timing = speed.timing(trace, self.wire(self.zero_stage))
            step = self._step_seconds(timing, trace, cost)
            train = steps * step
            passes = self._pass_seconds(task, timing, cost, speed)
        return StageForecast(
            task=task.name,
            steps=steps,
            tokens=round(rows * (task.prompt + task.answer)),
            scored_rows=sum(other.scored for other in seen),
            step_seconds=step,
            train_seconds=train,
            method_seconds=passes,
            scoring_seconds=_seconds(scoring[: len(seen)]) if scoring else None,
            scoring_most_seconds=_most_seconds(scoring[: len(seen)]) if scoring else None,
            memory=self.memory(index, cost),
            state_bytes=cost.after_bytes,
            flops=flops * steps * self.world,
        )

    def _step_seconds(self, timing: Timing, trace: Trace, cost: MethodCost) -> float:
        rate = (trace.forward_flops + trace.backward_flops) / timing.micro
        extra = self.accumulation * cost.step_forwards * timing.forward + cost.step_flops / rate
        return timing.step(self.accumulation) + extra

    def _pass_seconds(
        self, task: TaskRows, timing: Timing, cost: MethodCost, speed: Speed
    ) -> float:
        share = self.rows * self.world
        seconds = speed.eigen_seconds(cost.eigen_flops)
        seconds += cost.forward_rows / share * timing.forward
        if cost.one_by_one and cost.gradient_rows:
            single = replace(self.typical(task), rows=1)
            each = speed.timing(self.tracer.trace(single), 0.0).micro
            return seconds + cost.gradient_rows / self.world * each
        return seconds + cost.gradient_rows / share * timing.micro

    def _notes(self, speed: Speed | None) -> list[str]:
        notes = []
        if any(not cost.known for cost in self.costs):
            notes.append(
                f"method {self.config.method.kind} is not accrete's own: its state, passes and "
                "further arithmetic are left out"
            )
        notes += decoding_notes(self.tasks, self.config.eval.decode_misses)
        if speed is not None:
            notes += self._beside_notes(speed)
        if any(task.assumed for task in self.tasks):
            notes.append(
                "rows were not read: their numbers and lengths are assumed, and metrics follow "
                "the recipe and the layout"
            )
        if self.plan.device == "cuda":
            notes.append(
                "the GPU's own context (0.3 to 0.8 GiB) comes on top of the memory; `fits into` "
                "leaves room for it"
            )
        return notes

    def _beside_notes(self, speed: Speed) -> list[str]:
        """What stands on an assumption of its own."""
        notes = []
        longest = max(speed.eigen_seconds(cost.eigen_flops) for cost in self.costs)
        if longest > 0:
            notes.append(
                f"decompositions of method {self.config.method.kind}: up to "
                f"{format_duration(longest)} a task, at an assumed speed (an order of magnitude)"
            )
        if not speed.rough and any(task.decoded for task in self.tasks):
            notes.append("the calibration measures no decoding: its one-token forwards are assumed")
        return notes


def _total(parts: Sequence[float | None]) -> float | None:
    """The sum, if every part is known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _seconds(scoring: Sequence[TaskScoring]) -> float:
    return sum(task.seconds for task in scoring)


def _most_seconds(scoring: Sequence[TaskScoring]) -> float:
    return sum(task.most_seconds for task in scoring)


def _rounded(tokens: int) -> int:
    return -(-tokens // GRAIN) * GRAIN
