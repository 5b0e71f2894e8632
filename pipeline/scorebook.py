"""Scores after every stage: ask the evaluator, keep the matrix, write the stage's files."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from accrete.pipeline.parts import Parts, Scores
from accrete.pipeline.records import Event
from accrete.pipeline.run_dir import read_json, write_json, write_text
from accrete.pipeline.scoring import RowScore, TaskScore

if TYPE_CHECKING:
    from accrete.pipeline.scoring import ModelView

KEPT_EVERY = 2000
"""A scoring is kept about every so many rows: fewer would leave ranks without batches, more would
be lost when it is cut off."""

MANY_OUTSIDE = 10.0
"""Percent of a task's answers outside its labels from which on a warning is given."""


class Scorebook:
    """The accuracy matrix of a run, on disk and in memory. Collective: every method."""

    def __init__(self, parts: Parts, view: ModelView) -> None:
        self.parts = parts
        self.config = parts.config
        self.chief = view.rank == 0
        self.results: dict[str, Any] = {}
        """The matrix as JSON, on rank 0, once it was written."""
        self.scores = Scores(
            tasks=[task.name for task in parts.tasks],
            before=[None] * len(parts.tasks),
            counts=[task.num_eval for task in parts.tasks],
        )
        self._view = view

    def _evaluate(self, indices: list[int], stage: int) -> dict[int, TaskScore]:
        """Score tasks and record each; `stage` -1 is the model as it came.

        Group by group, each kept on disk when it is scored: one that is cut off goes on after the
        last. The groups follow from the recipe, so a row is in the same batch in every life.
        """
        found: dict[int, TaskScore] = {}
        for group in _groups(indices, self.scores.counts):
            kept = self._partial(stage) / f"{group[0]}.json"
            here = _read_scores(kept) if self.chief else None
            scores = self._view.gather(here)[0]
            if scores is None:
                scores = self.parts.evaluator(self._view, [self.parts.tasks[i] for i in group])
                self._record(group, scores, stage)
                if self.chief:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, [asdict(score) for score in scores])
            found.update(zip(group, scores, strict=True))
        return found

    def _record(self, indices: list[int], scores: list[TaskScore], stage: int) -> None:
        for index, score in zip(indices, scores, strict=True):
            after = "after" if index <= stage else "before"
            outside = {} if score.outside is None else {"outside": score.outside}
            self.parts.recorder.emit(
                Event.SCORED,
                stage=stage,
                task=score.task,
                score=score.score,
                rows=len(score.rows),
                seconds=score.seconds,
                moment="untrained" if stage < 0 else after,
                **outside,
            )

    def _warn(self, stage: int, scores: Sequence[TaskScore]) -> None:
        """Say which tasks get answers of another kind: a wrong prompt, or another task's labels."""
        many = [s for s in scores if s.outside is not None and s.outside > MANY_OUTSIDE]
        if many:
            named = ", ".join(f"{s.task} {s.outside:.0f} %" for s in many)
            file = self.parts.run.stage(stage).predictions.relative_to(self.parts.run.path)
            self.parts.recorder.emit(
                Event.WARNING,
                message=f"after {self.parts.tasks[stage].name}, answers that are none of the "
                f"task's labels: {named}; {file} has them",
                stage=stage,
            )

    def _partial(self, stage: int) -> Path:
        return self.parts.run.partial / ("untrained" if stage < 0 else str(stage))

    def forget(self, stage: int) -> None:
        """Drop what a scoring under way has kept: it is over, or the stage is trained anew."""
        if self.chief:
            shutil.rmtree(self._partial(stage), ignore_errors=True)

    def score_untrained(self) -> None:
        """Scores of the model as it came, for forward transfer.

        A run that was cut off in its first task, before any checkpoint, has them already.
        """
        scores = self._view.gather(self._read_untrained())[0]
        if not scores:
            scores = [None] * len(self.parts.tasks)
            if self.config.eval.forward_transfer and len(scores) > 1:
                # Task 0 has no forward transfer; its untrained score is not needed.
                for index, found in self._evaluate(list(range(1, len(scores))), -1).items():
                    scores[index] = found.score
            if self.chief:
                write_json(self.parts.run.untrained, {"scores": scores})
        self.scores.untrained = scores
        self.forget(-1)

    def score_stage(self, index: int) -> None:
        """Score all tasks so far (and the next, for forward transfer); write the stage's row."""
        folder = self.parts.run.stage(index)
        if len(self.scores.rows) > index:
            return
        began = time.perf_counter()
        seen = list(range(index + 1))
        ahead = self.config.eval.forward_transfer and index + 1 < len(self.parts.tasks)
        found = self._evaluate(seen + ([index + 1] if ahead else []), index)
        row = [found[i].score for i in seen]
        self.scores.rows.append(row)
        following = found[index + 1].score if ahead else None
        if ahead:
            self.scores.before[index + 1] = following
        seconds = time.perf_counter() - began
        self._warn(index, [found[i] for i in seen])
        if self.chief:
            lines = [
                json.dumps(
                    {
                        "task": r.task,
                        "id": r.id,
                        "correct": r.correct,
                        "prediction": r.prediction,
                        "score": r.score,
                    },
                    ensure_ascii=False,
                )
                for i in seen
                for r in found[i].rows
            ]
            write_text(folder.predictions, "\n".join(lines) + "\n")
            # Written last: its presence says that the stage is scored.
            write_json(folder.score, {"row": row, "next": following, "seconds": seconds})
            self.forget(index)
            self.results = self.parts.on_scores(self.scores)
        self.parts.recorder.emit(
            Event.STAGE_FINISHED,
            stage=index,
            task=self.parts.tasks[index].name,
            row=row,
            score_seconds=seconds,
        )
        if self._view.world > 1:
            dist.barrier()

    def read(self, done: int) -> None:
        """Scores that an earlier life of the run wrote. Collective: yes.

        As the first rank finds them: where a file system shows a file to some ranks later, these
        would score what the others do not.
        """
        found = None
        if self.chief:
            paths = (self.parts.run.stage(index).score for index in range(done))
            rows = [read_json(path) for path in takewhile(Path.is_file, paths)]
            found = (self._read_untrained(), rows)
        self.scores.untrained, contents = self._view.gather(found)[0]
        for index, content in enumerate(contents):
            self.scores.rows.append(content["row"])
            if index + 1 < len(self.parts.tasks):
                self.scores.before[index + 1] = content["next"]

    def _read_untrained(self) -> list[float | None]:
        file = self.parts.run.untrained
        scores: list[float | None] = read_json(file)["scores"] if file.is_file() else []
        return scores

    def finish(self) -> dict[str, Any]:
        """The final matrix as JSON (rank 0)."""
        if self.chief and not self.results:  # resumed after the last score was written
            self.results = self.parts.on_scores(self.scores)
        return self.results


def _groups(indices: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Neighbours put together until they have `KEPT_EVERY` rows."""
    groups: list[list[int]] = []
    rows = KEPT_EVERY
    for index in indices:
        if rows >= KEPT_EVERY:
            groups.append([])
            rows = 0
        groups[-1].append(index)
        rows += counts[index]
    return groups


def _read_scores(path: Path) -> list[TaskScore] | None:
    """What `_evaluate` has kept of a group, if it was scored."""
    if not path.is_file():
        return None
    return [
        TaskScore(**{**score, "rows": [RowScore(**row) for row in score["rows"]]})
        for score in read_json(path)
    ]
