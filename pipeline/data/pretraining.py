"""Pre-training examples for the models that accrete makes for its own language.

They teach the manners of the language of `generated.py`: its words, to heed the instruction, to
answer with one of the options, to look at places and to copy. They hold none of the sequence's
instructions and none of its meanings: codes such as `dalox` sort the words in ways of their own,
so a model learns that meaning hangs on the instruction and nothing about any task to come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from accrete.pipeline.data.generated import (
    WORDS,
    enumerate_words,
    members,
    mixed_sentence,
)

CODES = ("dalox", "ketax", "muraq", "sibex", "vopeq", "zanoq", "dalaq", "murex")
"""Names of the ways of sorting that pre-training uses."""

LABELS = (
    *("good", "bad", "yes", "no", "water", "fire", "stone", "wind"),
    *("red", "blue", "true", "false", "left", "right", "old", "new"),
)
"""Answer words: those of the tasks, under other meanings, and some more."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example, to be put into a prompt template."""

    instruction: str
    labels: tuple[str, ...] | None
    input: str
    output: str


def _labels(code: str, count: int) -> tuple[str, ...]:
    return tuple(random.Random(f"accrete labels {code}").sample(LABELS, count))


def _sort(rng: random.Random) -> Example:
    """The class of most words of a sentence, under a code."""
    index = rng.randrange(len(CODES))
    code, count = CODES[index], (2, 2, 4)[index % 3]
    labels = _labels(code, count)
    target = rng.randrange(count)
    question = rng.choice(("Sort by {}.", "Which {} is it about?", "Say what {} this tale has."))
    return Example(
        instruction=question.format(code),
        labels=labels,
        input=mixed_sentence(f"code {code}", count, target, rng),
        output=labels[target],
    )


def _find(rng: random.Random) -> Example:
    """Whether a list holds a word of a certain quarter of the language, under a code."""
    code = rng.choice(CODES)
    inside, *others = members(f"find {code}", 4)
    labels = _labels(f"find {code}", 2)
    there = rng.randrange(2)
    words = rng.sample([word for group in others for word in group], 3)
    if there:
        words[rng.randrange(3)] = rng.choice(inside)
    return Example(
        instruction=f"Look for a {code} in it.",
        labels=labels,
        input=enumerate_words(words),
        output=labels[there],
    )


def _compare(rng: random.Random) -> Example:
    """Which class the first of two words has, under a code; the second has the other."""
    code = rng.choice(CODES)
    sorting = members(f"pair {code}", 2)
    labels = _labels(f"pair {code}", 2)
    first = rng.randrange(2)
    pair = [rng.choice(sorting[first]), rng.choice(sorting[1 - first])]
    return Example(
        instruction=f"Compare both by {code}.",
        labels=labels,
        input=enumerate_words(pair),
        output=labels[first],
    )


def _copy(rng: random.Random) -> Example:
    """Words given back: all of them, or the one at a place."""
    words = rng.sample(WORDS, rng.choice((2, 3)))
    place = rng.choice(("first", "second", "last", None))
    if place is None:
        instruction, output = "Say the words again.", " ".join(words)
    else:
        instruction = f"Say the {place} word."
        output = words[{"first": 0, "second": 1, "last": -1}[place]]
    return Example(
        instruction=instruction, labels=None, input=enumerate_words(words), output=output
    )


_KINDS: tuple[tuple[Callable[[random.Random], Example], int], ...] = (
    (_sort, 5),
    (_find, 2),
    (_compare, 3),
    (_copy, 4),
)
"""What is drawn, and how often."""


def pretraining_examples(seed: int) -> Iterator[Example]:
    """An endless stream of examples; the same for the same seed."""
    rng = random.Random(f"accrete pre-training {seed}")
    kinds = [kind for kind, weight in _KINDS for _ in range(weight)]
    while True:
        yield rng.choice(kinds)(rng)
