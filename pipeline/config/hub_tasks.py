"""The recipe key `hub`: where the tasks of a benchmark lie on the Hugging Face hub.

A benchmark knows its tasks by name. With `data.format: hub` each task takes the fields that stand
under its name in `hub`, below its own; otherwise `hub` counts for nothing. Either way it is used up
here, so that a resolved recipe has every task in full. An entry need not say where the rows lie
(`dataset` or `files`): then the task must.
"""

from __future__ import annotations

from accrete.pipeline.config.problems import ProblemList, show_value
from accrete.pipeline.config.tree import Node, merge

_PLACES = {"dataset", "files"}
"""Fields that say where a task's rows lie."""


def take_hub_tasks(tree: Node, problems: ProblemList) -> None:
    """Remove `hub` from the tree, and fill in the tasks if rows come from the hub, in place."""
    hub = tree.mapping.pop("hub", None)
    chosen = tree.get("data", "format")
    if hub is not None and not isinstance(hub.value, dict):
        problems.add(
            hub.origin.where,
            "hub",
            f"given: {show_value(hub.plain())}; allowed: a mapping of task names to their fields",
        )
        return
    if chosen is None or chosen.value != "hub":
        return
    entries = {} if hub is None else hub.mapping
    known = sorted(name for name, entry in entries.items() if _PLACES & set(entry.mapping))
    tasks = tree.get("tasks")
    for index, task in enumerate(tasks.items if tasks is not None else []):
        name = task.get("name")
        entry = None if name is None else entries.get(str(name.value))
        if entry is not None:
            task.value = merge(entry, task).value
        if not _PLACES & set(task.mapping):
            problems.add(
                task.origin.where,
                f"tasks.{index}",
                f"no hub data set is known for `{'' if name is None else name.value}`; known: "
                f"{', '.join(known) or 'none'}",
                "give the task a `dataset` (a hub id) with its `columns`, or its own `files`",
            )
