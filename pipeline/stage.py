"""Everything one stage works with: the value that every hook of a method receives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.collate import Batch, Collator
    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.data.prepare import TaskHandle
    from accrete.pipeline.data.store import TrainRows
    from accrete.pipeline.distributed.engine import Engine
    from accrete.pipeline.models.load import ModelFacts
    from accrete.pipeline.models.lora import AdaptedModel, Factors
    from accrete.pipeline.models.past import Past


@dataclass(kw_only=True)
class Live:
    """What is trained, whole and by name, however it is sharded."""

    engine: Engine
    adapted: AdaptedModel

    def factors(self) -> Factors:
        """The live (A, B) of every layer, whole, fp32. Collective: yes."""
        result: Factors = {}
        for layer in self.adapted.layers.values():
            result[layer.name] = (self.read(layer.a), self.read(layer.b))
        return result

    def read(self, name: str) -> torch.Tensor:
        """One factor (or weight of a `FullModel`), trained or frozen, whole. Collective: yes."""
        if name in self.engine.parameters:
            return self.engine.value(name)
        parameter = self.adapted.carried()[name]
        with self.engine.gathered([parameter]):
            return parameter.detach().clone()

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set one factor or weight, trained or frozen; every rank passes the same.

        Collective: yes.
        """
        if name in self.engine.parameters:
            self.engine.write(name, value.to(self.engine.device))
            return
        parameter = self.adapted.carried()[name]
        with self.engine.gathered([parameter], write=True):
            parameter.data.copy_(value)

    def write_factors(self, factors: Factors) -> None:
        """Set all live factors. Collective: yes."""
        for layer in self.adapted.layers.values():
            a, b = factors[layer.name]
            self.write(layer.a, a)
            self.write(layer.b, b)


@dataclass(kw_only=True)
class Stage(Live):
    """One task (or, for joint training, several) being learned."""

    index: int
    """Stage number from 0."""
    task: TaskHandle
    """The task that is new at this stage."""
    config: RunConfig
    past: Past
    facts: ModelFacts
    collator: Collator
    rows: TrainRows
    rows_of: Callable[[int], TrainRows]
    """Training rows of any task of the sequence, by its number."""
    steps: int
    """Optimizer steps of this stage."""
    step: int = 0
    """The step being made, from 0."""
    restored: bool = False
    """Gone on with in mid-task: after `on_task_start` the factors come from the checkpoint."""
    notes: dict[str, float | str] = field(default_factory=dict)
    """Numbers that a hook wants in the stage's `consolidated` event."""
    warnings: list[str] = field(default_factory=list)
    """What the user must hear: shown after the task's start, and after its end. The same on every
    rank."""

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def global_batch(self, step: int) -> list[EncodedRow]:
        """The rows of one step, in order, the same on every rank."""
        return self.rows.rows(step, 0, 1)

    def micro_batches(self, rows: list[EncodedRow]) -> Iterator[Batch]:
        """This rank's share of a global batch, in `engine.accumulation` batches on the device.

        Every rank gets the same number of batches; one without rows holds a single row of weight 0.
        """
        mine = rows[self.engine.rank :: self.engine.world]
        size = -(
            -batch_share(self.config.train.global_batch_size, self.engine.world)
            // self.engine.accumulation
        )
        for start in range(0, size * self.engine.accumulation, size):
            chunk = mine[start : start + size]
            yield self.collator.train(chunk, max(1, len(chunk))).to(self.engine.device)

    def logits(self, batch: Batch, through_engine: bool = True) -> torch.Tensor:
        """Logits [b, K, V] in fp32, aligned with `batch.labels` [b, K]. Collective: at ZeRO 3."""
        forward = self.engine.forward if through_engine else self.engine.module
        return aligned_logits(forward, batch, self.facts.seq2seq, self.facts.unknown_inputs)


def aligned_logits(
    forward: Callable[..., Any],
    batch: Batch,
    seq2seq: bool,
    unknown_inputs: frozenset[str] = frozenset(),
) -> torch.Tensor:
    """Logits [b, K, V] of the label positions only; a decoder's head skips the prompt."""
    keep = batch.labels.shape[1]
    inputs: dict[str, Any] = dict(batch.inputs)
    if not seq2seq:
        # As positions: a slice of the hidden states has gaps, and for those PyTorch's matmul takes
        # the head's weight once a row (in bf16 on a CPU copies of it: a fifth of a step).
        length = batch.inputs["input_ids"].shape[1]
        inputs["logits_to_keep"] = torch.arange(length - keep, length, device=batch.labels.device)
    for name in unknown_inputs:
        inputs.pop(name, None)
    logits: torch.Tensor = forward(**inputs).logits
    return logits[:, -keep:].float()


def batch_share(global_batch: int, world: int) -> int:
    """Rows of a full global batch that a rank handles at most."""
    return -(-global_batch // world)


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches per optimizer step, the same on every rank."""
    return -(-batch_share(global_batch, world) // micro_batch)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood summed over each row's label tokens.

    Args:
        logits: [b, K, V], fp32.
        labels: [b, K], -100 where there is no label.

    Returns:
        [b]; 0 for a row without labels.
    """
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(labels.shape).sum(1)
