"""The run as a person at a terminal (or a reader of a log file) sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from accrete.pipeline.config.run import LogConfig
from accrete.pipeline.progress import Progress, format_count, format_duration
from accrete.pipeline.records import Event

FORGOTTEN_POINTS = 5.0
"""A task this far below its best earlier score is marked as forgotten."""
NARROW_NAME = 16
"""Columns of a name where the matrix hardly fits: with them, 15 tasks fit the usual 80."""
LOG_WIDTH = 200
"""Columns of plain lines where there is no terminal to ask."""


class ConsoleSink:
    """Live progress in a terminal, plain lines elsewhere, warnings only when quiet."""

    def __init__(self, config: LogConfig, console: Console | None = None) -> None:
        self._console = console or Console()
        if not self._console.is_terminal and console is None:
            self._console = Console(width=LOG_WIDTH)
        self._every = config.every_steps
        self._mode = config.console
        if self._mode == "auto":
            live = self._console.is_terminal and not self._console.is_dumb_terminal
            self._mode = "rich" if live else "plain"
        self._progress = Progress()
        self._bars = _LiveBars(self._console) if self._mode == "rich" else None

    def restore(self, event: Mapping[str, Any]) -> None:
        """Take in an event from before a resume."""
        self._progress.update(event)

    def write(self, event: Mapping[str, Any]) -> None:
        """Show an event."""
        self._progress.update(event)
        kind = event["event"]
        if kind == Event.WARNING:
            self._print(Text(f"warning: {event['message']}", style="yellow"))
        if self._mode == "quiet":
            return
        if kind == Event.STEP and self._bars is None:
            self._step_line()
        elif kind == Event.STAGE_FINISHED:
            self._print(stage_table(self._progress, event["stage"]))
        elif kind == Event.RUN_FINISHED:
            self._finish(event)
        elif line := _LINES.get(kind):
            self._print(Text(line(self._progress, event), style="dim"))
        if self._bars is not None and kind != Event.RUN_FINISHED:
            self._bars.show(self._progress, kind)

    def close(self) -> None:
        """End the live display."""
        if self._bars is not None:
            self._bars.stop()

    def _print(self, content: Text | Table) -> None:
        # Log readers wrap lines as they like; only a terminal is wrapped for.
        self._console.print(content, soft_wrap=isinstance(content, Text))

    def _step_line(self) -> None:
        now = self._progress
        if now.step % self._every == 0 or now.step in (1, now.stage_steps):
            self._print(
                Text(
                    f"task {now.stage + 1}/{len(now.plan)} {_task_name(now)}  "
                    f"step {now.step}/{now.stage_steps}  {_step_details(now)}"
                )
            )

    def _finish(self, event: Mapping[str, Any]) -> None:
        if self._bars is not None:
            self._bars.stop()
        now = self._progress
        rows = [list(now.row(stage).values()) for stage in range(len(now.plan))]
        self._print(fitting_matrix(self._console, now.tasks, rows))
        self._print(Text(f"finished in {format_duration(event['seconds'])}", style="dim"))


class _LiveBars:
    """Two bars that stay at the bottom of the terminal: the present task and the whole run."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[details]}", markup=False),
            console=console,
            refresh_per_second=8,
            transient=True,
        )
        self._task: TaskID | None = None
        self._run: TaskID | None = None

    def show(self, now: Progress, kind: str) -> None:
        if not now.plan:
            return
        if self._task is None or self._run is None:
            self._task = self._bars.add_task("", details="")
            self._run = self._bars.add_task("", details="")
        if kind == Event.STEP or now.step < now.stage_steps:
            details = f"{now.step}/{now.stage_steps}  {_speed_details(now)}"
        else:
            scored = f"scored {len(now.row(now.stage))}/{now.stage + 1} tasks"
            details = f"{now.step}/{now.stage_steps}  {scored}"
        self._bars.update(
            self._task,
            description=f"task {now.stage + 1}/{len(now.plan)} {_task_name(now)}",
            completed=now.step,
            total=max(1, now.stage_steps),
            details=details,
        )
        self._bars.update(
            self._run,
            description="run",
            completed=now.steps_done,
            total=max(1, now.steps_total),
            details=f"{now.steps_done}/{now.steps_total}  eta {_run_eta(now)}",
        )
        self._bars.start()  # at the first call: the bars never appear empty

    def stop(self) -> None:
        self._bars.stop()


