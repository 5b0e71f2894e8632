"""Each metric that a task can name: how a decoded answer is scored, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from accrete.eval.simplification import sari
from accrete.eval.text import edit_similarity, exact_match, first_letter, raw_match, rouge_l
from accrete.pipeline.data.config import WHOLE_ANSWER, Metric


@dataclass(frozen=True)
class Measure:
    """One metric."""

    score: Callable[[str, Sequence[str], str], float]
    """(prediction, references, source) -> 0 to 1."""
    all_or_nothing: bool = False
    """The score is 0 or 1, and a row that scores 1 counts as correct; elsewhere a row is correct if
    the normalised texts are equal."""
    reads_source: bool = False
    """The prompt's text is needed, too."""
    new_tokens: int | None = None
    """Decode at most so many tokens; None: as many as the longest answer may have."""


MEASURES: dict[Metric, Measure] = {
    "exact_match": Measure(lambda said, right, _: exact_match(said, right), all_or_nothing=True),
    "raw_match": Measure(lambda said, right, _: raw_match(said, right), all_or_nothing=True),
    # Four tokens hold the first character, whatever the tokenizer puts before it.
    "first_letter": Measure(
        lambda said, right, _: first_letter(said, right), all_or_nothing=True, new_tokens=4
    ),
    "rouge_l": Measure(lambda said, right, _: rouge_l(said, right)),
    "sari": Measure(lambda said, right, source: sari(source, said, right), reads_source=True),
    "edit_similarity": Measure(lambda said, right, _: edit_similarity(said, right)),
}


def by_forward(mode: str, metric: Metric) -> bool:
    """Whether `eval.mode` lets one forward pass decide a task's rows; else all are decoded."""
    return mode != "generate" and metric in WHOLE_ANSWER


def token_budget(metric: Metric, longest: int) -> int:
    """Most new tokens that are decoded for a row, where an answer may have `longest`."""
    return min(MEASURES[metric].new_tokens or longest, longest)
