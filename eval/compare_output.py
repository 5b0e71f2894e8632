"""A comparison as text for a terminal, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from accrete.eval.matrix import METRIC_NAMES
from accrete.pipeline.records import json_safe

if TYPE_CHECKING:
    from accrete.eval.compare import Comparison, Line, Setting, Summary
    from accrete.eval.paired import PairedTest

_HEADS = {
    "average_performance": "AP",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer": "FWT",
    "plasticity": "plasticity",
    "incremental_accuracy": "incr. acc.",
}
_TEST_HEADS = ("pair", "seeds", "AP difference", "95% interval", "p", "p Holm", "p bootstrap")
_TEXT_HEADS = {"rank", "recipe", "method", "seeds", "pair"}
_EXPLAINED = (
    "Mean and standard deviation over seeds, in percent points. Tests: AP on the same rows after "
    "the last stage; p by the signs of the rows' differences (McNemar's exact test for one seed, "
    "scores of 0 or 1 and tasks of one size), Holm-corrected over the pairs; interval and p "
    "bootstrap of the AP difference by a bootstrap over rows, tasks kept apart."
)


def to_text(comparison: Comparison, width: int = 120) -> str:
    """Tables for a terminal of `width` columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    for setting in comparison.settings:
        for heads, rows in _tables(setting):
            title = _title(setting) if heads[0] != "pair" else "Paired tests"
            table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
            for head in heads:
                is_text = head in _TEXT_HEADS
                table.add_column(head, justify="left" if is_text else "right", overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
        for note in setting.notes:
            console.print(Text(f"! {note}"))
        console.print()
    for note in comparison.notes:
        console.print(Text(f"! {note}"))
    console.print(Text(_EXPLAINED))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """The same tables in Markdown."""
    parts: list[str] = []
    for setting in comparison.settings:
        parts.append(f"### {_escape(_title(setting))}\n")
        for heads, rows in _tables(setting):
            lines = [heads, ["---" if head in _TEXT_HEADS else "---:" for head in heads]]
            lines += [[_escape(cell) for cell in row] for row in rows]
            parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
        parts += [f"- {_escape(note)}\n" for note in setting.notes]
    parts += [f"- {_escape(note)}\n" for note in comparison.notes]
    parts.append(_EXPLAINED + "\n")
    return "\n".join(parts)


def to_csv(comparison: Comparison) -> str:
    """One line for each line of the tables; full precision, empty where there is no value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = [f"{name}_{part}" for name in METRIC_NAMES for part in ("mean", "sd")]
    heads = ["model", "tasks", "recipe", "method", "settings", "ranked", "seeds", "num"]
    writer.writerow([*heads, *numbers])
    for setting in comparison.settings:
        for line in setting.lines:
            writer.writerow(
                [
                    setting.model,
                    " ".join(setting.tasks),
                    line.recipe,
                    line.method,
                    _told(line),
                    "yes" if setting.ranked else "no",
                    _seeds(line.seeds),
                    len(line.runs),
                    *(
                        "" if value is None else repr(value)
                        for name in METRIC_NAMES
                        for value in (line.metrics[name].mean, line.metrics[name].sd)
                    ),
                ]
            )
    return file.getvalue()


def to_json(comparison: Comparison) -> str:
    """Everything, for programs."""
    return json.dumps(json_safe(asdict(comparison)), indent=2, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "csv": to_csv,
    "json": to_json,
}
"""The formats of `accrete compare --format`."""


def _tables(setting: Setting) -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of a setting's table and, if there are any, of its tests."""
    heads = ["method", "seeds", *_HEADS.values()]
    rows = [_row(line) for line in setting.lines]
    if _one_recipe(setting) is None:
        heads.insert(0, "recipe")
        rows = [[line.recipe, *row] for line, row in zip(setting.lines, rows, strict=True)]
    if setting.ranked:
        heads.insert(0, "rank")
        rows = [[str(rank), *row] for rank, row in enumerate(rows, start=1)]
    tables = [(heads, rows)]
    if setting.tests:
        tables.append((list(_TEST_HEADS), [_test_row(test) for test in setting.tests]))
    return tables


def _row(line: Line) -> list[str]:
    cells = [_cell(line.metrics[name]) for name in _HEADS]
    method = f"{line.method} ({_told(line)})" if line.settings else line.method
    return [method, _seeds(line.seeds), *cells]


def _told(line: Line) -> str:
    """What tells a line from the others of its recipe and method."""
    return ", ".join(f"{name}={value}" for name, value in line.settings.items())


def _test_row(test: PairedTest) -> list[str]:
    spread = test.interval
    interval = "-" if spread is None else f"{spread.low:+.1f} to {spread.high:+.1f}"
    p_values = [_p(value) for value in (test.p_value, test.p_holm, test.p_bootstrap)]
    seeds = _seeds(test.seeds)
    return [f"{test.a} - {test.b}", seeds, f"{test.difference:+.1f}", interval, *p_values]


def _cell(summary: Summary) -> str:
    if summary.mean is None:
        return "-"
    return f"{summary.mean:.1f}" + ("" if summary.sd is None else f" ± {summary.sd:.1f}")


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _seeds(seeds: list[int | None]) -> str:
    return " ".join("?" if seed is None else str(seed) for seed in seeds)


def _title(setting: Setting) -> str:
    recipe = _one_recipe(setting)
    model = setting.model if recipe is None else f"{recipe}, {setting.model}"
    return f"{model}: {', '.join(setting.tasks)}"


def _one_recipe(setting: Setting) -> str | None:
    """The recipe of all lines, if it is the same: then it stands in the title."""
    recipes = {line.recipe for line in setting.lines}
    return recipes.pop() if len(recipes) == 1 else None


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too."""
    for special in "\\|`*_<>[]":
        text = text.replace(special, "\\" + special)
    return text.replace("\n", " ")
