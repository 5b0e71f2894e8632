"""Experience replay: some rows of earlier tasks are trained again beside the new task's rows.

The rows are chosen at a task's end, by seed, the same on every rank, and are saved as token ids
with the method's state: a resumed run needs no data of earlier tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from accrete.pipeline.data.kept import KeptRows, KeptSource
from accrete.pipeline.data.mix import MixedRows, Reader, SharedBatches
from accrete.pipeline.data.order import generator
from accrete.pipeline.errors import ConfigError, MethodError
from accrete.pipeline.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from accrete.pipeline.data.store import TrainRows
    from accrete.pipeline.stage import Stage

CHOICE = 5
"""Last part of the key that names the choice of rows (see `order.generator`)."""

MEMORIES = ("per_task", "reservoir")
"""Kinds of memory; a saved state has their numbers."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(MethodConfig):
    """Settings of experience replay."""

    kind: str = "replay"
    memory: Literal["per_task", "reservoir"] = "per_task"
    """`per_task`: so many rows of every task, kept for good; the memory grows with the tasks.
    `reservoir`: a fixed number in all, a uniform sample of every training row seen so far."""
    rows: Annotated[int, Field(ge=1)] = 100
    """Rows kept: of each task (`per_task`), or in all (`reservoir`)."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """`per_task` only, instead of `rows`: the share of each task's rows that is kept, such as 0.02
    (rounded up)."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """null: every kept row is trained once an epoch, shuffled among the new task's rows. A number:
    this share of every global batch is replayed and an epoch grows by as much."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.fraction is not None and self.memory == "reservoir":
            raise ValueError(
                "`fraction` is a share of one task's rows; a reservoir has a fixed size. Set "
                "`rows`, or take `memory: per_task`"
            )


