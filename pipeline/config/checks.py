"""Mistakes that no single value shows: what must fit together in a recipe."""

from __future__ import annotations

import re
from typing import Any

from accrete.pipeline.config.problems import Problem, ProblemList, RecipeError, show_value
from accrete.pipeline.config.run import RunConfig
from accrete.pipeline.config.tree import Node
from accrete.pipeline.data.config import WHOLE_ANSWER
from accrete.pipeline.errors import ConfigError
from accrete.pipeline.methods.base import Method
from accrete.pipeline.methods.registry import method_class

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_NO_ROOT = ("files", "hub", "generated")


def check_together(tree: Node, problems: ProblemList) -> None:
    """Note every conflict between values.

    It works on the tree: so it also runs when some value has the wrong type, and names both lines.
    """
    for check in (_check_model, _check_tasks, _check_engine, _check_scoring, _check_method):
        check(tree, problems)


def require_data_root(config: RunConfig) -> None:
    """Refuse a recipe whose rows have no folder yet; called before anything reads rows.

    Raises:
        RecipeError: `data.root` is null and at least one task needs it.
    """
    if config.data.root is not None or config.data.format in _NO_ROOT:
        return
    missing = [task.name for task in config.tasks if task.files is None]
    if not missing:
        return
    from accrete.pipeline.data.folders import LAYOUTS

    message = (
        f"missing; needed for the rows of {', '.join(missing)}.\n"
        f"Folders that are recognised (data.format: {config.data.format}):\n{LAYOUTS}"
    )
    problem = Problem(config.name, "data.root", message, "add data.root=FOLDER to the command")
    raise RecipeError(config.name, [problem])


def _value(tree: Node, *path: str) -> Any:
    node = tree.get(*path)
    return None if node is None else node.plain()


def _where(tree: Node, *path: str) -> str:
    """The place of the deepest part of `path` that is written down."""
    for depth in range(len(path), 0, -1):
        node = tree.get(*path[:depth])
        if node is not None:
            return node.origin.where
    return tree.origin.where


def _check_model(tree: Node, problems: ProblemList) -> None:
    model = tree.get("model")
    if model is None or not isinstance(model.value, dict):
        return
    path, builder = _value(model, "path"), _value(model, "builder")
    if path is None and builder is None:
        problems.add(
            model.origin.where,
            "model",
            "neither `path` nor `builder` is given; exactly one of them is needed",
            "choose a shipped one with `model: NAME`, or give `model.path`",
        )
    if path is not None and builder is not None:
        problems.add(
            _where(model, "path"),
            "model.path",
            f"`path` and `builder` ({_where(model, 'builder')}) are both given; "
            "exactly one of them is allowed",
            "set the other one to null, or swap the whole model with `model=NAME`",
        )
    for key in ("gguf_file", "revision"):
        if path is None and builder is not None and _value(model, key) is not None:
            reason = "given without `model.path`; a built model takes nothing from there"
            problems.add(_where(model, key), f"model.{key}", reason)
    if _value(model, "builder_data") is not None and builder != "small_t5":
        reason = "given without `model.builder: small_t5`, which alone reads it"
        problems.add(_where(model, "builder_data"), "model.builder_data", reason)


def _check_tasks(tree: Node, problems: ProblemList) -> None:
    tasks = tree.get("tasks")
    seen: dict[str, str] = {}
    for index, task in enumerate(tasks.items if tasks is not None else []):
        node = task.get("name")
        if node is None or not isinstance(node.value, str):
            continue
        where, path = node.origin.where, f"tasks.{index}.name"
        if _SAFE.fullmatch(node.value) is None or node.value.endswith("."):
            problems.add(
                where,
                path,
                f"given: {show_value(node.value)}; allowed: up to 100 letters, digits and `_ . -`, "
                "because files are named after it",
                "put the real name into the task's `dataset:`",
            )
        folded = node.value.casefold()
        if folded in seen:
            problems.add(
                where,
                path,
                f"the task `{node.value}` stands there twice (first: {seen[folded]}); "
                "names must be unique, also without regard to case",
                f"give this one another name and `dataset: {node.value}`",
            )
        seen.setdefault(folded, where)


def _check_engine(tree: Node, problems: ProblemList) -> None:
    procs = _value(tree, "engine", "procs")
    if _value(tree, "engine", "kind") == "plain" and isinstance(procs, int) and procs > 1:
        problems.add(
            _where(tree, "engine", "procs"),
            "engine.procs",
            f"given: {procs}; allowed with `engine.kind: plain`: 1, or null",
            "take `engine.kind: deepspeed` for several processes",
        )


def _check_scoring(tree: Node, problems: ProblemList) -> None:
    if _value(tree, "eval", "mode") != "forward":
        return
    tasks = tree.get("tasks")
    for index, task in enumerate(tasks.items if tasks is not None else []):
        metric = _value(task, "metric")
        if metric is not None and metric not in WHOLE_ANSWER:
            problems.add(
                _where(task, "metric"),
                f"tasks.{index}.metric",
                f"{metric} needs generated text, but "
                f"{_where(tree, 'eval', 'mode')} says `eval.mode: forward`",
                "set eval.mode to auto or generate",
            )


def _check_method(tree: Node, problems: ProblemList) -> None:
    kind = _value(tree, "method", "kind")
    if not isinstance(kind, str):
        return
    try:
        method = method_class(kind)
    except ConfigError:
        return  # noted where the method's settings are read
    _check_lines(tree, problems, kind, method)
    tasks = _value(tree, "tasks")
    for name in method.Config.per_task:
        given = _value(tree, "method", name)
        if isinstance(given, list) and isinstance(tasks, list) and len(given) != len(tasks):
            problems.add(
                _where(tree, "method", name),
                f"method.{name}",
                f"{len(given)} values were given for a sequence of {len(tasks)} tasks",
                "give a single value, or one for each task (the first task's too)",
            )


def _check_lines(tree: Node, problems: ProblemList, kind: str, method: type[Method]) -> None:
    given = _value(tree, "adapter", "lines")
    if given is not None and not (method.fresh_adapter or method.restarts):
        problems.add(
            _where(tree, "adapter", "lines"),
            "adapter.lines",
            f"given: {show_value(given)}; allowed with `method.kind: {kind}`: null, because it "
            "scales one task's update and this method trains the same weights through all tasks",
            "choose a method with an adapter per task, such as inc_lora",
        )