def _task_name(now: Progress) -> str:
    return now.plan[now.stage].task if now.stage < len(now.plan) else ""


def _run_eta(now: Progress) -> str:
    eta = now.run_eta
    if eta is None:
        return "?"
    return format_duration(eta.seconds) + ("" if eta.whole else " + scoring")


def _loss_and_speed(now: Progress) -> str:
    loss = "" if now.loss is None else f"loss {now.loss:.3f}  "
    return loss + ("" if now.tokens_per_s is None else f"{format_count(now.tokens_per_s)} tok/s  ")


def _task_eta(now: Progress) -> str:
    return "?" if now.task_eta is None else format_duration(now.task_eta)


def _step_details(now: Progress) -> str:
    return f"{_loss_and_speed(now)}eta task {_task_eta(now)}  run {_run_eta(now)}"


def _speed_details(now: Progress) -> str:
    step = "" if now.step_seconds is None else f"{now.step_seconds:.2g} s/step  "
    return f"{_loss_and_speed(now)}{step}eta {_task_eta(now)}"


def _started_line(now: Progress, event: Mapping[str, Any]) -> str:
    return (
        f"{event.get('name', 'run')}: {len(now.plan)} tasks, {now.steps_total} steps, "
        f"method {event.get('method', '?')}, {event.get('world', '?')} processes on "
        f"{event.get('device', '?')}"
    )


def _resumed_line(now: Progress, event: Mapping[str, Any]) -> str:
    where = "its end" if event["step"] is None else f"step {event['step']}"
    return f"resumed at task {event['stage'] + 1}/{len(now.plan)} {_task_name(now)}, {where}"


_LINES = {Event.RUN_STARTED: _started_line, Event.RESUMED: _resumed_line}


def stage_table(now: Progress, stage: int) -> Table:
    """The new row of the matrix, beside the best that each task ever had."""
    name = now.tasks[stage] if stage < len(now.plan) else str(stage)
    table = Table(
        title=Text(f"after task {stage + 1}/{len(now.plan)} {name}"),  # no markup in a name
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("task")
    for heading in ("score", "best before", "change"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for task, score in now.row(stage).items():
        best = now.best_before(stage, task)
        if best is None:
            table.add_row(Text(task), f"{score:.1f}", "", "", "new", style="bold")
            continue
        forgotten = score <= best - FORGOTTEN_POINTS
        table.add_row(
            Text(task),
            f"{score:.1f}",
            f"{best:.1f}",
            f"{score - best:+.1f}",
            "forgotten" if forgotten else "",
            style="red" if forgotten else None,
        )
    return table


def fitting_matrix(
    console: Console, tasks: Sequence[str], matrix: Sequence[Sequence[float | None]]
) -> Table:
    """The matrix with names and decimals where the console is wide enough: rich would cut both."""
    unlimited = console.options.update(max_width=10_000)
    for numbered, narrow in ((len(tasks) > 8, False), (True, False)):
        table = matrix_table(tasks, matrix, numbered=numbered, narrow=narrow)
        if console.measure(table, options=unlimited).maximum <= console.width:
            return table
    return matrix_table(tasks, matrix, numbered=True, narrow=True)


def matrix_table(
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    *,
    numbered: bool,
    narrow: bool,
) -> Table:
    """The accuracy matrix: a row for each stage, a column for each task, in percent.

    Args:
        tasks: Their names.
        matrix: `matrix[t][i]`, for i up to t.
        numbered: Name the columns by number; the rows say which task it is.
        narrow: Whole percents, close together, and names cut at the end.
    """
    table = Table(
        title="accuracy after each task (percent)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0) if narrow else (0, 1),
    )
    table.add_column("after")
    for index, task in enumerate(tasks, start=1):
        table.add_column(Text(str(index) if numbered else task), justify="right")
    for index, row in enumerate(matrix):
        name = Text(f"{index + 1} {tasks[index]}" if numbered else tasks[index])
        if narrow:
            name.truncate(NARROW_NAME, overflow="ellipsis")
        digits = 0 if narrow else 1
        table.add_row(name, *("n/a" if score is None else f"{score:.{digits}f}" for score in row))
    return table
