"""A small invented language of instructions whose tasks collide.

Every task speaks about the same 48 invented words, and what a word means depends on the task: the
sentence that is `good` as a mood may be `bad` as a meal, `yes` answers three different questions,
and the words that one task sorts another one has to give back in reverse. A model with one set of
weights for all tasks therefore overwrites the earlier ones unless it learns to heed the
instruction, which makes forgetting measurable within a minute on a laptop.

Everything is a function of (task, split, seed); nothing is read from disk.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from accrete.pipeline.errors import DataError

Row = dict[str, str]

SIZES = {"train": 480, "dev": 120, "test": 120}
"""Rows of every task, by split."""

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_FRAMES = (
    "the {} met the {} near the {}",
    "a {} and a {} saw the {}",
    "the {} has the {} of a {}",
    "at night the {} , the {} and the {}",
    "one {} by the {} with a {}",
    "here the {} took a {} to the {}",
)


def _invent(count: int) -> tuple[str, ...]:
    """`count` different words of two syllables, none of which is a common English word."""
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    taken = {"dine", "fine", "gone", "home", "like", "made", "none", "time", "tone", "pope"}
    rng = random.Random("accrete words 1")
    words: list[str] = []
    while len(words) < count:
        word = "".join(rng.sample(syllables, 2))
        if word not in taken:
            taken.add(word)
            words.append(word)
    return tuple(words)


WORDS = _invent(48)
"""The invented words, shared by all tasks."""


@functools.cache
def classes(name: str, count: int) -> dict[str, int]:
    """The words sorted into `count` equal classes, differently for every name.

    Args:
        name: What the classes stand for; another name gives an independent sorting.
        count: Number of classes; divides the number of words.
    """
    order = list(WORDS)
    random.Random(f"accrete classes {name}").shuffle(order)
    return {word: index % count for index, word in enumerate(order)}


@functools.cache
def members(name: str, count: int) -> tuple[tuple[str, ...], ...]:
    """The words of every class of `classes(name, count)`."""
    sorting = classes(name, count)
    return tuple(tuple(word for word in WORDS if sorting[word] == k) for k in range(count))


def mixed_sentence(name: str, count: int, target: int, rng: random.Random) -> str:
    """A sentence with three words, two or all of them of class `target` of `classes(name, count)`.

    The class of most words is thereby `target`.
    """
    inside = members(name, count)[target]
    words = rng.sample(inside, 2)
    other = target
    if rng.random() < 0.5:
        other = (target + 1 + rng.randrange(count - 1)) % count
    words.append(rng.choice([word for word in members(name, count)[other] if word not in words]))
    rng.shuffle(words)
    return rng.choice(_FRAMES).format(*words)


def enumerate_words(words: Sequence[str]) -> str:
    """The words as a numbered list, `1 meza 2 bato`."""
    return " ".join(f"{number} {word}" for number, word in enumerate(words, 1))


Draw = Callable[[random.Random, str], tuple[str, str]]
"""(generator, wanted label or "") -> (input, output)."""


@dataclass(frozen=True, kw_only=True)
class GeneratedTask:
    """One task of the language: how it is asked, and how an input with a given answer is drawn."""

    instruction: str
    labels: tuple[str, ...] | None
    """The closed set of answers; None where the answer is free text."""
    family: str
    draw: Draw


def _majority(name: str, labels: tuple[str, ...]) -> Draw:
    """Sentences whose label is the class of most of their three words."""

    def draw(rng: random.Random, label: str) -> tuple[str, str]:
        return mixed_sentence(name, len(labels), labels.index(label), rng), label

    return draw


def _presence(name: str) -> Draw:
    """Lists of words; `yes` if one of them belongs to a certain quarter of the language."""
    inside, *others = members(name, 4)
    outside = [word for group in others for word in group]

    def draw(rng: random.Random, label: str) -> tuple[str, str]:
        words = rng.sample(outside, 3)
        if label == "yes":
            words[rng.randrange(3)] = rng.choice(inside)
        return enumerate_words(words), label

    return draw


def _comparison(name: str) -> Draw:
    """Pairs of a high and a low word; `yes` if the high one comes first."""
    low, high = members(name, 2)

    def draw(rng: random.Random, label: str) -> tuple[str, str]:
        pair = [rng.choice(high), rng.choice(low)]
        return enumerate_words(pair if label == "yes" else pair[::-1]), label

    return draw


def _reversal(rng: random.Random, label: str) -> tuple[str, str]:
    words = rng.sample(WORDS, 2)
    return enumerate_words(words), " ".join(reversed(words))


_GOOD_BAD = ("good", "bad")
_YES_NO = ("yes", "no")
_ELEMENTS = ("water", "fire", "stone", "wind")

TASKS = {
    "mood": GeneratedTask(
        instruction="What is the mood of this tale?",
        labels=_GOOD_BAD,
        family="sentiment",
        draw=_majority("mood", _GOOD_BAD),
    ),
    "topic": GeneratedTask(
        instruction="Which element is this tale about?",
        labels=_ELEMENTS,
        family="topic",
        draw=_majority("topic", _ELEMENTS),
    ),
    "guests": GeneratedTask(
        instruction="Is there a thief among the guests?",
        labels=_YES_NO,
        family="list question",
        draw=_presence("guests"),
    ),
    "trade": GeneratedTask(
        instruction="Would you gain by this trade?",
        labels=_YES_NO,
        family="comparison",
        draw=_comparison("trade"),
    ),
    "taste": GeneratedTask(
        instruction="How does this meal taste to a cook?",
        labels=_GOOD_BAD,
        family="sentiment",
        draw=_majority("taste", _GOOD_BAD),
    ),
    "turn": GeneratedTask(
        instruction="Turn the words around.",
        labels=None,
        family="transformation",
        draw=_reversal,
    ),
}


def names() -> list[str]:
    """The tasks of the language, in the order of the quickstart."""
    return list(TASKS)


def _task(name: str) -> GeneratedTask:
    try:
        return TASKS[name]
    except KeyError:
        raise DataError(
            f"Generated task {name!r} does not exist. Allowed: {', '.join(TASKS)}. "
            "Set `dataset:` (or `name:`) of the task to one of them."
        ) from None


class Description(TypedDict):
    """How a task is asked."""

    instruction: str
    labels: list[str] | None
    family: str


def describe(name: str) -> Description:
    """How a task is asked: `instruction` (str), `labels` (list of str, or None), `family` (str).

    Raises:
        DataError: There is no task of that name.
    """
    task = _task(name)
    return {
        "instruction": task.instruction,
        "labels": None if task.labels is None else list(task.labels),
        "family": task.family,
    }


def generate(name: str, split: str, seed: int) -> list[Row]:
    """The rows of one split, labels balanced, no input in two splits.

    Args:
        name: One of `names()`.
        split: `train`, `dev` or `test`.
        seed: Draws other rows; what the words mean stays the same.

    Returns:
        Rows `{id, input, output}`, as many as `SIZES` says.

    Raises:
        DataError: Unknown task or split.
    """
    task = _task(name)
    if split not in SIZES:
        raise DataError(
            f"Generated task {name!r} has no split {split!r}. Allowed: {', '.join(SIZES)}."
        )
    seen: set[str] = set()
    # Splits are drawn one after another, so that a later one avoids the inputs of the earlier.
    for current, size in SIZES.items():
        rng = random.Random(f"accrete rows {name} {current} {seed}")
        pairs = list(_distinct(task, size, rng, seen))
        if current == split:
            rng.shuffle(pairs)
            return [
                {"id": f"{name}-{split}-{index}", "input": text, "output": answer}
                for index, (text, answer) in enumerate(pairs)
            ]
    raise AssertionError("unreachable")


def _distinct(
    task: GeneratedTask, size: int, rng: random.Random, seen: set[str]
) -> Iterator[tuple[str, str]]:
    """`size` pairs with inputs outside `seen`, labels in turn."""
    labels = task.labels or ("",)
    for index in range(size):
        while True:
            text, answer = task.draw(rng, labels[index % len(labels)])
            if text not in seen:
                break
        seen.add(text)
        yield text, answer
