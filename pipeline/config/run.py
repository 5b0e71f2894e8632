"""The whole recipe as one typed value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.distributed.config import EngineConfig
from accrete.pipeline.methods.base import MethodConfig
from accrete.pipeline.models.config import AdapterConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One task's training; the same for every task unless the task says otherwise."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows per optimizer step over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows per forward pass on one rank; accumulation follows from it."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over a task's rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per task; overrides `epochs`. A task with `epochs` of its own ends there at
    the latest."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD without momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates, from 0 to below 1."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, per task."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up at the start of every task."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the whole gradient to this norm, as DeepSpeed does; off by default, because a penalty's
    gradient would count in the norm and shrink the task's."""

    def __post_init__(self) -> None:
        """Refuse what the optimizer would refuse on every rank, once the run has begun."""
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` is {list(self.betas)}; allowed: two numbers >= 0 and < 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How tasks are scored after each stage."""

    mode: Literal["auto", "forward", "generate"] = "auto"
    """`forward`: greedy exact match by one teacher-forced pass; `generate`: free greedy decoding;
    auto: forward for `exact_match` and `raw_match` tasks, generate for the others."""
    batch_tokens: Annotated[int, Field(ge=64)] = 8192
    """Padded tokens per scoring batch on one rank."""
    decode_misses: bool = False
    """After a forward pass, also decode the misses, so that their text is recorded and answers that
    are right after normalisation count."""
    forward_transfer: bool = True
    """Also score each task before it is trained (untrained, and just before its stage)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved beside the end of every stage."""

    every_steps: Annotated[int, Field(ge=1)] | None = 200
    """Save in mid-task every so many steps; null: only at task boundaries."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Step checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and written beside events.jsonl."""

    console: Literal["auto", "rich", "plain", "quiet"] = "auto"
    """auto: live progress in a terminal, plain lines otherwise."""
    every_steps: Annotated[int, Field(ge=1)] = 10
    """Plain lines: one every so many steps."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    name: str
    """Name of the recipe."""
    description: str = ""
    """One sentence for `accrete recipes ls`."""
    seed: int = 0
    """Seed of factors, data order and dropout."""
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    """The sequence, in order."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    method: MethodConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
