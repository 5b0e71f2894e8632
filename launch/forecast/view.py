"""The forecast as `accrete plan` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from accrete.pipeline.progress import format_count, format_duration

GIB = 2**30
CONTEXT = 0.8
"""GiB that a GPU's own context may take beside PyTorch's memory."""
PARTS = ("weights", "gradients", "moments", "activations", "method", "buffers")


def forecast_view(forecast: Mapping[str, Any], fits: float | None = None) -> Group:
    """Tables of time and memory, and a few lines.

    Args:
        forecast: As `RunForecast.to_json` gives it.
        fits: GiB that a rank has, if that is known.
    """
    lines: list[RenderableType] = [_time(forecast), _memory(forecast, fits)]
    lines += [Text(line) for line in _summary(forecast)]
    lines += [Text(f"note: {note}", style="dim") for note in forecast["notes"]]
    return Group(*lines)


def _time(forecast: Mapping[str, Any]) -> Table:
    table = Table(title="time", title_justify="left", box=box.SIMPLE)
    table.add_column("task")
    open_ended = _open_ended(forecast)
    headings = ["a step", "training", "method's passes", "scoring", "all"]
    # Where rows are decoded, what scoring takes if a model does not stop.
    headings[4:4] = ["scoring at most"] if open_ended else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, stage in enumerate(forecast["stages"], start=1):
        table.add_row(
            Text(f"{number} {stage['task']}"),
            _short(stage["step_seconds"]),
            _duration(stage["train_seconds"]),
            _duration(stage["method_seconds"]),
            _duration(stage["scoring_seconds"]),
            *([_duration(stage["scoring_most_seconds"])] if open_ended else []),
            _duration(stage["seconds"]),
        )
    return table


def _open_ended(forecast: Mapping[str, Any]) -> bool:
    """Whether scoring may take longer than is counted, as rows are decoded."""
    return any(task["most_seconds"] > task["seconds"] for task in forecast["scoring"])


def _memory(forecast: Mapping[str, Any], fits: float | None) -> Table:
    """A column for every ZeRO stage; the recipe's own is marked."""
    table = Table(
        title="GiB on a rank, at the task that needs most", title_justify="left", box=box.SIMPLE
    )
    table.add_column("")
    peaks = forecast["peaks"]
    plain = "plain" in forecast["traffic_bytes"]
    names = ["plain"] if plain else [str(peak["zero_stage"]) for peak in peaks]
    for name in names:
        chosen = plain or name == str(forecast["zero_stage"])
        table.add_column(
            "plain engine" if plain else f"ZeRO {name}" + (" *" if chosen else ""),
            justify="right",
            style=None if chosen else "dim",
        )
    for part in PARTS:
        table.add_row(part, *(_gib(peak[part]) for peak in peaks))
    table.add_row("peak of a training step", *(_gib(peak["step"]) for peak in peaks))
    if any(peak["passes"] for peak in peaks):
        table.add_row("peak of the method's passes", *(_gib(peak["passes"]) for peak in peaks))
    table.add_row("peak of scoring", *(_gib(peak["scoring"]) for peak in peaks))
    if any(peak["start"] == peak["peak"] for peak in peaks):
        table.add_row("peak at the start (whole model)", *(_gib(peak["start"]) for peak in peaks))
    table.add_row("peak", *(_gib(peak["peak"]) for peak in peaks), style="bold")
    if fits is not None:
        room = (fits - CONTEXT) * GIB
        answers = ("yes" if peak["peak"] < room else "no" for peak in peaks)
        table.add_row(f"fits into {fits:.3g}", *answers)
    table.add_row("sent in a step", *(_gib(forecast["traffic_bytes"][name]) for name in names))
    return table


def _summary(forecast: Mapping[str, Any]) -> list[str]:
    disk = forecast["disk"]
    ranks = forecast["world"]
    lines = [
        f"{format_count(forecast['parameters'])} parameters, "
        f"{format_count(forecast['trained'])} trained, {forecast['layers']} adapted layers; "
        f"{ranks} rank{'s' if ranks > 1 else ''} on {forecast['device']}, "
        f"{forecast['accumulation']} micro-batch{'es' if forecast['accumulation'] > 1 else ''} "
        "a step"
    ]
    if forecast["seconds"] is None:
        lines.append(
            "time: unknown; name a GPU with --gpu, or use --calibrate on the machine itself"
        )
    else:
        about = "roughly " if forecast["rough"] else "about "
        price = f", price {forecast['price']:.2f}" if "price" in forecast else ""
        hours = forecast["seconds"] / 3600 * ranks
        kind = "GPU" if forecast["device"] == "cuda" else "process"
        lines.append(
            f"time: {about}{format_duration(forecast['seconds'])}, {hours:.2f} {kind}-hours{price} "
            f"({forecast['speed']})"
        )
        if _open_ended(forecast):
            lines.append(
                f"time if no decoded answer ends before its limit: {about}"
                f"{format_duration(forecast['most_seconds'])}"
            )
    if forecast["device"] == "cuda":
        lines.append(
            f"host memory of a node: at least {_gib(forecast['load_bytes'])} GiB at the start, as "
            "every process loads the whole model"
        )
    lines.append(
        f"disk: run folder up to {_gib(disk['run_folder'])} GiB (adapters {_gib(disk['adapters'])},"
        f" checkpoints {_gib(disk['checkpoints'] + disk['step_checkpoints'])}), prepared rows "
        f"{_gib(disk['prepared_rows'])} GiB in the cache"
    )
    return lines


def _gib(size: float) -> str:
    gib = size / GIB
    if gib >= 100:
        return f"{gib:.0f}"
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.01 else f"{gib:.4f}"


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else format_duration(seconds)


def _short(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