class Replay(Method):
    """One adapter through all tasks, trained on new rows mixed with remembered ones."""

    Config: ClassVar[type[MethodConfig]] = ReplayConfig
    summary: ClassVar[str] = "one LoRA adapter; kept rows of earlier tasks are trained again"
    source: ClassVar[str] = "Chaudhry et al. 2019 (tiny episodic memories); Vitter 1985 (reservoir)"
    kept: ClassVar[str] = (
        "token ids of rows of earlier tasks, whole on every rank. With their origin: 4 bytes per "
        "token and 24 per row, and once in every stage's checkpoint. With `per_task` it grows "
        "with the tasks, with `reservoir` it is constant. One adapter goes on from task to task"
    )
    cost: ClassVar[str] = (
        "that of the kept rows. A step: none beside the rows' own, no collective. Every kept row "
        "is trained once an epoch, so an epoch is longer by their number; with `share` an epoch "
        "is 1 / (1 - share) times as long. A task's end: the chosen rows' batches are read once "
        "(each rank reads the same); no collective, no pass through the model"
    )
    guarantee: ClassVar[str] = (
        "none against forgetting; the choice of rows depends on the seed alone. Exactly so many "
        "different rows per task, or a uniform sample of the whole stream (chi-square over fixed "
        "seeds). Order and content of every global batch are the same for any number of ranks, at "
        "any step, after any resume. Rows of earlier tasks are never read again"
    )
    deviations: ClassVar[str] = (
        "rows are mixed into the epoch, not drawn beside every batch. That is the text "
        "literature's way; `share` gives the other. The mix is not sorted by length, so kept rows "
        "cost some padding. Rows are kept as token ids: a branch with another tokenizer is "
        "impossible anyway. `memory`, `rows` and `fraction` belong to a whole sequence: a branch "
        "that changes them is refused. One from another method begins with an empty memory"
    )
    fresh_adapter: ClassVar[bool] = False

    def __init__(self, config: ReplayConfig) -> None:
        super().__init__(config)
        self.settings = config
        self.memory: KeptRows | None = None
        """The memory, whole on every rank (it is read by all of them)."""
        self.seen = 0
        """Training rows of all finished tasks."""

    def wrap_data(self, stage: Stage, rows: TrainRows) -> TrainRows:
        """The new task's rows mixed with what is kept.

        Raises:
            MethodError: `share` of a batch of one row.
        """
        seed, batch = stage.config.seed, stage.config.train.global_batch_size
        if self.settings.share is not None and batch < 2:
            raise MethodError(
                f"method.share: given: {self.settings.share} with train.global_batch_size=1; "
                "allowed: with batches of at least 2 rows, which hold new and kept ones. Raise "
                "train.global_batch_size, or set method.share=null."
            )
        if self.memory is None:
            return rows
        kept = KeptSource(self.memory, seed, stage.index, batch)
        if self.settings.share is None:
            return MixedRows([rows, kept], seed, stage.index, batch)
        replayed = min(max(round(self.settings.share * batch), 1), batch - 1)
        return SharedBatches(rows, kept, seed, stage.index, batch, replayed)

    def on_task_end(self, stage: Stage) -> None:
        """Choose among the task's own rows. Collective: no (every rank does the same)."""
        own = stage.rows_of(stage.index)
        random = generator(stage.config.seed, stage.index, 0, CHOICE)
        old = [] if self.memory is None else self.memory.unpack()
        if self.settings.memory == "reservoir":
            places = reservoir(random, self.settings.rows, self.seen, own.num_rows)
        else:
            chosen = quota(random, self._quota(own.num_rows), own.num_rows)
            places = {len(old) + number: place for number, place in enumerate(chosen)}
        reader = Reader(own, stage.config.train.global_batch_size)
        found = reader.pick(0, places.values())
        slots = dict(enumerate(old))
        slots.update({slot: (stage.index, found[place]) for slot, place in places.items()})
        self.memory = KeptRows.pack([slots[slot] for slot in range(len(slots))])
        self.seen += own.num_rows
        stage.notes["kept_rows"] = float(len(self.memory))

    def _quota(self, count: int) -> int:
        if self.settings.fraction is None:
            return self.settings.rows
        # As it is written: in floating point 0.07 x 100 is more than 7.
        return math.ceil(Fraction(str(self.settings.fraction)) * count)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The kept rows, the number of rows seen, and the settings that the memory is made with."""
        if self.memory is None:
            return {}
        return {
            "kept/tokens": self.memory.tokens,
            "kept/lengths": self.memory.lengths,
            "kept/origin": self.memory.origin,
            "seen/rows": torch.tensor([self.seen]),
            **self._made_with(),
        }

    def _made_with(self) -> dict[str, torch.Tensor]:
        memory = torch.tensor([MEMORIES.index(self.settings.memory)])
        if self.settings.fraction is None:
            return {"made/memory": memory, "made/rows": torch.tensor([self.settings.rows])}
        fraction = torch.tensor([self.settings.fraction], dtype=torch.float64)
        return {"made/memory": memory, "made/fraction": fraction}

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`; nothing is kept where another method made the earlier stages.

        Raises:
            ConfigError: The memory was made with another `memory`, `rows` or `fraction`.
        """
        if not tensors:
            return
        made, given = (_described(t) for t in (tensors, self._made_with()))
        if made and made != given:  # older run folders do not say
            raise ConfigError(
                f"replay: given: {given}; the rows of this run's finished stages were kept with "
                f"{made}. Allowed: the same, as the memory belongs to a whole sequence "
                "(method.share may change). Branch with those settings, or start a new run."
            )
        names = ("tokens", "lengths", "origin")
        self.memory = KeptRows(*(tensors[f"kept/{name}"] for name in names))
        self.seen = int(tensors["seen/rows"])

    def state_bytes(self) -> int:
        """Bytes of the kept token ids, their lengths and origins."""
        return 0 if self.memory is None else self.memory.num_bytes


def _described(tensors: dict[str, torch.Tensor]) -> str:
    """The settings that a memory is made with, as overrides."""
    words = []
    for name in ("memory", "rows", "fraction"):
        if f"made/{name}" in tensors:
            value = tensors[f"made/{name}"].item()
            words.append(f"method.{name}={MEMORIES[int(value)] if name == 'memory' else value}")
    return " ".join(words)


def quota(random: np.random.Generator, size: int, count: int) -> list[int]:
    """`size` different numbers below `count` (all, if there are fewer), each set as likely."""
    chosen: list[int] = sorted(random.permutation(count)[:size].tolist())
    return chosen


def reservoir(random: np.random.Generator, size: int, seen: int, count: int) -> dict[int, int]:
    """Let `count` further rows pass a reservoir.

    Args:
        random: Decides.
        size: Rows that the reservoir holds at most.
        seen: Rows that have passed it before.
        count: Rows that pass it now.

    Returns:
        Slot -> number (below `count`) of the row that is in it now; other slots are unchanged.
        After n rows each of them is in the reservoir with probability min(1, size / n).

    Source: Vitter 1985, algorithm R.
    """
    total = np.arange(seen, seen + count)
    slots = random.integers(0, total + 1)
    slots = np.where(total < size, total, slots)
    return {int(slots[row]): int(row) for row in np.flatnonzero(slots < size)}
