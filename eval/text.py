"""Scores of one answer text against its references.

Exact match and ROUGE-L follow what O-LoRA, SAPT and Super-NaturalInstructions publish, the others
what TRACE does; deviations are named below. SARI, the one that reads the prompt too, has a file of
its own.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ASCII_WORD = re.compile(r"[A-Za-z0-9]")
_ANY_WORD = re.compile(r"\w+")
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def normalize_answer(text: str) -> str:
    """`text` in lower case, without ASCII punctuation, its white space collapsed.

    Source: the SQuAD answer normalisation as O-LoRA and SAPT use it (articles are kept).
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` equals one of `references` after normalisation.

    Deviation: a reference that is all punctuation (`+`, `:)`) normalises to nothing and would equal
    every other such text, so it is compared as it stands, without the space around it.
    """
    given = normalize_answer(prediction)
    for reference in references:
        wanted = normalize_answer(reference)
        if (given == wanted) if wanted else (prediction.strip() == reference.strip()):
            return True
    return False


def raw_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` is one of `references` as it stands, case and punctuation included.

    Source: the accuracy of TRACE (C-STANCE, FOMC, NumGLUE). Deviation: white space around the two
    texts does not count, because tokenizers add and drop it.
    """
    given = prediction.strip()
    return bool(given) and any(given == reference.strip() for reference in references)


def first_letter(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` begins with the same character as one of `references`.

    Source: the accuracy of TRACE on ScienceQA, where a choice is followed by its reasons. Case
    counts. Deviation: white space before the character does not.
    """
    given = prediction.strip()[:1]
    return bool(given) and any(given == reference.strip()[:1] for reference in references)


def edit_similarity(prediction: str, references: Sequence[str]) -> float:
    """1 - (insertions + deletions) / (both lengths), 0 to 1: the best over `references`.

    Placeholders of code (`<STR_LIT:x>`, `<NUM_LIT>`) are replaced by what they stand for first. A
    blank prediction scores 0.

    Raises:
        ValueError: No references.

    Source: TRACE on Py150, `fuzz.ratio` after its post-processing; by the library `rapidfuzz`.
    Deviation: the ratio of a row is not rounded to a whole percent.
    """
    from rapidfuzz import fuzz

    if not references:
        raise ValueError("edit_similarity needs at least one reference")
    if not prediction.strip():
        return 0.0
    given = spell_literals(prediction.strip())
    wanted = [spell_literals(reference.strip()) for reference in references]
    return max(float(fuzz.ratio(given, reference)) for reference in wanted) / 100


def spell_literals(code: str) -> str:
    """Py150's code with its placeholders spelled out: `<NUM_LIT:2>` is 2, `<NUM_LIT>` is 0."""

    def spell(found: re.Match[str]) -> str:
        value = found.group(2)
        return value if value is not None else ("0" if found.group(1) == "NUM" else "")

    return _LITERAL.sub(spell, code)


def rouge_l(prediction: str, references: Sequence[str], *, stemmer: bool = True) -> float:
    """ROUGE-L F, 0 to 1: the best over `references`.

    Args:
        prediction: Decoded text.
        references: At least one accepted answer.
        stemmer: Porter stemming of words longer than 3 letters, as the published
            Super-NaturalInstructions, O-LoRA and SAPT numbers have it.

    Raises:
        ValueError: No references.

    Source: Lin 2004, by the library `rouge_score`. Deviation: the library sees ASCII letters and
    digits only, so a reference with none of them (another script, an emoticon) would always score
    0; such a reference is scored on Unicode words instead, or on characters if it has no word.
    """
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    return max(_rouge_l(prediction, reference, stemmer) for reference in references)


def _rouge_l(prediction: str, reference: str, stemmer: bool) -> float:
    scorer = _scorer(stemmer) if _ASCII_WORD.search(reference) else _scorer(None)
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


class _UnicodeWords:
    """Tokenizer for references without an ASCII letter or digit."""

    def tokenize(self, text: str) -> list[str]:
        return _ANY_WORD.findall(text.lower()) or [c for c in text if not c.isspace()]


@lru_cache(maxsize=3)
def _scorer(stemmer: bool | None) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    if stemmer is None:
        return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())
    return RougeScorer(["rougeL"], use_stemmer=stemmer)
