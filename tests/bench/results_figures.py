"""What the runs of `make results` gave: kept in docs/results.json, shown in docs/results.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accrete.pipeline.records import Event, read_events
from accrete.pipeline.run_dir import RunDir, read_json, write_text

Record = dict[str, Any]
"""Figures of one finished run: see `measured`."""

HEAD = (
    "| method | seeds | AP | BWT | plasticity | seconds | state, bytes per rank | chosen |",
    "|---|---|---|---|---|---|---|---|",
)
BASELINE = {"ewc": "full", "gpm": "full"}
"""Kind -> what it has to beat; for the others `sequential`."""


def measured(folder: Path, settings: tuple[str, ...]) -> Record | None:
    """The figures of a run's folder, None if the run is not finished.

    Args:
        folder: The run's folder.
        settings: What tells this run from the others of its method.

    Raises:
        SystemExit: The folder holds a run with other settings.
    """
    run = RunDir(folder)
    events = list(read_events(run.events)) if run.events.is_file() else []
    if not any(event["event"] == Event.RUN_FINISHED for event in events):
        return None
    about, matrix = read_json(run.run), read_json(run.matrix)
    if not set(settings) <= set(about["overrides"]):
        wanted = " ".join(settings)
        raise SystemExit(f"{folder} was not made with {wanted}; move it away to run it anew.")
    return {
        "settings": list(settings),
        "metrics": matrix["metrics"],
        "matrix": matrix["matrix"],
        "seconds": round(_seconds(events)),
        "state_bytes": max(e["state_bytes"] for e in events if e["event"] == Event.CONSOLIDATED),
        "started": about["started"],
        "processor": about["hardware"]["cpu"],
        "torch": about["versions"]["torch"],
    }


def _seconds(events: list[dict[str, Any]]) -> float:
    """Time at work, of all attempts of a run that was cut off and resumed."""
    starts = [n for n, e in enumerate(events) if e["event"] in (Event.RUN_STARTED, Event.RESUMED)]
    ends = [*(n - 1 for n in starts[1:]), len(events) - 1]
    return sum(events[b]["time"] - events[a]["time"] for a, b in zip(starts, ends, strict=True))


class Figures:
    """The file of figures: model -> method -> run -> record.

    Args:
        path: The file; need not be there.
        model: The part of it that is read and added to.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.model = model
        self._all = self._read()

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return content

    def get(self, kind: str, name: str) -> Record | None:
        """The record of a method's run."""
        found: Record | None = self._all.get(self.model, {}).get(kind, {}).get(name)
        return found

    def put(self, kind: str, name: str, record: Record) -> None:
        """Add a record and write the file, a line for every run."""
        self._all = self._read()  # another model's runs may have been added
        self._all.setdefault(self.model, {}).setdefault(kind, {})[name] = record
        write_text(self.path, _lines(self._all))


def _lines(value: Any, depth: int = 0) -> str:
    """JSON with a line for every value of the third level: a new run is a new line."""
    if depth == 3:
        return json.dumps(value)
    inner = ",\n".join(
        f"{'  ' * (depth + 1)}{json.dumps(key)}: {_lines(value[key], depth + 1)}"
        for key in sorted(value)
    )
    return f"{{\n{inner}\n{'  ' * depth}}}" + "\n" * (depth == 0)


def row(kind: str, runs: Mapping[int, Record], chosen: tuple[str, ...]) -> str:
    """A method's line of the table, from its finished seeds."""
    cells = [
        _mean([record["metrics"][name] for record in runs.values()])
        for name in ("average_performance", "backward_transfer", "plasticity")
    ]
    seconds = statistics.median(record["seconds"] for record in runs.values())
    state = max(record["state_bytes"] for record in runs.values())
    return (
        f"| `{kind}` | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} | {state:,.0f} | "
        f"{' '.join(f'`{text}`' for text in chosen)} |"
    )


def shortfall(kind: str, mine: Mapping[int, Record], others: Mapping[int, Record]) -> str:
    """A sentence if a method does not beat its baseline, seed by seed; else nothing."""
    gains = [_score(mine[seed]) - _score(others[seed]) for seed in mine.keys() & others.keys()]
    if not gains or min(gains) > 0:
        return ""
    mean = statistics.mean(gains)
    baseline = BASELINE.get(kind, "sequential")
    over = f"points over {len(gains)} seed{'s' * (len(gains) > 1)}"
    if mean <= 0:
        return f"`{kind}` does not beat `{baseline}`: {mean:+.1f} {over}."
    return f"`{kind}` beats `{baseline}` by {mean:.1f} {over}, but not at every one."


def _score(record: Record) -> float:
    return float(record["metrics"]["average_performance"])


def _mean(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
