"""Scores tasks on the model as it stands, sharded over ranks.

Exact match by one forward pass: greedy decoding yields exactly the gold tokens if and only if,
teacher-forced on the gold, the argmax is the gold token at every answer position, the end token
included (by induction over positions). So one pass over the answers decides every row, and only
misses need decoding, if their text is wanted at all.

Forward exact match is token equality with one of the references, and therefore a lower bound of
normalised exact match: other tokens may spell an answer that is right after normalisation.
`eval.decode_misses` closes the gap, at the price of decoding the misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from accrete.eval.measures import MEASURES, by_forward, token_budget
from accrete.eval.open_tasks import EvalRows, Job, OpenTask, OpenTasks, take_rows
from accrete.eval.text import exact_match
from accrete.pipeline.data.batches import score_batches
from accrete.pipeline.data.config import WHOLE_ANSWER
from accrete.pipeline.data.encode import EncodedRow, Encoder
from accrete.pipeline.data.prompts import Prompt
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.scoring import RowScore, TaskScore

if TYPE_CHECKING:
    from accrete.pipeline.config.run import EvalConfig
    from accrete.pipeline.data.collate import Collator
    from accrete.pipeline.data.handle import TaskHandle
    from accrete.pipeline.scoring import ModelView

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Decoded:
    text: str
    is_answer: bool
    """The token ids are those of the row's own answer."""


