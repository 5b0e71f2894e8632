"""Tasks opened for scoring, and the rows that one call of the model works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.errors import DataError

if TYPE_CHECKING:
    from accrete.pipeline.data.handle import TaskHandle


class EvalRows(Protocol):
    """The rows a task is scored on, as `pipeline.data.store.open_eval` gives them."""

    @property
    def lengths(self) -> Any:
        """[n] prompt plus answer tokens of every row."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> list[EncodedRow]:
        """Rows by number."""
        ...

    def references(self, index: int) -> tuple[str, ...]:
        """Every right answer of a row; the first is the row's `answer`."""
        ...


@runtime_checkable
class WholeColumns(Protocol):
    """Rows that can give ids and references without reading prompts, as prepared ones can."""

    def ids(self) -> list[str]:
        """The id of every row."""
        ...

    def all_references(self) -> list[tuple[str, ...]]:
        """The references of every row."""
        ...


@dataclass(frozen=True, slots=True)
class OpenTask:
    """One task with what every pass over it needs."""

    handle: TaskHandle
    rows: EvalRows
    ids: list[str]
    references: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Job:
    """One row in one forward or generate call."""

    task: int
    row: int
    length: int
    """Tokens that it costs."""
    reference: int = 0
    answer: list[int] | None = None
    """Token ids of a further reference; None: the row's own answer."""


class OpenTasks:
    """Opens tasks and keeps them open: every stage scores the earlier ones again."""

    def __init__(self, open_rows: Callable[[TaskHandle], EvalRows] | None = None) -> None:
        self._open_rows = open_rows or _open_eval
        self._known: dict[str, OpenTask] = {}

    def open(self, handle: TaskHandle) -> OpenTask:
        """A task's rows, ids and references.

        Raises:
            DataError: It has no rows.
        """
        if handle.eval_dir not in self._known:
            rows = self._open_rows(handle)
            if not len(rows):
                raise DataError(
                    f"task {handle.name}: there are no rows to score in its prepared evaluation "
                    "split. Check data.eval_split and the task's files."
                )
            self._known[handle.eval_dir] = OpenTask(handle, rows, *_texts(rows))
        return self._known[handle.eval_dir]


def _texts(rows: EvalRows) -> tuple[list[str], list[tuple[str, ...]]]:
    """Ids and references of all rows."""
    if isinstance(rows, WholeColumns):
        return rows.ids(), rows.all_references()
    numbers = range(len(rows))
    return [row.id for row in rows.take(numbers)], [rows.references(i) for i in numbers]


def take_rows(tasks: Sequence[OpenTask], jobs: Sequence[Job]) -> list[EncodedRow]:
    """The rows of `jobs`, in their order, each with the answer that its job is about."""
    found: dict[tuple[int, int], EncodedRow] = {}
    for number in {job.task for job in jobs}:
        wanted = sorted({job.row for job in jobs if job.task == number})
        rows = tasks[number].rows.take(wanted)
        found.update(zip(((number, i) for i in wanted), rows, strict=True))
    rows_of_jobs = [(found[job.task, job.row], job.answer) for job in jobs]
    return [
        row if answer is None else dataclasses.replace(row, answer=answer)
        for row, answer in rows_of_jobs
    ]


def _open_eval(handle: TaskHandle) -> EvalRows:
    # Only here: it brings in the datasets library.
    from accrete.pipeline.data.store import open_eval

    return open_eval(handle)
