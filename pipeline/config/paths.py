"""Paths in a recipe: relative to the working directory, `~` expanded, kept absolute in the run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.methods.registry import is_method_file


def expand_paths(config: RunConfig) -> RunConfig:
    """`config` with absolute paths, so that a run can be resumed from another folder.

    A task's `files` stay relative where `data.root` is given, which they start from.
    """
    data = dataclasses.replace(
        config.data,
        root=_absolute(config.data.root),
        instructions=_absolute(config.data.instructions),
    )
    model = dataclasses.replace(
        config.model,
        path=_hub_or_folder(config.model.path),
        tokenizer=_hub_or_folder(config.model.tokenizer),
        builder_data=_absolute(config.model.builder_data),
    )
    method = config.method
    if is_method_file(method.kind):
        file, colon, name = method.kind.rpartition(":")
        file, name = (file, name) if file.endswith(".py") else (method.kind, "")
        kind = f"{_absolute(file)}{colon if name else ''}{name}"
        method = dataclasses.replace(method, kind=kind)
    tasks = [_expand_task(task, config.data) for task in config.tasks]
    return dataclasses.replace(config, tasks=tasks, data=data, model=model, method=method)


def _expand_task(task: TaskConfig, data: DataConfig) -> TaskConfig:
    files, dataset = task.files, task.dataset
    if files is not None and data.root is None:
        files = {split: _absolute_files(given) for split, given in files.items()}
    if files is None and data.format == "hub":
        dataset = _hub_or_folder(dataset)
    return dataclasses.replace(task, files=files, dataset=dataset)


def _absolute_files(given: str | list[str]) -> str | list[str]:
    """A name or glob, or a list of them."""
    if isinstance(given, str):
        return os.path.abspath(os.path.expanduser(given))
    return [os.path.abspath(os.path.expanduser(name)) for name in given]


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def _hub_or_folder(reference: str | None) -> str | None:
    """A hub id stays as it is; what looks like a path, or is there, is one."""
    if reference is None:
        return None
    if reference.startswith((".", "/", "~")) or Path(reference).exists():
        return _absolute(reference)
    return reference
