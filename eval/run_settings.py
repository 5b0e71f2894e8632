"""The settings of a run that decide what its scores mean, and those that decide what it learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

SCORING_KEYS = ("eval.mode", "eval.decode_misses")
"""Settings that change how a row is scored."""

PROMPT_KEYS = (
    "data.format",
    "data.benchmark",
    "data.template",
    "data.examples",
    "data.instructions",
    "data.eval_split",
    "data.max_eval_examples",
    "data.max_source_tokens",
    "data.cut",
    "data.max_target_tokens",
    "model.tokenizer",
)
"""Settings that change the rows that are scored, or their prompts."""

TASK_PROMPT_KEYS = (
    "dataset",
    "config",
    "revision",
    "columns",
    "label_names",
    "labels",
    "instruction",
    "family",
)
"""The same of each task. Its `files`, like `data.root`, are paths, which differ from machine to
machine: other rows in them are noticed by what was prepared from them."""

TRAINING_SECTIONS = ("method", "adapter", "train")
"""Sections whose settings change what is learned."""

TRAINING_KEYS = (
    "data.max_train_examples",
    "data.window_batches",
    "data.streaming",
    "data.stream_above_rows",
    "model.dropout",
)
"""Settings of other sections that do: by which rows there are, or by their order."""

TASK_TRAINING_KEYS = ("epochs", "max_steps")
"""Settings of each task that do."""

ROUNDING_KEYS = frozenset({"train.micro_batch_size"})
"""Settings of those sections that only change the order of sums."""

UNKNOWN = "?"
"""Stands for a setting that a run did not record."""

_LONGEST = 32
"""Characters of a value in a label."""

Settings = dict[str, str]
"""Dotted path -> value as text."""


def scoring_settings(config: Mapping[str, Any], *, prompts: bool) -> Settings:
    """What a run's scores mean.

    Args:
        config: Its resolved recipe; empty if it has none.
        prompts: With the settings of rows and prompts.
    """
    filled = _with_defaults(config)
    found = {key: _text(_value(filled, key)) for key in SCORING_KEYS}
    if prompts:
        found |= {key: _text(_value(filled, key)) for key in PROMPT_KEYS}
        split = _value(filled, "data.eval_split")
        for task in _tasks(filled):
            path = f"tasks.{task.get('name')}"
            found |= {f"{path}.{key}": _text(task.get(key)) for key in TASK_PROMPT_KEYS}
            found |= _rows_of(task, split)
    return found


def training_settings(config: Mapping[str, Any], *, rows: bool) -> Settings:
    """What a run learned with: two runs that differ here are no repetition of each other.

    How it was computed (engine, precision, micro-batches), logged and saved is left out.

    Args:
        config: Its resolved recipe; empty if it has none.
        rows: With the settings that choose the rows of a task's training split.
    """
    filled = _with_defaults(config)
    found: Settings = {}
    for section in TRAINING_SECTIONS:
        found |= _leaves(section, filled.get(section))
    found |= {key: _text(_value(filled, key)) for key in TRAINING_KEYS}
    for key in TASK_TRAINING_KEYS:
        values = [_text(task.get(key)) for task in _tasks(filled)]
        found[f"tasks.{key}"] = values[0] if len(set(values)) == 1 else "/".join(values)
    for task in _tasks(filled) if rows else ():
        found |= _rows_of(task, "train")
    return {key: value for key, value in found.items() if key not in ROUNDING_KEYS}


def branch_settings(config: Mapping[str, Any]) -> Settings:
    """Of `training_settings` those that a branch may change for what follows its shared stages."""
    settings = training_settings(config, rows=False)
    return {key: value for key, value in settings.items() if key.startswith(("method.", "train."))}


def otherwise(shared: Settings, own: Settings) -> str | None:
    """What stages that a branch shares were learned with instead of its own settings; None: as it.

    Args:
        shared: `branch_settings` of the shared stages.
        own: The same of the branch. Of another method's own settings a check sum is said.
    """
    changed = {key: value for key, value in shared.items() if own.get(key) != value}
    said = []
    if (kind := changed.pop("method.kind", None)) is not None:
        given = {key: value for key, value in shared.items() if key.startswith("method.")}
        mark = f"#{_mark(json.dumps(given, sort_keys=True))}" if len(given) > 1 else ""
        said.append(kind + mark)
        changed = {key: value for key, value in changed.items() if key.startswith("train.")}
    said += [f"{key.partition('.')[2]}={value}" for key, value in sorted(changed.items())]
    return " ".join(said) or None


def telling(settings: Sequence[Settings]) -> list[Settings]:
    """Of each, what it does not share with all others, under the shortest name that is clear."""
    found = {path for one in settings for path in one}
    paths = sorted(found, key=lambda path: (not path.startswith("method."), path))
    values = {path: [one.get(path, UNKNOWN) for one in settings] for path in paths}
    differing = [path for path in paths if len(set(values[path])) > 1]
    names = _short_names(paths)
    return [{names[path]: _short(one.get(path, UNKNOWN)) for path in differing} for one in settings]


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what it does not say: an older accrete did not have every setting.

    A method's own settings are left as they are: their class may be gone, and importing it is slow.
    """
    from accrete.pipeline.config.run import EvalConfig, TrainConfig
    from accrete.pipeline.data.config import DataConfig, TaskConfig
    from accrete.pipeline.models.config import AdapterConfig, ModelConfig

    if not config:
        return {}
    defaults: dict[str, Any] = {
        "data": DataConfig(),
        "eval": EvalConfig(),
        "train": TrainConfig(),
        "adapter": AdapterConfig(),
        "model": ModelConfig(),
    }
    filled = dict(config)
    for section, default in defaults.items():
        own = config.get(section)
        filled[section] = asdict(default) | (dict(own) if isinstance(own, Mapping) else {})
    filled["tasks"] = [asdict(TaskConfig(name="")) | task for task in _tasks(config)]
    return filled


def _tasks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    tasks = config.get("tasks")
    found = tasks if isinstance(tasks, list) else []
    return [dict(task) if isinstance(task, Mapping) else {"name": str(task)} for task in found]


def _rows_of(task: Mapping[str, Any], split: str) -> Settings:
    """Settings of a task that choose the rows of one split."""
    paths = (f"splits.{split}", f"per_label.{split}")
    return {f"tasks.{task.get('name')}.{path}": _text(_value(task, path)) for path in paths}


def _value(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _leaves(path: str, value: Any) -> Settings:
    if not isinstance(value, Mapping):
        return {path: _text(value)}
    found: Settings = {}
    for key, inner in value.items():
        found |= _leaves(f"{path}.{key}", inner)
    return found


def _text(value: Any) -> str:
    """Equal for 1 and 1.0: a recipe may spell a number either way."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.12g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(item) for item in value)}]"
    return json.dumps(value, sort_keys=True, default=str)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of a path where no other path ends in it; else the path."""
    last = [path.rpartition(".")[2] for path in paths]
    return {
        path: name if last.count(name) == 1 else path
        for path, name in zip(paths, last, strict=True)
    }


def _short(value: str) -> str:
    """A long value by its beginning and a check sum, so that different ones stay different."""
    if len(value) <= _LONGEST:
        return value
    return f"{value[: _LONGEST - 6]}… {_mark(value)}"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:4]
