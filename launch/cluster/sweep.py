"""Many runs from one command: seeds x recipes x methods, with common first tasks learned once.

Runs that share all settings and their first tasks (orders of a benchmark often do) share those
stages: one of them learns them, and the others branch off from it when it is finished, with exactly
the result that a run of their own would have.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accrete.launch.cluster.request import Branch, LaunchRequest, make_request, plain
from accrete.launch.cluster.settings import ClusterConfig
from accrete.pipeline.errors import ConfigError

RECIPE_AXIS = "recipe"
_IGNORED = ("name", "description", "tasks", "log", "checkpoint")
"""What two runs may differ in and still share stages; `tasks` are compared one by one."""


@dataclass(frozen=True)
class Axis:
    """One thing that is varied."""

    key: str
    """`recipe`, or what an override sets: `seed`, `method`, `train.learning_rate`."""
    values: tuple[str, ...]


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """`seed=0,1,2` and the like.

    Raises:
        ConfigError: One of them is not written so, or says the same twice.
    """
    axes: list[Axis] = []
    for text in texts:
        key, equals, rest = text.partition("=")
        values = tuple(value.strip() for value in _split(rest))
        if not equals or not key.strip() or not all(values) or not values:
            raise ConfigError(
                f"--sweep {text}: write KEY=VALUE,VALUE,... such as seed=0,1,2, "
                "method=ewc_lora,o_lora or recipe=standard_cl/order1,standard_cl/order2."
            )
        if len(set(values)) < len(values):
            raise ConfigError(f"--sweep {text}: a value stands there twice.")
        if key.strip() in [axis.key for axis in axes]:
            raise ConfigError(
                f"--sweep {text}: {key.strip()} is varied twice; put all values in one."
            )
        axes.append(Axis(key.strip(), values))
    return axes


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    return re.split(r",(?![^\[\]{}]*[\]}])", text) if text else []


def make_requests(
    recipe: str,
    overrides: Sequence[str],
    axes: Sequence[Axis],
    run_dir: Path,
    cluster: ClusterConfig,
) -> list[LaunchRequest]:
    """One request for each combination, in folders below `run_dir`; parents before branches.

    Raises:
        ConfigError: A combination is wrong, or two of them are the same run.
    """
    requests: list[LaunchRequest] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        point = dict(zip((axis.key for axis in axes), values, strict=True))
        name = point.pop(RECIPE_AXIS, recipe)
        own = [f"{key}={value}" for key, value in point.items()]
        folder = run_dir / point_name(axes, values)
        requests.append(make_request(name, (*overrides, *own), folder, cluster))
    names = [request.run_dir for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError("two combinations of the sweep would have the same folder name.")
    return share_stages(requests)


def point_name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """A folder name: `order1-ewc_lora-seed0`."""
    parts = []
    for axis, value in zip(axes, values, strict=True):
        word = Path(value).stem if axis.key == RECIPE_AXIS else value
        plain_words = axis.key in (RECIPE_AXIS, "method", "model")
        part = word if plain_words else axis.key.rpartition(".")[2] + word
        parts.append(re.sub(r"[^A-Za-z0-9_.+]+", "_", part).strip("_"))
    return "-".join(parts)


def share_stages(requests: Sequence[LaunchRequest]) -> list[LaunchRequest]:
    """Let every request branch off from the earlier one with which it shares most first tasks.

    Raises:
        ConfigError: Two requests are the same run.
    """
    resolved = [plain(request.recipe.resolved()) for request in requests]
    done: list[LaunchRequest] = []
    for index, request in enumerate(requests):
        best, shared = None, 0
        for earlier in range(index):
            count = shared_tasks(resolved[earlier], resolved[index])
            if count > shared:
                best, shared = earlier, count
        if best is not None and shared == len(resolved[index]["tasks"]):
            raise ConfigError(
                f"the sweep's {request.run_dir.name} is the same run as "
                f"{requests[best].run_dir.name}."
            )
        if best is not None:
            branch = Branch(parent=requests[best].run_dir, stage=shared - 1)
            request = replace(request, branch=branch)
        done.append(request)
    return done


def shared_tasks(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """How many first tasks two resolved recipes learn in the same way."""
    # A method may plan for the number of tasks, as InfLoRA does.
    if len(one["tasks"]) != len(other["tasks"]):
        return 0
    if any(one[key] != other[key] for key in one if key not in _IGNORED):
        return 0
    pairs = zip(one["tasks"], other["tasks"], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
