"""Scores after every stage: ask the evaluator, keep the matrix, write the stage's files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from accrete.pipeline.parts import Parts, Scores
from accrete.pipeline.records import Event
from accrete.pipeline.run_dir import read_json, write_json, write_text

if TYPE_CHECKING:
    from accrete.pipeline.scoring import ModelView, TaskScore


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
        """Score tasks and record each; `stage` -1 is the model as it came."""
        scores = self.parts.evaluator(self._view, [self.parts.tasks[i] for i in indices])
        for index, score in zip(indices, scores, strict=True):
            after = "after" if index <= stage else "before"
            self.parts.recorder.emit(
                Event.SCORED,
                stage=stage,
                task=score.task,
                score=score.score,
                rows=len(score.rows),
                seconds=score.seconds,
                moment="untrained" if stage < 0 else after,
            )
        return dict(zip(indices, scores, strict=True))

    def score_untrained(self) -> None:
        """Scores of the model as it came, for forward transfer."""
        self.scores.untrained = [None] * len(self.parts.tasks)
        if self.config.eval.forward_transfer and len(self.parts.tasks) > 1:
            # Task 0 has no forward transfer; its untrained score is not needed.
            found = self._evaluate(list(range(1, len(self.parts.tasks))), -1)
            for index, score in found.items():
                self.scores.untrained[index] = score.score
        if self.chief:
            write_json(self.parts.run.path / "untrained.json", {"scores": self.scores.untrained})

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
        """Scores that an earlier life of the run wrote."""
        untrained = self.parts.run.path / "untrained.json"
        self.scores.untrained = read_json(untrained)["scores"] if untrained.is_file() else []
        for index in range(done):
            path: Path = self.parts.run.stage(index).score
            if not path.is_file():
                break
            content: dict[str, Any] = read_json(path)
            self.scores.rows.append(content["row"])
            if index + 1 < len(self.parts.tasks):
                self.scores.before[index + 1] = content["next"]

    def finish(self) -> dict[str, Any]:
        """The final matrix as JSON (rank 0)."""
        if self.chief and not self.results:  # resumed after the last score was written
            self.results = self.parts.on_scores(self.scores)
        return self.results
