"""Every row of a split, read once: checked, tokenised and written."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import numpy as np

from accrete.pipeline.data.config import WHOLE_ANSWER
from accrete.pipeline.data.encode import EncodedRow, Encoder, Encoding
from accrete.pipeline.data.examples import Example, Problem, TaskInfo
from accrete.pipeline.data.handle import SplitStats
from accrete.pipeline.data.names import nearest
from accrete.pipeline.data.prompts import Frame
from accrete.pipeline.data.shards import Layout, RowWriter
from accrete.pipeline.data.sources import Source

CHUNK = 1000
"""Rows tokenised in one call."""

UNKNOWN = (
    "the tokenizer has no token for a part of the answer, so answers that differ only there are "
    "the same to training and scores"
)

SHOWN_PER_SPLIT = 5
SHOWN = 20


class Problems:
    """What is wrong with the sequence: the first few problems of each split, and a count."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._here: dict[str, int] = {}

    def add(self, group: str, problem: Problem | str) -> None:
        """Note a problem; `group` names task and split."""
        seen = self._here.get(group, 0)
        self._here[group] = seen + 1
        if seen < SHOWN_PER_SPLIT and len(self._lines) < SHOWN:
            self._lines.append(f"  {group}: {problem}" if group else f"  {problem}")

    def __len__(self) -> int:
        return sum(self._here.values())

    def report(self) -> str:
        """All of it as one message."""
        left = len(self) - len(self._lines)
        noun = "problem" if len(self) == 1 else "problems"
        return "\n".join(
            [
                f"The tasks cannot be used as they are: {len(self)} {noun}. Nothing was started.",
                *self._lines,
                *([f"  and {left} more"] if left else []),
            ]
        )


@dataclass
class Counts:
    """Running numbers of one split."""

    rows: int = 0
    cut: int = 0
    cut_answers: int = 0
    prompt_sum: int = 0
    prompt_max: int = 0
    answer_sum: int = 0
    answer_max: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """What deserves a warning -> the number of rows, and the first by file and line."""

    def note(self, what: str, where: str) -> None:
        """Remember an oddity that is no error."""
        count, first = self.notes.get(what, (0, where))
        self.notes[what] = (count + 1, first)

    def add(self, row: Encoding) -> None:
        """Count one tokenised row."""
        self.rows += 1
        self.cut += row.cut
        self.cut_answers += row.answer_tokens > len(row.answer)
        self.prompt_sum += len(row.prompt)
        self.prompt_max = max(self.prompt_max, len(row.prompt))
        self.answer_sum += len(row.answer)
        self.answer_max = max(self.answer_max, len(row.answer))

    def stats(self) -> SplitStats:
        """The finished numbers."""
        rows = max(self.rows, 1)
        return SplitStats(
            rows=self.rows,
            truncated_pct=100 * self.cut / rows,
            mean_prompt_tokens=self.prompt_sum / rows,
            max_prompt_tokens=self.prompt_max,
            mean_answer_tokens=self.answer_sum / rows,
            max_answer_tokens=self.answer_max,
            cut_answers_pct=100 * self.cut_answers / rows,
            label_counts=dict(self.labels),
        )


