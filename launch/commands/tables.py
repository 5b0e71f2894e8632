"""Plain tables for listings."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without frames; in a pipe its lines are not cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for row in (head, *rows):
            print("\t".join(row))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in head:
        table.add_column(title, no_wrap=title == head[0])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
