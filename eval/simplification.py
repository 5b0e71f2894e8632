"""SARI: what a simplification keeps, deletes and adds, against what its references do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

LONGEST = 4
"""n-grams of 1 to so many words count."""

Grams = Counter[tuple[str, ...]]


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one text, 0 to 1.

    Args:
        source: The text that was to be simplified; TRACE gives the whole prompt.
        prediction: Decoded text.
        references: At least one simplification.

    Raises:
        ValueError: No references.

    Source: Xu et al. 2016, section 4, with the two changes of the implementation that TRACE calls
    (the metric `sari` of Hugging Face, after tensor2tensor): where there is nothing to keep, delete
    or add, precision and recall are 1, and the recall of keeping divides by the n-grams to be kept.
    Words are those of the tokenizer 13a, in lower case, by the library `sacrebleu`.
    """
    if not references:
        raise ValueError("sari needs at least one reference")
    given, said = _words(source), _words(prediction)
    wanted = [_words(reference) for reference in references]
    total = 0.0
    for n in range(1, LONGEST + 1):
        before, after = _grams(given, n), _grams(said, n)
        goal: Grams = sum((_grams(words, n) for words in wanted), Counter())
        count = len(wanted)
        total += _keep(before, after, goal, count) + _delete(before, after, goal, count)
        total += _add(before, after, goal)
    return total / (3 * LONGEST)


def _keep(before: Grams, after: Grams, goal: Grams, count: int) -> float:
    """F1 of the n-grams that were kept; every reference counts once."""
    kept = _times(before, count) & _times(after, count)
    wanted = _times(before, count) & goal
    right = kept & goal
    precision = sum(right[g] / kept[g] for g in right) / len(kept) if kept else 1.0
    recall = right.total() / wanted.total() if wanted else 1.0
    return _f1(precision, recall)


def _delete(before: Grams, after: Grams, goal: Grams, count: int) -> float:
    """Precision of the n-grams that were deleted."""
    gone = _times(before, count) - _times(after, count)
    right = gone - goal
    return sum(right[g] / gone[g] for g in right) / len(gone) if gone else 1.0


def _add(before: Grams, after: Grams, goal: Grams) -> float:
    """F1 of the n-grams that are new, each counted once."""
    new, wanted = set(after) - set(before), set(goal) - set(before)
    right = len(new & wanted)
    return _f1(right / len(new) if new else 1.0, right / len(wanted) if wanted else 1.0)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _times(grams: Grams, count: int) -> Grams:
    return Counter({gram: number * count for gram, number in grams.items()})


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _words(text: str) -> list[str]:
    """A blank text is one empty word, as it is for TRACE: a word that was added."""
    return str(_tokenizer()(text.lower())).split(" ")


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()