class SequenceEvaluator:
    """Implements `scoring.Evaluator`."""

    def __init__(
        self,
        eval_config: EvalConfig,
        collator: Collator,
        tokenizer: Any,
        max_new_tokens: int,
        *,
        open_rows: Callable[[TaskHandle], EvalRows] | None = None,
    ) -> None:
        """Set how to score.

        Args:
            eval_config: Mode, token budget and whether misses are decoded.
            collator: Of the model to score.
            tokenizer: Of the model to score.
            max_new_tokens: Longest answer with its end token; a longer reference cannot be hit.
            open_rows: Opens a task's rows; default: `pipeline.data.store.open_eval`.
        """
        self._config = eval_config
        self._collator = collator
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._tasks = OpenTasks(open_rows)

    def __call__(self, view: ModelView, handles: Sequence[TaskHandle]) -> list[TaskScore]:
        """Score every row of every task; the same value on every rank.

        The batches depend on the rows and the token budget alone, so results do not depend on the
        number of ranks.

        Raises:
            ConfigError: `eval.mode` is `forward` and a task's metric needs decoded text.
            DataError: A task has no rows.

        Collective: yes.
        """
        require_scorable(self._config, handles)
        tasks = [self._tasks.open(handle) for handle in handles]
        seconds = [0.0] * len(tasks)
        jobs = self._forward_jobs(tasks, view.seq2seq)
        hits = self._run(view, tasks, jobs, self._forward, seconds)
        hit_by: dict[tuple[int, int], int] = {}
        for job, hit in zip(jobs, hits, strict=True):
            if hit:
                hit_by.setdefault((job.task, job.row), job.reference)
        decoded: dict[tuple[int, int], _Decoded] = {}
        for budget, decode in self._decode_jobs(tasks, hit_by).items():
            texts = self._run(view, tasks, decode, partial(self._generate, budget), seconds)
            decoded.update(
                ((job.task, job.row), text) for job, text in zip(decode, texts, strict=True)
            )
        return [
            self._task_score(number, task, hit_by, decoded, seconds[number])
            for number, task in enumerate(tasks)
        ]

    def _by_forward(self, handle: TaskHandle) -> bool:
        return by_forward(self._config.mode, handle.metric)

    def _forward_jobs(self, tasks: Sequence[OpenTask], seq2seq: bool) -> list[Job]:
        """A job for each reference of each row that a forward pass can decide."""
        jobs = []
        for number, task in enumerate(tasks):
            if not self._by_forward(task.handle):
                continue
            jobs += [Job(number, i, int(task.rows.lengths[i])) for i in range(len(task.rows))]
            jobs += self._further_references(number, task, seq2seq)
        return jobs

    def _further_references(self, number: int, task: OpenTask, seq2seq: bool) -> list[Job]:
        """Jobs for all references but the first, encoded as the rows' own answers were."""
        wanted = [(i, r) for i, refs in enumerate(task.references) for r in range(1, len(refs))]
        if not wanted:
            return []
        encoder = Encoder(
            self._tokenizer,
            seq2seq=seq2seq,
            max_source_tokens=8,  # no prompt is encoded here
            max_target_tokens=self._max_new_tokens,
        )
        found = encoder.encode(
            [Prompt("", "", "")] * len(wanted), [task.references[i][r] for i, r in wanted]
        )
        return [
            Job(number, i, int(task.rows.lengths[i]) + encoding.answer_tokens, r, encoding.answer)
            for (i, r), encoding in zip(wanted, found, strict=True)
            if encoding.answer_tokens <= self._max_new_tokens
        ]

    def _decode_jobs(
        self, tasks: Sequence[OpenTask], hit_by: dict[tuple[int, int], int]
    ) -> dict[int, list[Job]]:
        """Rows whose text is needed: all of a decoded task's, and misses if they are wanted.

        Returns:
            Token budget -> the rows that are decoded under it.
        """
        jobs: dict[int, list[Job]] = {}
        for number, task in enumerate(tasks):
            decided = self._by_forward(task.handle)
            if decided and not self._config.decode_misses:
                continue
            budget = token_budget(task.handle.metric, self._max_new_tokens)
            for i, length in enumerate(task.rows.lengths):
                if not (decided and (number, i) in hit_by):
                    jobs.setdefault(budget, []).append(Job(number, i, int(length) + budget))
        return jobs

    def _run(
        self,
        view: ModelView,
        tasks: Sequence[OpenTask],
        jobs: Sequence[Job],
        call: Callable[[ModelView, list[EncodedRow]], list[Result]],
        seconds: list[float],
    ) -> list[Result]:
        """One pass: the result of every job, on every rank. Collective: yes.

        The batches are dealt round by round, so that ranks work on batches of like length at the
        same time; a rank without one in the last round makes its call on a padding row.
        """
        if not jobs:
            return []
        began = time.perf_counter()
        # Longest first: if memory does not suffice, it is known at once.
        batches = score_batches([job.length for job in jobs], self._config.batch_tokens)[::-1]
        mine = batches[view.rank :: view.world]
        rounds = -(-len(batches) // view.world)
        found: list[tuple[int, Result]] = []
        for number in range(rounds):
            batch = mine[number] if number < len(mine) else []
            results = call(view, take_rows(tasks, [jobs[j] for j in batch]))
            found += zip(batch, results, strict=True)
        gathered = view.gather((found, time.perf_counter() - began))
        self._share_out(jobs, max(spent for _, spent in gathered), seconds)
        by_job = dict(pair for part, _ in gathered for pair in part)
        return [by_job[j] for j in range(len(jobs))]

    @staticmethod
    def _share_out(jobs: Sequence[Job], spent: float, seconds: list[float]) -> None:
        total = sum(job.length for job in jobs)
        for job in jobs:
            seconds[job.task] += spent * job.length / total

    def _forward(self, view: ModelView, rows: list[EncodedRow]) -> list[bool]:
        batch = self._collator.train(rows, num_rows=max(1, len(rows)))
        logits = view.logits(batch)
        labels = batch.labels.to(logits.device)
        right = (logits.argmax(dim=-1) == labels) | (labels < 0)
        hits = right.all(dim=-1).tolist()[: len(rows)]
        # An answer may be longer where a run is scored again with a smaller data.max_target_tokens.
        return [
            hit and len(row.answer) <= self._max_new_tokens
            for row, hit in zip(rows, hits, strict=True)
        ]

    def _generate(self, budget: int, view: ModelView, rows: list[EncodedRow]) -> list[_Decoded]:
        batch = self._collator.prompts(rows, num_rows=max(1, len(rows)))
        tokens = view.generate(batch, budget)[: len(rows)]
        return [
            _Decoded(self._text(new), new == row.answer[:-1])
            for row, new in zip(rows, tokens, strict=True)
        ]

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def _task_score(
        self,
        number: int,
        task: OpenTask,
        hit_by: dict[tuple[int, int], int],
        decoded: dict[tuple[int, int], _Decoded],
        seconds: float,
    ) -> TaskScore:
        scores = []
        for i, references in enumerate(task.references):
            key = (number, i)
            if key in hit_by:
                scores.append(_row_score(task, i, True, 1.0, references[hit_by[key]]))
            elif key in decoded:
                scores.append(self._score_text(task, i, decoded[key]))
            else:
                scores.append(_row_score(task, i, False, 0.0, None))
        mean = sum(score.score for score in scores) / len(scores)
        return TaskScore(
            task=task.handle.name,
            score=100 * mean,
            rows=scores,
            seconds=seconds,
            outside=_outside(task.handle, scores),
        )

    def _score_text(self, task: OpenTask, row: int, decoded: _Decoded) -> RowScore:
        """Score decoded text by the task's metric.

        The row's own answer token for token is right even where the tokenizer cannot spell it back;
        a further reference that it cannot spell is met by the forward pass alone.
        """
        measure, references = MEASURES[task.handle.metric], task.references[row]
        source = self._text(task.rows.take([row])[0].prompt) if measure.reads_source else ""
        score = float(measure.score(decoded.text, references, source))
        if not measure.all_or_nothing:
            correct = exact_match(decoded.text, references)
            return _row_score(task, row, correct, score, decoded.text)
        correct = score == 1.0 or decoded.is_answer
        return _row_score(task, row, correct, float(correct), decoded.text)


def require_scorable(config: EvalConfig, handles: Sequence[TaskHandle]) -> None:
    """Make sure that the mode can score every task; for a pre-flight, too.

    Raises:
        ConfigError: `eval.mode` is `forward` and a task's metric needs decoded text.
    """
    open_tasks = [f"{h.name} ({h.metric})" for h in handles if h.metric not in WHOLE_ANSWER]
    if config.mode == "forward" and open_tasks:
        raise ConfigError(
            "eval.mode: forward decides exact match only, but other metrics need decoded text: "
            f"{', '.join(open_tasks)}. Use eval.mode=auto: it takes one forward pass for exact "
            "matches and decodes the others."
        )


def _outside(handle: TaskHandle, scores: Sequence[RowScore]) -> float | None:
    """Percent of answers that the task's metric takes for none of its labels, where known."""
    missed = [score.prediction for score in scores if not score.correct]
    if not handle.labels or None in missed:
        return None
    measure, labels = MEASURES[handle.metric], handle.labels
    outside = sum(measure.score(text or "", labels, "") < 1 for text in missed)
    return 100 * outside / len(scores)


def _row_score(
    task: OpenTask, row: int, correct: bool, score: float, prediction: str | None
) -> RowScore:
    return RowScore(
        task=task.handle.name,
        id=task.ids[row],
        correct=correct,
        score=score,
        prediction=prediction,
    )
