"""Rows that several tests of this folder write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WriteRows = Callable[[Path, Sequence[Any]], Path]


def rows_of(count: int, labels: Sequence[str] = ("good", "bad"), start: int = 0) -> list[Any]:
    """Rows of different lengths whose answers go round the labels."""
    return [
        {
            "id": f"r{i}",
            "input": f"text {i} " + "fox " * (i * 7 % 23),
            "output": labels[i % len(labels)],
        }
        for i in range(start, start + count)
    ]
