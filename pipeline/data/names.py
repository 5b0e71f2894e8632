"""Finding a task by name among folders that spell it their own way."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

ALIASES = {"boolqa": "boolq", "sst": "sst2", "longsequence": "long"}
"""Spellings of one data set or collection in the benchmarks of this field."""


def canonical(name: str) -> str:
    """The name without case and punctuation, synonyms joined: `SST-2` and `sst2` are one."""
    bare = "".join(c for c in name.lower() if c.isalnum())
    return ALIASES.get(bare, bare)


def matching(name: str, candidates: Sequence[str]) -> list[str]:
    """Candidates that `name` may mean, by the strictest rule that any of them meets.

    The rules: the same text; the same without case and punctuation; one is the other up to an
    underscore (`task002` for `task002_quoref_answer_generation`, `yelp` for `yelp_T5`).
    """
    same = [c for c in candidates if c == name]
    alike = [c for c in candidates if canonical(c) == canonical(name)]
    low = name.lower()
    begins = [
        c
        for c in candidates
        if c.lower().startswith(low + "_")
        or low.startswith(c.lower() + "_")
        or canonical(c.split("_")[0]) == canonical(name)
    ]
    return same or alike or begins


def nearest(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `name`, if any is close."""
    spelled = {canonical(c): c for c in candidates}
    hits = difflib.get_close_matches(canonical(name), list(spelled), n=1, cutoff=0.6)
    return spelled[hits[0]] if hits else None


def listing(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, at most so many."""
    shown = ", ".join(sorted(set(names))[:most])
    left = len(set(names)) - most
    return (shown + (f" and {left} more" if left > 0 else "")) or "nothing"
