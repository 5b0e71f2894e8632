"""From a recipe to its forecast: with prepared rows, or from shapes and assumed rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accrete.launch.forecast.place import Place, choose_speed
from accrete.launch.forecast.rows import TaskRows, assume_rows, read_rows
from accrete.launch.forecast.run import Forecaster, RunForecast
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.prepare import Prepared
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig


@dataclass(frozen=True)
class Assumed:
    """Rows of every task where none are read."""

    train: int
    scored: int
    answer: int
    """Tokens of an answer; prompts are taken to be `data.max_source_tokens` long."""

    @classmethod
    def parse(cls, text: str) -> Assumed:
        """From `TRAIN`, `TRAIN/SCORED` or `TRAIN/SCORED/ANSWER`.

        Raises:
            ConfigError: It is something else.
        """
        parts = text.split("/")
        if len(parts) > 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"--assume {text}: give numbers above 0, as in --assume 1000 (training rows of "
                "each task), --assume 1000/500 (and rows to score) or --assume 1000/500/8 (and "
                "tokens of an answer)."
            )
        train, scored, answer = [int(part) for part in parts] + [0, 500, 8][len(parts) :]
        return cls(train, scored, answer)


def assumed_tasks(config: RunConfig, assumed: Assumed) -> list[TaskRows]:
    """All tasks of a recipe with assumed rows."""
    answer = min(assumed.answer, config.data.max_target_tokens)
    return assume_rows(config, assumed.train, assumed.scored, answer)


def without_rows(config: RunConfig, tasks: list[TaskRows], place: Place) -> Prepared:
    """What `prepare` would find, as far as a plan shows it, without a model or any row.

    Raises:
        ModelError: The model cannot be made, or its configuration is not at hand.
        ConfigError: `eval.mode` cannot score a task, by the metric that it has or is known for.
    """
    from accrete.eval.evaluator import require_scorable
    from accrete.pipeline.models.cache import cache_root
    from accrete.pipeline.models.tiny import materialize

    handles = [_handle(task) for task in tasks]
    require_scorable(config.eval, handles)
    path = config.model.path
    if path is None or config.model.gguf_file is not None:
        path = str(materialize(config.model, cache_root(), lambda line: None))
    plan = ModelPlan.of(config, path, place.device)
    return Prepared(
        device=place.device,
        procs=place.procs,
        model_path=path,
        tokenizer_path=config.model.tokenizer or path,
        seq2seq=plan.seq2seq,
        tasks=handles,
    )


def _handle(rows: TaskRows) -> TaskHandle:
    def split(count: int) -> SplitStats:
        return SplitStats(
            rows=count,
            truncated_pct=0.0,
            mean_prompt_tokens=rows.prompt,
            max_prompt_tokens=rows.longest_prompt,
            mean_answer_tokens=rows.answer,
            max_answer_tokens=rows.longest_answer,
        )

    return TaskHandle(
        name=rows.name,
        metric=rows.metric,
        labels=None,
        train_dir="",
        eval_dir="",
        num_train=rows.train,
        num_eval=rows.scored,
        streamed=False,
        stats=TaskStats(train=split(rows.train), eval=split(rows.scored)),
        fingerprint="",
    )


def forecast_recipe(
    config: RunConfig,
    prepared: Prepared,
    place: Place,
    say: Callable[[str], None],
    *,
    tasks: list[TaskRows] | None = None,
    measure: bool = False,
) -> RunForecast:
    """What a recipe will need.

    Args:
        config: The recipe.
        prepared: Its model and tasks.
        place: Where it would run.
        say: Told what takes time.
        tasks: Assumed rows; default: those of `prepared`.
        measure: Calibrate on this machine.

    Raises:
        ModelError: The model's configuration is not at hand.
        CalibrationError: The calibration failed.
    """
    if tasks is None:
        tasks = [read_rows(config, task, index) for index, task in enumerate(prepared.tasks)]
    plan = ModelPlan.of(config, prepared.model_path, place.device)
    forecaster = Forecaster(plan, tasks, place.world, place.procs)
    speed = choose_speed(place, forecaster, say, measure=measure)
    found = forecaster.forecast(speed)
    return found if speed is None else replace(found, notes=[*place.notes(), *found.notes])
