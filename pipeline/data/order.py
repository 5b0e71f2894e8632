"""The order of rows: a function of seed, task and epoch, and of nothing else.

The position in it is one integer, the global step inside the task. Ranks take strided slices of the
same global batches, so the order does not depend on their number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def generator(*key: int) -> np.random.Generator:
    """A random generator named by integers; the last must not be 0 if others are as long.

    NumPy's seeding does not tell [1] from [1, 0].
    """
    return np.random.Generator(np.random.PCG64([k & 0xFFFF_FFFF_FFFF_FFFF for k in key]))


def arrange(shuffled: Ints, lengths: NDArray[Any], batch: int, window: int, *key: int) -> Ints:
    """Form batches of rows of like length, without giving up randomness.

    Windows of `window * batch` rows are sorted by (length, row), cut into batches, and the batches
    of a window are permuted. The rows of a last short batch are taken from the end of `shuffled`,
    so that no length is favoured, and stay last.

    Args:
        shuffled: [n] row numbers in random order.
        lengths: Length of each row, indexed by row number.
        batch: Rows of a global batch.
        window: Batches of a window; 1 leaves the order as it is.
        key: Names the permutation of batches.

    Returns:
        [n] row numbers; batch b is `result[b * batch : (b + 1) * batch]`.
    """
    if window <= 1:
        return shuffled
    result = shuffled.copy()
    whole = len(shuffled) // batch * batch
    for number, start in enumerate(range(0, whole, window * batch)):
        rows = shuffled[start : min(start + window * batch, whole)]
        rows = rows[np.lexsort((rows, lengths[rows]))].reshape(-1, batch)
        turn = generator(*key, number + 1).permutation(len(rows))
        result[start : start + rows.size] = rows[turn].reshape(-1)
    return result


def epoch_order(
    lengths: NDArray[Any], seed: int, task: int, epoch: int, batch: int, window: int
) -> Ints:
    """The order of one epoch over a data set of random access; a permutation of all rows."""
    shuffled = generator(seed, task, epoch).permutation(len(lengths))
    return arrange(shuffled, lengths, batch, window, seed, task, epoch, 1)


def block_batches(batch: int, window: int, shuffle_rows: int) -> int:
    """Batches of one shuffle block of a stream: whole windows, about `shuffle_rows` rows."""
    return window * max(1, -(-shuffle_rows // (window * batch)))


def block_order(blocks: int, seed: int, task: int, epoch: int) -> Ints:
    """The order of a stream's blocks in one epoch; the last, which may be short, stays last."""
    turn = generator(seed, task, epoch).permutation(max(blocks - 1, 0))
    return np.append(turn, np.arange(max(blocks - 1, 0), blocks)).astype(np.int64)


def rows_of_block(
    lengths: NDArray[Any], seed: int, task: int, epoch: int, block: int, batch: int, window: int
) -> Ints:
    """The order inside one block: a permutation of its row numbers, from 0."""
    shuffled = generator(seed, task, epoch, 2, block + 1).permutation(len(lengths))
    return arrange(shuffled, lengths, batch, window, seed, task, epoch, 2, block + 1)
