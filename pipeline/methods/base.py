"""The interface between the training loop and a continual-learning method.

A method is one class with one frozen config. Every hook has a default that does nothing, so a
method writes only what it needs. All hooks run on every rank, in the order of this file, and may
use collectives as long as every rank does.

Checked on paper against all methods of this field that accrete plans (docs/concepts.md has the
table): additive penalties use `before_backward`, gradient projections register hooks in
`on_task_start`, update projections use `before_step`/`after_step`, auxiliary losses `loss_terms`,
statistics the passes in `on_task_start`/`on_task_end`, replay `wrap_data`, joint and per-task
training `restarts` (the former with `wrap_data` over `stage.rows_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.data.store import TrainRows
    from accrete.pipeline.stage import Stage


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's settings; `kind` picks the method."""

    kind: str
    """Name of the method, as `accrete methods ls` lists it."""

    per_task: ClassVar[tuple[str, ...]] = ()
    """Settings that may be a list with one value for every task; its length is checked when the
    recipe is read."""


class Method:
    """A continual-learning method; subclass it and override the hooks you need."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    summary: ClassVar[str] = ""
    """One line for `accrete methods ls`."""
    source: ClassVar[str] = ""
    """The paper."""
    kept: ClassVar[str] = ""
    """What it carries from task to task. Of this and the next three the first sentence says it in
    short; further ones follow after ". ". `accrete methods show` prints them, docs/methods.md has
    the same text."""
    cost: ClassVar[str] = ""
    """What it adds to a step and to a task."""
    guarantee: ClassVar[str] = ""
    """What holds whatever the data."""
    deviations: ClassVar[str] = ""
    """Where it differs from the paper or its code."""
    trains: ClassVar[Literal["factors", "weights"]] = "factors"
    """`weights`: the model's own weights are trained, in fp32 and without any adapter; they go on
    from task to task. Give `fresh_adapter = False` with it."""
    fresh_adapter: ClassVar[bool] = True
    """True: every task trains new factors and the finished ones join the past.
    False: one adapter is trained through all tasks."""
    restarts: ClassVar[bool] = False
    """True: every stage starts from the untrained model (with `fresh_adapter` False)."""
    peeks: ClassVar[bool] = False
    """True: `before_backward` reads factors with `engine.peek`."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def bind(self, rank: int, world: int, device: torch.device) -> None:
        """Where this process stands; called once, before every other hook."""

    def trainable(self, factor: str) -> bool:
        """Whether factor `"A"` or `"B"` is trained; a frozen one keeps what a method wrote."""
        return True

    @property
    def weights(self) -> Literal["all", "linear"]:
        """Which weights are trained where `trains` is `weights`: all, or the matrices of the linear
        layers inside the blocks (no embeddings, norms, biases, no output head).
        """
        return "all"

    def layer_scales(self, layers: list[str]) -> dict[str, float]:
        """What the scale alpha / rank of adapted layers is multiplied by, through all tasks, by
        name; layers left out keep theirs. Called once, before the engine is built.
        """
        return {}

    @property
    def merge(self) -> Literal["exact", "factor_sum"]:
        """How finished factors are put together; `factor_sum` reproduces reference code."""
        return "exact"

    def on_sequence_start(self, stage: Stage) -> None:
        """With the untrained model. On resume it is called again only while no task is finished;
        later the state is loaded instead.
        """

    def on_task_start(self, stage: Stage) -> None:
        """Engine and factors are ready, optimizer state is zero. Called again on resume in
        mid-task, before the factors are restored: it must depend on `state_dict` alone (where
        weights are trained, also on those of the last boundary: they are in place by then).
        """

    def wrap_data(self, stage: Stage, rows: TrainRows) -> TrainRows:
        """The rows to train on: this task's, or a mix with those of `stage.rows_of(earlier)`."""
        return rows

    def before_step(self, stage: Stage) -> None:
        """Before the first forward of an optimizer step: snapshots."""

    def loss_terms(
        self, stage: Stage, batch: Batch, logits: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Differentiable scalars added to this micro-batch's loss, by name.

        The task loss of a micro-batch is its sum over label tokens divided by the step's global
        token count; a term is averaged over ranks and micro-batches.
        """
        return {}

    def before_backward(self, stage: Stage, last: bool) -> None:
        """After each forward; `last` marks the micro-batch that ends the step. The place to compute
        what a gradient hook adds, from `engine.peek`, without any traffic.
        """

    def after_backward(self, stage: Stage) -> None:
        """The gap: gradients are whole and reduced, the optimizer has not stepped. Read and edit
        them with `engine.gradient` and `engine.write_gradient` (collectives).
        """

    def after_step(self, stage: Stage) -> None:
        """Weights have moved; correct them with `engine.value` and `engine.write`."""

    def step_sums(self) -> dict[str, torch.Tensor]:
        """Up to six scalars of the last step for its event (more are refused); the loop sums them
        over ranks together with the loss, so they cost no further collective. `penalty`,
        `penalty_norm` and `task_norm` are known to the loop, which logs the penalty's share of the
        gradient.
        """
        return {}

    def on_task_end(self, stage: Stage) -> None:
        """After the last step, before the factors join the past: Fisher, features, prototypes."""

    def after_consolidation(self, stage: Stage) -> None:
        """The finished factors are part of the past and the live adapter is neutral."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything carried to the next task, whole, by name; on rank 0 (other ranks may return
        an empty dict). Collective: yes.
        """
        return {}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`; every rank gets the whole dict and keeps its part."""

    def state_bytes(self) -> int:
        """Bytes this rank keeps between tasks."""
        return 0


__all__: Sequence[str] = ["Method", "MethodConfig"]