class _Ids:
    """Finds repeated ids in 8 bytes a row, so that a long stream can be checked too."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, id: str) -> None:
        self._hashes.append(self.key(id))

    @staticmethod
    def key(id: str) -> int:
        return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")

    def repeated(self) -> set[int]:
        values, counts = np.unique(np.asarray(self._hashes, dtype=np.uint64), return_counts=True)
        return set(values[counts > 1].tolist())


class SplitPreflight:
    """Checks and writes one split of one task."""

    def __init__(
        self,
        source: Source,
        split: str,
        frame: Frame,
        encoder: Encoder,
        *,
        limit: int | None,
        training: bool,
        problems: Problems,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._source = source
        self._split = split
        self._frame = frame
        self._encoder = encoder
        self._limit = limit
        self._training = training
        self._problems = problems
        self._progress = progress
        self._group = f"{source.task.name}, {split}"
        self._labels = frozenset(source.info.labels or ())
        self.counts = Counts(labels=dict.fromkeys(source.info.labels or (), 0))

    @property
    def _info(self) -> TaskInfo:
        return self._source.info

    def _items(self) -> Iterator[Example | Problem]:
        return self._source.scan(self._split, self._limit)

    def write(self, folder: Path, layout: Layout, stream_above: int | None) -> Layout:
        """Read every row once; writes what is good and notes what is not."""
        writer = RowWriter(folder, layout, stream_above)
        ids, number = _Ids(), 0
        items = self._items()
        while chunk := list(itertools.islice(items, CHUNK)):
            examples = [e for e in chunk if self._usable(e)]
            for example in examples:
                ids.add(example.id)
            number = self._encode(examples, writer, number)
            if self._progress is not None:
                self._progress(f"{self._group}: {number} rows")
        if not number and not len(self._problems):
            self._problems.add(self._group, "there are no rows")
        self._report_repeated(ids.repeated())
        return writer.close()

    def _usable(self, item: Example | Problem) -> TypeGuard[Example]:
        """Whether an item is an example that may be tokenised; notes what is wrong with it."""
        if isinstance(item, Problem):
            self._problems.add(self._group, item)
            return False
        blank = not all(answer.strip() for answer in item.references)
        if blank and self._info.metric in WHOLE_ANSWER:
            self._problems.add(self._group, Problem(item.where, "the answer is blank"))
            return False
        if blank:
            self.counts.note("the answer is blank", item.where)
        return self._check_labels(item)

    def _check_labels(self, example: Example) -> bool:
        if not self._labels:
            return True
        for answer in example.references:
            if answer in self._labels:
                continue
            if answer == self._info.no_gold and not self._training:
                self.counts.note(
                    f"the answer is {answer!r} (no gold label), never right", example.where
                )
                continue
            allowed = list(self._info.labels or ())
            hint = nearest(answer, allowed)
            self._problems.add(
                self._group,
                Problem(
                    example.where,
                    f"answer {answer!r} is not one of the labels: {', '.join(allowed)}"
                    + (f"; did you mean {hint!r}?" if hint else "")
                    + " Set the task's `labels` if the list is wrong.",
                ),
            )
            return False
        first = example.references[0]
        if first in self._labels:
            self.counts.labels[first] += 1
        return True

    def _encode(self, examples: Sequence[Example], writer: RowWriter, number: int) -> int:
        prompts = [self._frame.render(example.input) for example in examples]
        encoded = self._encoder.encode(prompts, [e.references[0] for e in examples])
        rows: list[EncodedRow] = []
        for example, encoding in zip(examples, encoded, strict=True):
            if self._fitting(example, encoding):
                rows.append(
                    EncodedRow(example.id, encoding.prompt, encoding.answer, number + len(rows))
                )
            self.counts.add(encoding)
            if encoding.unknown:
                self.counts.note(UNKNOWN, example.where)
        # After a problem nothing is kept, and references would no longer stand beside their rows.
        if len(rows) == len(examples):
            writer.add(rows, None if self._training else [e.references for e in examples])
        return number + len(rows)

    def _fitting(self, example: Example, encoding: Encoding) -> bool:
        """Whether prompt and answer keep within their limits."""
        if not encoding.fits:
            what = "the prompt is longer than data.max_source_tokens even without its text"
            self._problems.add(self._group, Problem(example.where, what))
            return False
        if encoding.answer_tokens > len(encoding.answer) and self._info.metric in WHOLE_ANSWER:
            what = (
                f"the answer has {encoding.answer_tokens} tokens with its end token, "
                f"data.max_target_tokens is {len(encoding.answer)}: it could never be right. "
                "Raise it, or set the task's `metric: rouge_l`."
            )
            self._problems.add(self._group, Problem(example.where, what))
            return False
        return True

    def _report_repeated(self, repeated: set[int]) -> None:
        """Find the rows behind repeated id hashes, by a second reading that only errors need."""
        first: dict[str, str] = {}
        for item in self._items() if repeated else ():
            if isinstance(item, Problem) or _Ids.key(item.id) not in repeated:
                continue
            where = first.setdefault(item.id, item.where)
            if where != item.where:
                what = f"id {item.id!r} was already used at {where}; ids must be unique"
                self._problems.add(self._group, Problem(item.where, what))

    def warnings(self) -> list[str]:
        """What a user should know about this split."""
        said = [
            f"{self._split}: {what}: {count} rows, first at {first}"
            for what, (count, first) in self.counts.notes.items()
        ]
        unseen = [label for label, count in self.counts.labels.items() if count == 0]
        if unseen:
            said.append(f"{self._split}: labels that no row has: {', '.join(unseen)}")
        return said
