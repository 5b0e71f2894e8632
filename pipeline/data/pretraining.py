"""Pre-training text for the models that accrete makes itself.

The text teaches the manners of the language of `generated.py`: its words, heeding an instruction,
answering with one of the options, copying, looking into a list, comparing. It holds none of the
sequence's instructions and none of its meanings: codes such as `sort by dalo` sort the words in
their own ways, so a model learns that meaning hangs on the instruction, and nothing about any
task to come.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accrete.pipeline.data.generated import WORDS, classes, ranks, sentence

_LABELS = (
    "good", "bad", "yes", "no", "water", "fire", "stone", "wind",
    "red", "blue", "true", "false", "left", "right", "old", "new",
)  # fmt: skip
_ORDINALS = ("first", "second", "third", "last")
_CODES = tuple(
    f"{c}{v}{e}"
    for c in ("dal", "ket", "mur", "sib", "vop", "zan")
    for v in "aeo"
    for e in ("x", "q")
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pre-training example, to be put into a prompt template."""

    instruction: str
    labels: tuple[str, ...] | None
    input: str
    output: str


def _labels(code: str, count: int) -> tuple[str, ...]:
    return tuple(random.Random(f"accrete labels {code}").sample(_LABELS, count))


def _sorting(rng: random.Random) -> Example:
    """A code that sorts words, asked of a whole sentence: the class of most of its words."""
    index = rng.randrange(len(_CODES))
    code, count = _CODES[index], (2, 2, 4)[index % 3]
    labels, sorting = _labels(code, count), classes(f"code {code}", count)
    target = rng.randrange(count)
    inside = [word for word in WORDS if sorting[word] == target]
    words = rng.sample(inside, 2 + (rng.random() < 0.5))
    if len(words) == 2:
        words.append(rng.choice([word for word in WORDS if sorting[word] != target]))
    rng.shuffle(words)
    instruction = rng.choice(("Sort the tale by {}.", "Which {} is it?", "Name its {}.")).format(
        code
    )
    return Example(
        instruction=instruction, labels=labels, input=sentence(words, rng), output=labels[target]
    )


def _ordering(rng: random.Random) -> Example:
    """A code that orders words, asked of a pair."""
    code = rng.choice(_CODES)
    labels, order = _labels(f"pair {code}", 2), ranks(f"code {code}")
    first, second = rng.sample(WORDS, 2)
    instruction = rng.choice(("Compare the two by {}.", "Judge the pair by {}.")).format(code)
    return Example(
        instruction=instruction,
        labels=labels,
        input=f"{first} {rng.choice(('for', 'and', 'to'))} {second}",
        output=labels[int(order[first] < order[second])],
    )


def _lookup(rng: random.Random) -> Example:
    """Whether a word stands in a list, in other words than the sequence's."""
    labels = rng.choice((("true", "false"), ("here", "gone"), ("old", "new")))
    question = {"true": "The word is listed.", "here": "Look for the word.", "old": "Is it known?"}
    listed = rng.sample(WORDS, 3)
    there = rng.random() < 0.5
    asked = rng.choice(listed if there else [word for word in WORDS if word not in listed])
    return Example(
        instruction=question[labels[0]],
        labels=labels,
        input=f"{asked} : {' '.join(listed)}",
        output=labels[0 if there else 1],
    )


def _copying(rng: random.Random) -> Example:
    """Words given back: all of them, or the one at a place."""
    words = rng.sample(WORDS, rng.choice((2, 3, 3)))
    kind = rng.choice(("all", "all", *_ORDINALS[: len(words)], "last", "rotate", "double"))
    instruction, output = {
        "all": ("Say the words again.", " ".join(words)),
        "rotate": ("Say the first word last.", " ".join([*words[1:], words[0]])),
        "double": ("Say the last word first.", " ".join([words[-1], *words[:-1]])),
        "last": ("Say the last word.", words[-1]),
    }.get(kind) or (f"Say the {kind} word.", words[_ORDINALS.index(kind)])
    return Example(instruction=instruction, labels=None, input=" ".join(words), output=output)


def _option(rng: random.Random) -> Example:
    """The option at a place: ties answers to the line of options."""
    labels = tuple(rng.sample(_LABELS, rng.choice((2, 2, 4))))
    place = rng.randrange(len(labels))
    return Example(
        instruction=f"Take the {('first', 'second', 'third', 'fourth')[place]} option.",
        labels=labels,
        input=sentence(rng.sample(WORDS, 3), rng),
        output=labels[place],
    )


_KINDS = ((_sorting, 8), (_ordering, 4), (_lookup, 3), (_copying, 4), (_option, 1))


def pretraining_examples(seed: int) -> Iterator[Example]:
    """An endless stream of pre-training examples; the same for the same seed."""
    rng = random.Random(f"accrete pre-training {seed}")
    kinds = [kind for kind, weight in _KINDS for _ in range(weight)]
    while True:
        yield rng.choice(kinds)(rng)
