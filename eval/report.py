"""One offline HTML file that says what a run did, from the files in its folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accrete.eval.charts import loss_chart, task_curve
from accrete.eval.ledger import read_ledger, run_seconds
from accrete.eval.report_settings import flatten, group_settings
from accrete.eval.report_tables import (
    TaskRetention,
    heatmap,
    metric_cards,
    retention,
    stage_rows,
    verdict,
)
from accrete.eval.run_record import RunRecord
from accrete.eval.stats import Interval, bootstrap_matrix, interval, metric_intervals
from accrete.pipeline.interruption import InterruptionError
from accrete.pipeline.records import json_safe
from accrete.pipeline.run_dir import write_text

_NONE, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
_SHOWN_ELSEWHERE = {"name", "command", "started", "versions", "hardware", "origins"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    The file needs no network and runs no script; what the model and the data say is escaped.

    Raises:
        RunFolderError: The folder holds no run.
    """
    record = RunRecord(run_dir)
    text = _environment().get_template("report.html.jinja").render(report_content(record))
    # A lone surrogate in a prediction cannot be written as UTF-8 and must not cost the report.
    write_text(record.dir.report, text.encode("utf-8", "replace").decode("utf-8"))
    return record.dir.report


def refresh_report(run_dir: Path) -> None:
    """`write_report` for a run, which does not depend on a view that can be made again."""
    try:
        write_report(run_dir)
    except InterruptionError:  # the wish to stop may come at any moment
        raise
    except Exception as error:
        print(
            f"warning: {run_dir}: the report could not be written: {error!r}. Make it with "
            "`accrete report`.",
            file=sys.stderr,
        )


def report_content(record: RunRecord) -> dict[str, Any]:
    """Everything the template shows, by name."""
    matrix = record.matrix
    scores = record.row_scores()
    resampled = bootstrap_matrix(scores) if scores else None
    ledger = read_ledger(record.tasks, record.events)
    for stage in ledger.stages[: len(matrix.rows) if matrix else 0]:
        stage.state = "finished"  # the report may be written before the event that says so
    cells: list[list[Interval | None]] | None = None
    intervals: dict[str, Interval | None] = {}
    if resampled is not None:
        size = resampled.shape[-1]
        cells = [[interval(resampled[:, t, i]) for i in range(t + 1)] for t in range(size)]
        intervals = metric_intervals(resampled)
    cards = metric_cards(matrix, intervals)
    content: dict[str, Any] = {
        "record": record,
        "title": record.name,
        "verdict": verdict(matrix, record.tasks, ledger.stages),
        "status": _status(record),
        "cards": cards,
        "variants": matrix.variants() if matrix else {},
        "has_intervals": resampled is not None,
        "heatmap": heatmap(matrix, record.tasks, record.counts, cells, ledger.stages),
        "curves": [task_curve(matrix, i, cells) for i in range(len(matrix.tasks))]
        if matrix
        else [],
        "stage_rows": stage_rows(matrix, resampled) if matrix else [],
        "retention": _retention(record),
        "ledger": ledger,
        "loss": loss_chart(ledger.losses, record.tasks),
        "settings": group_settings(record.config, record.info.get("origins")),
        "versions": flatten(record.info.get("versions")),
        "hardware": flatten(record.info.get("hardware")),
        "also_recorded": flatten(
            {key: value for key, value in record.info.items() if key not in _SHOWN_ELSEWHERE}
        ),
        "run_seconds": run_seconds(record.events),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    content["warnings"] = _warnings(record)
    content["data"] = _data(record, content)
    return content


def _status(record: RunRecord) -> str:
    if record.first_event("run_finished") or record.finished:
        return "finished"
    stages = len(record.matrix.rows) if record.matrix else 0
    return f"{stages} of {len(record.tasks)} stages scored"


def _warnings(record: RunRecord) -> list[str]:
    """What went wrong or deserves a look, oldest first, each once."""
    found = [
        _resumed(event) if event["event"] == "resumed" else str(event.get("message", ""))
        for event in record.events
        if event["event"] in ("warning", "resumed")
    ]
    found += [record.failure or "", *record.problems]
    return list(dict.fromkeys(text for text in found if text))


def _resumed(event: Mapping[str, Any]) -> str:
    """Where a run went on; without a step that is behind a finished stage."""
    stage, step = _one_based(event.get("stage")), event.get("step")
    return (
        f"Resumed after stage {stage}."
        if step is None
        else f"Resumed in stage {stage}, step {step}."
    )


def _one_based(stage: Any) -> str:
    return str(stage + 1) if isinstance(stage, int) else "?"


def _retention(record: RunRecord) -> list[TaskRetention]:
    stages = len(record.matrix.rows) if record.matrix else 0
    if stages < 2:
        return []
    last = record.predictions(stages - 1)
    found = []
    for i, task in enumerate(record.tasks[: stages - 1]):
        row = retention(task, record.predictions(i).get(task, []), last.get(task, []))
        if row is not None:
            found.append(row)
    return found


def _data(record: RunRecord, content: Mapping[str, Any]) -> Any:
    """What a program may want to read out of the report again."""
    return json_safe(
        {
            "name": record.name,
            "method": record.method,
            "model": record.model,
            "seed": record.seed,
            "status": content["status"],
            "matrix": record.matrix.to_json() if record.matrix else None,
            "intervals": {card.name: card.interval for card in content["cards"]},
            "stages": [asdict(stage) for stage in content["ledger"].stages],
            "warnings": content["warnings"],
        }
    )


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(seconds=_seconds, count=_count, size=_size, number=_number)
    return environment


def _seconds(value: float | None) -> str:
    """A duration in the two units that matter: `12.3 s`, `4 m 05 s`, `3 h 20 m`."""
    if value is None:
        return _NONE
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} m {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} m"


def _count(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _size(value: float | None) -> str:
    if value is None:
        return _NONE
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _number(value: float | None, digits: int = 1) -> str:
    """A score or a difference; a true minus sign."""
    return _NONE if value is None else f"{value:.{digits}f}".replace("-", _MINUS)
