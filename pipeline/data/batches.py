"""Batches for scoring, by a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence


def score_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows sorted by length and packed so that no batch exceeds a number of padded tokens.

    Args:
        lengths: Tokens of each row, prompt and answer.
        max_tokens: Budget of a batch: its rows times its longest row. A longer row stands alone.

    Returns:
        Row numbers of each batch; a function of the arguments alone.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Sorted: this row would be the longest of the batch.
        if batches and (len(batches[-1]) + 1) * int(lengths[row]) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def padding_ratio(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Padded tokens for each real one when every batch is padded to its longest row."""
    real = sum(int(lengths[i]) for batch in batches for i in batch)
    padded = sum(max(int(lengths[i]) for i in batch) * len(batch) for batch in batches if batch)
    return padded / real if real else 1.0
