"""What the stage runner asks of whoever scores; `accrete.eval` provides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.data.prepare import TaskHandle


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """One scored row."""

    task: str
    id: str
    correct: bool
    """All of the metric's score; where that comes in parts: the normalised texts are equal."""
    score: float
    """The row's share of the task's metric, 0 to 1."""
    prediction: str | None
    """Decoded text; None where a forward pass saw a miss without decoding it."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task's score after a stage."""

    task: str
    score: float
    """Mean of the rows' scores in percent, 0 to 100."""
    rows: list[RowScore]
    """All rows, in the order of the task's file; the same on every rank."""
    seconds: float
    """Time of the pass, shared out by tokens."""
    outside: float | None = None
    """Percent of the rows whose answer is none of the task's labels; None for open answers, and
    where a row's text was not decoded."""


class ModelView(Protocol):
    """The model as the scorer sees it: forwards only, so that it works at every ZeRO stage.

    Collective: yes; at ZeRO 3 every forward is a collective, so every rank must make the same
    number of calls.
    """

    rank: int
    world: int
    device: torch.device
    seq2seq: bool

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [b, K, V] in fp32 aligned with `batch.labels` [b, K]; no gradient."""
        ...

    def generate(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of every prompt: new token ids before the end token."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Collective: yes."""
        ...


class Evaluator(Protocol):
    """Scores tasks on the model as it stands."""

    def __call__(self, view: ModelView, handles: Sequence[TaskHandle]) -> list[TaskScore]:
        """Score every row of every task. Collective: yes."""
        ...
