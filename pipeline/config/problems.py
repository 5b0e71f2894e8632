"""Mistakes in a recipe, collected so that the user sees all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from accrete.pipeline.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One mistake."""

    where: str
    """`recipes/x.yaml:14` or `override a.b=v`."""
    path: str
    """Dotted path in the recipe, such as `train.learning_rate`; empty for a whole file."""
    message: str
    """What was given and what is allowed."""
    hint: str = ""
    """What to do."""

    @property
    def is_override(self) -> bool:
        """Whether it was written on the command line."""
        return self.where.startswith("override ")

    def __str__(self) -> str:
        head = f"{self.where}: {self.path}" if self.path else self.where
        lines = [head, *(f"    {line}" for line in self.message.splitlines())]
        if self.hint:
            lines.append(f"    -> {self.hint}")
        return "\n".join(lines)


class RecipeError(ConfigError):
    """A recipe or an override is wrong; `problems` holds every mistake, in reading order."""

    def __init__(self, name: str, problems: Iterable[Problem], kind: str = "recipe") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        title = f"{kind} {name}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([title, *(f"  {_indent(str(p))}" for p in self.problems)]))


class ProblemList:
    """Collects problems; the same one twice counts once."""

    def __init__(self) -> None:
        self._items: dict[Problem, None] = {}

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, where: str, path: str, message: str, hint: str = "") -> None:
        """Note one mistake."""
        self._items[Problem(where, path, message, hint)] = None

    def covers(self, path: str) -> bool:
        """Whether something at or below `path` is known to be wrong, or a file is unread."""
        return self.covers_inside(path) or any(
            item.path in (path, "extends") or not (item.path or item.is_override)
            for item in self._items
        )

    def covers_inside(self, path: str) -> bool:
        """Whether something below `path` is already known to be wrong."""
        return any(item.path.startswith(f"{path}.") for item in self._items)

    def raise_if_any(self, name: str, kind: str = "recipe") -> None:
        """End here if there is anything to tell.

        Args:
            name: Of the file that is wrong, for the title.
            kind: What it is.

        Raises:
            RecipeError: With everything noted so far, files by line and then overrides.
        """
        if self._items:
            raise RecipeError(name, sorted(self._items, key=_reading_order), kind)


def _reading_order(problem: Problem) -> tuple[bool, str, int]:
    if problem.is_override:
        return True, "", 0  # as given on the command line
    file, _, line = problem.where.rpartition(":")
    return (False, file, int(line)) if line.isdecimal() else (False, problem.where, 0)


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The names in `known` that look most like `word`, or that it abbreviates (`lr`)."""
    names = list(known)
    short = [name for name in names if "".join(part[:1] for part in name.split("_")) == word]
    return short[:count] or get_close_matches(word, names, n=count, cutoff=0.55)


def did_you_mean(names: list[str]) -> str:
    """A question that offers `names`, or nothing."""
    return f"did you mean {' or '.join(f'`{name}`' for name in names)}?" if names else ""


def show_value(value: Any, limit: int = 60) -> str:
    """`value` as YAML would take it, with its type where that is the likely mistake."""
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if isinstance(value, bool):
        return text
    kinds = {str: "a text", int: "an integer", float: "a number", dict: "a mapping", list: "a list"}
    return f"{text} ({kinds[type(value)]})"


def _indent(text: str) -> str:
    return text.replace("\n", "\n  ")
