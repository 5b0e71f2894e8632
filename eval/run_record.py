"""A run folder as the report and the comparison read it: tolerant of what is not there yet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from accrete.eval.matrix import AccuracyMatrix, Array
from accrete.eval.run_settings import branch_settings, otherwise
from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.records import read_events
from accrete.pipeline.run_dir import RunDir, read_json

_ROUNDING = 0.05
"""Percent points by which a rounded cell of matrix.json may differ from the mean of its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedRow:
    """One line of a stage's predictions.jsonl."""

    task: str
    id: str
    correct: bool
    score: float
    """0 to 1; `correct` as a number where the file has no `score`."""
    prediction: str | None


class RunRecord:
    """Everything a run folder says, read when asked for.

    A file that is missing counts as empty; a file that cannot be read is noted in `problems`.

    Raises:
        RunFolderError: The folder has none of the files of a run.
    """

    def __init__(self, path: Path) -> None:
        self.dir = RunDir(path)
        self.problems: list[str] = []
        known = (self.dir.run, self.dir.recipe, self.dir.events, self.dir.matrix)
        if not any(file.is_file() for file in known):
            what = "is not a run folder" if path.is_dir() else "does not exist"
            raise RunFolderError(
                f"{path}: {what} (none of {', '.join(file.name for file in known)} is in it). "
                "Give the folder that `accrete run RECIPE --run-dir DIR` wrote."
            )
        self.info = self._mapping(self.dir.run)
        self.config = self._read_recipe()
        self.events = self._read_events()

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.dir.path

    @property
    def name(self) -> str:
        """Name of the recipe, or else of the folder."""
        started = self.first_event("run_started")
        for value in (self.info.get("name"), self.config.get("name"), started.get("name")):
            if value:
                return str(value)
        return self.path.resolve().name

    @property
    def method(self) -> str:
        """Kind of the method."""
        return self._label("method", "kind") or "unknown"

    @property
    def model(self) -> str:
        """Builder, hub id or folder name of the model."""
        label = self._label("model", "builder", "path", "name") or "unknown"
        return Path(label).name if label.startswith(("/", ".", "~")) else label

    @property
    def model_id(self) -> str:
        """Builder, hub id or whole path of the model, with the hub revision that was asked for."""
        label = self._label("model", "builder", "path", "name") or "unknown"
        model = self.config.get("model")
        said = model if isinstance(model, Mapping) else {}
        local = label.startswith(("/", ".", "~")) or said.get("builder")
        marks = (None if local else said.get("revision"), said.get("gguf_file"))
        return "@".join([label, *(str(mark) for mark in marks if mark)])

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        started = self.first_event("run_started")
        for value in (self.config.get("seed"), self.info.get("seed"), started.get("seed")):
            if isinstance(value, int):
                return value
        return None

    @property
    def command(self) -> str | None:
        """The command that started the run."""
        command = self.info.get("command")
        if isinstance(command, list):
            import shlex

            return shlex.join(str(part) for part in command)
        return str(command) if command else None

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        started = self.first_event("run_started")
        for value in (
            self._matrix_file.get("tasks"),
            self.config.get("tasks"),  # a branch's events begin with its parent's plan
            started.get("tasks"),
            started.get("plan"),
        ):
            if isinstance(value, list) and value:
                return tuple(_task_name(item) for item in value)
        return tuple(dict.fromkeys(str(e["task"]) for e in self.events if e.get("task")))

    @cached_property
    def branched(self) -> str | None:
        """What learned a branch's first stages other than its recipe says; None elsewhere.

        `METHOD@stage-T` or `learning_rate=0.001@stage-T`: all stages up to T that no word before
        this one tells of. Where its recipe's settings learned stages before those, `own@stage-T`.
        """
        own = branch_settings(self.config)
        learned = self._mapping(self.dir.lineage).get("learned", [])
        told = {entry["stage"]: otherwise(entry["settings"], own) or "own" for entry in learned}
        said = [f"{what}@stage-{max(same)}" for what, same in groupby(told, key=told.get)]
        if said and said[-1].startswith("own@"):  # as all that follows
            said.pop()
        return ", ".join(said) or None

    @cached_property
    def matrix(self) -> AccuracyMatrix | None:
        """The scores of all finished stages: from matrix.json, or else from the events."""
        if self._matrix_file:
            try:
                return AccuracyMatrix.from_json(self._matrix_file)
            except RunFolderError as error:
                self.problems.append(str(error))
        return self._matrix_of_events()

    @property
    def finished(self) -> bool:
        """Whether every stage is scored."""
        return self.matrix is not None and len(self.matrix.rows) == len(self.matrix.tasks)

    @cached_property
    def counts(self) -> tuple[int | None, ...]:
        """Rows that each task is scored on, where known."""
        if self.matrix is not None and self.matrix.counts is not None:
            return self.matrix.counts
        rows = {e.get("task"): e.get("rows") for e in self.events if e["event"] == "scored"}
        counts = [rows.get(task) for task in self.tasks]
        return tuple(n if isinstance(n, int) else None for n in counts)

    def first_event(self, kind: str) -> Mapping[str, Any]:
        """The first event of a kind; empty if there is none."""
        return next((event for event in self.events if event["event"] == kind), {})

    @cached_property
    def failure(self) -> str | None:
        """Why the newest attempt ended early, by the rank that failed first; None if it did not."""
        found = [(self._mapping(file), file) for file in self.dir.logs.glob("error-*.json")]
        said = [pair for pair in found if isinstance(pair[0].get("time"), int | float)]
        if not said:
            return None
        error, file = min(said, key=lambda pair: pair[0]["time"])
        log = "" if error.get("expected") else f" (logs/{file.stem.replace('error', 'rank')}.log)"
        return f"The newest attempt ended early: {error.get('message')}{log}"

    def predictions(self, stage: int) -> dict[str, list[PredictedRow]]:
        """What was scored after a stage, by task, in file order; empty if there is no file."""
        file = self.dir.stage(stage).predictions
        found: dict[str, list[PredictedRow]] = {}
        if not file.is_file():
            return found
        try:
            with file.open(encoding="utf-8") as lines:
                for row in (_predicted_row(json.loads(line)) for line in lines if line.strip()):
                    found.setdefault(row.task, []).append(row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.problems.append(f"{file}: cannot be read as predictions ({error}).")
            return {}
        return found

    def row_scores(self) -> list[Array] | None:
        """For each finished task i its row scores `[T - i, n_i]` after stages i to T-1.

        None unless every finished stage recorded the same rows of every task it scored, and their
        means are the matrix (a file without `score` cannot say what a ROUGE-L row was worth).
        """
        if self.matrix is None or not self.matrix.rows:
            return None
        tasks = self.tasks[: len(self.matrix.rows)]
        ids: dict[str, list[str]] = {}
        series: dict[str, list[list[float]]] = {task: [] for task in tasks}
        for t, cells in enumerate(self.matrix.rows):
            stage = self.predictions(t)
            for task, cell in zip(tasks, cells, strict=False):
                rows = stage.get(task, [])
                found = [row.id for row in rows]
                mean = sum(row.score for row in rows) / max(1, len(rows))
                if not rows or ids.setdefault(task, found) != found:
                    return None
                if cell is None or abs(100 * mean - cell) > _ROUNDING:
                    return None
                series[task].append([row.score for row in rows])
        return [np.array(series[task]) for task in tasks]

    @cached_property
    def prepared(self) -> dict[str, Mapping[str, Any]]:
        """What prepared.json says of each task; empty if there is none."""
        tasks = self._mapping(self.dir.prepared).get("tasks")
        found = tasks if isinstance(tasks, list) else []
        return {str(task.get("name")): task for task in found if isinstance(task, Mapping)}

    @cached_property
    def _matrix_file(self) -> dict[str, Any]:
        return self._mapping(self.dir.matrix)

    def _mapping(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            return {}
        try:
            content = read_json(file)
        except (RunFolderError, OSError) as error:
            self.problems.append(str(error))
            return {}
        return content if isinstance(content, dict) else {}

    def _read_recipe(self) -> dict[str, Any]:
        if not self.dir.recipe.is_file():
            return {}
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            content = YAML(typ="safe", pure=True).load(self.dir.recipe.read_text(encoding="utf-8"))
        except (YAMLError, OSError, ValueError) as error:
            self.problems.append(f"{self.dir.recipe}: cannot be read ({error}).")
            return {}
        return content if isinstance(content, dict) else {}

    def _read_events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self.dir.events.is_file():
            try:
                for event in read_events(self.dir.events):
                    events.append(event)
            except (RunFolderError, OSError) as error:
                self.problems.append(str(error))
        return events

    def _label(self, key: str, *fields: str) -> str | None:
        """A name out of run.json, recipe.yaml or run_started: text, or a field of an object."""
        for source in (self.info, self.config, self.first_event("run_started")):
            value = source.get(key)
            if isinstance(value, Mapping):
                value = next((value[field] for field in fields if value.get(field)), None)
            if value:
                return str(value)
        return None

    def _matrix_of_events(self) -> AccuracyMatrix | None:
        if not self.tasks:
            return None
        scores: dict[tuple[int, str], float] = {}
        for event in self.events:
            if event["event"] == "scored" and event.get("moment", "after") == "after":
                score, stage = event.get("score"), event.get("stage")
                if isinstance(score, int | float) and math.isfinite(score):
                    scores[int(stage or 0), str(event.get("task"))] = float(score)
        rows: list[tuple[float | None, ...]] = []
        for t in range(len(self.tasks)):
            row = tuple(scores.get((t, task)) for task in self.tasks[: t + 1])
            if None in row:
                break
            rows.append(row)
        try:
            return AccuracyMatrix(self.tasks, tuple(rows))
        except ValueError as error:
            self.problems.append(f"{self.dir.events}: {error}")
            return None


def _task_name(item: Any) -> str:
    if isinstance(item, Mapping):
        return str(item.get("name") or item.get("task"))
    return str(item)


def _predicted_row(line: Mapping[str, Any]) -> PredictedRow:
    correct = bool(line["correct"])
    score = line.get("score")
    prediction = line.get("prediction")
    return PredictedRow(
        task=str(line["task"]),
        id=str(line["id"]),
        correct=correct,
        score=float(correct if score is None else score),
        prediction=None if prediction is None else str(prediction),
    )
