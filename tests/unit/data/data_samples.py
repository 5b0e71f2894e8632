"""Rows that several tests of this folder write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accrete.pipeline.data.config import ColumnsConfig, TaskConfig
from accrete.pipeline.data.handle import TaskHandle

WriteRows = Callable[[Path, Sequence[Any]], Path]
Prepare = Callable[..., list[TaskHandle]]


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


def task(name: str = "t", **fields: Any) -> TaskConfig:
    """A task of two JSON files in a folder of its name."""
    given: dict[str, Any] = {
        "files": {"train": f"{name}/train.jsonl", "test": f"{name}/test.jsonl"},
        "columns": ColumnsConfig(id="id"),
        "labels": ["good", "bad"],
        "instruction": "Decide.",
    }
    return TaskConfig(name=name, **{**given, **fields})
