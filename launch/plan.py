"""What a recipe will do, worked out without training: stages, steps, tokens, rows to score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accrete.pipeline.progress import format_count

if TYPE_CHECKING:
    from accrete.launch.prepare import Prepared
    from accrete.pipeline.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One task's share of a run."""

    task: str
    rows_train: int
    rows_eval: int
    steps: int
    epochs: float
    """Passes over the training rows; below 1 where `max_steps` ends the task early."""
    train_tokens: int
    """Prompt and answer tokens of all steps, from the mean lengths."""
    scored_rows: int
    """Rows scored when the stage ends: this task's and all earlier ones', and the next one's where
    forward transfer is wanted."""
    truncated_pct: float
    """Percent of the training rows whose text is cut."""
    streamed: bool
    warnings: tuple[str, ...]


def plan_stages(config: RunConfig, prepared: Prepared) -> list[PlannedStage]:
    """The stages of a run, in order."""
    from accrete.launch.forecast.methods import epoch_rows
    from accrete.pipeline.stage_runner import planned_steps

    batch = config.train.global_batch_size
    counts = [task.num_train for task in prepared.tasks]
    stages = []
    for index, task in enumerate(prepared.tasks):
        # Some methods train rows of earlier tasks as well.
        epoch = epoch_rows(config.method.kind, config.method, counts, index, batch)
        per_epoch = -(-epoch // batch)
        steps = planned_steps(config, index, per_epoch)
        # The last batch of an epoch may be short.
        full, rest = divmod(steps, per_epoch)
        rows = full * epoch + min(rest * batch, epoch)
        train = task.stats.train
        ahead = 1 if config.eval.forward_transfer else 0
        stages.append(
            PlannedStage(
                task=task.name,
                rows_train=task.num_train,
                rows_eval=task.num_eval,
                steps=steps,
                epochs=rows / epoch,
                train_tokens=round(rows * (train.mean_prompt_tokens + train.mean_answer_tokens)),
                scored_rows=sum(seen.num_eval for seen in prepared.tasks[: index + 1 + ahead]),
                truncated_pct=train.truncated_pct,
                streamed=task.streamed,
                warnings=task.stats.warnings,
            )
        )
    return stages


def untrained_rows(config: RunConfig, stages: list[PlannedStage]) -> int:
    """Rows scored before the first step, for forward transfer (the first task has none)."""
    return sum(stage.rows_eval for stage in stages[1:]) if config.eval.forward_transfer else 0


def plan_json(
    config: RunConfig,
    resolved: Mapping[str, Any],
    origins: Mapping[str, str],
    prepared: Prepared,
    forecast: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The plan as `accrete plan --json` prints it.

    Args:
        config: The recipe.
        resolved: All its values, as plain data.
        origins: Where each of them comes from.
        prepared: Its tasks.
        forecast: Time, memory and the rest, as `RunForecast.to_json` gives them.
    """
    stages = plan_stages(config, prepared)
    return {
        "name": config.name,
        "procs": prepared.procs,
        "device": prepared.device,
        "model_path": prepared.model_path,
        "stages": [asdict(stage) for stage in stages],
        "steps": sum(stage.steps for stage in stages),
        "train_tokens": sum(stage.train_tokens for stage in stages),
        "scored_rows": untrained_rows(config, stages) + sum(s.scored_rows for s in stages),
        **({} if forecast is None else {"forecast": dict(forecast)}),
        "config": dict(resolved),
        "origins": dict(origins),
    }


def plan_view(plan: Mapping[str, Any], fits: float | None = None) -> Group:
    """The plan as `accrete plan` prints it: values with their origin, the stages, the forecast.

    Args:
        plan: As `plan_json` gives it.
        fits: GiB of memory that a rank has, if that is known.
    """
    values = Table(title="values and where they come from", title_justify="left", box=box.SIMPLE)
    for heading in ("key", "value", "origin"):
        values.add_column(heading, overflow="fold")
    origins = plan["origins"]
    for key, value in flatten(plan["config"]):
        origin = origin_of(key, origins)
        if origin == "default" and key.startswith("tasks."):
            continue
        row = (Text(key), Text(show(value)), Text(origin))
        values.add_row(*row, style="dim" if origin == "default" else None)
    stages = Table(title="stages", title_justify="left", box=box.SIMPLE)
    stages.add_column("task")
    for heading in ("train rows", "steps", "epochs", "tokens", "cut rows", "scored rows"):
        stages.add_column(heading, justify="right")
    for number, stage in enumerate(plan["stages"], start=1):
        stages.add_row(
            Text(f"{number} {stage['task']}" + (" (streamed)" if stage["streamed"] else "")),
            str(stage["rows_train"]),
            str(stage["steps"]),
            f"{stage['epochs']:.2f}",
            format_count(stage["train_tokens"]),
            f"{stage['truncated_pct']:.1f}%",
            str(stage["scored_rows"]),
        )
    warnings = [
        Text(f"warning: {stage['task']}: {warning}", style="yellow")
        for stage in plan["stages"]
        for warning in stage["warnings"]
    ]
    total = Text(
        f"{plan['steps']} steps, about {format_count(plan['train_tokens'])} training tokens, "
        f"{plan['scored_rows']} rows to score, {plan['procs']} processes on {plan['device']}"
    )
    parts: list[RenderableType] = [values, stages, *warnings, total]
    if "forecast" in plan:
        from accrete.launch.forecast.view import forecast_view

        parts.append(forecast_view(plan["forecast"], fits))
    return Group(*parts)


def flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested settings with their dotted keys; lists of plain values are leaves."""
    if isinstance(value, Mapping) and value:
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        parts = list(enumerate(value))
    else:
        return [(path, value)]
    return [
        leaf for key, part in parts for leaf in flatten(part, f"{path}.{key}" if path else str(key))
    ]


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Origin of a key, or of the nearest section above it that has one."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"


def show(value: Any) -> str:
    """A value as YAML would write it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)
