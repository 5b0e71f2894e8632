"""How many rows a task has and how long they are: read from prepared rows, or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accrete.launch.forecast.disk import ROW_ON_DISK, TOKEN_ON_DISK, folder_bytes
from accrete.launch.forecast.metrics import decoded_tokens, is_decoded, task_facts, token_budget

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.config import Metric, TaskConfig
    from accrete.pipeline.data.handle import TaskHandle

UNSORTED_PADDING = 1.15
"""Padded for each real token where lengths are not read (streams)."""


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """One task's rows, as far as time and memory depend on them."""

    name: str
    train: int
    scored: int
    prompt: float
    """Mean tokens of a prompt."""
    answer: float
    """Mean tokens of an answer."""
    longest_prompt: int
    longest_answer: int
    padded_prompt: int
    """Tokens that a typical micro-batch is padded to."""
    padded_answer: int
    metric: Metric = "exact_match"
    classes: int = 0
    """Closed answers; 0: open."""
    decoded: bool = False
    """Scored by free generation."""
    new_tokens: float = 0.0
    """Decoded in a typical batch, if rows end where their own answers do."""
    most_new_tokens: int = 0
    """Decoded where a row does not end: the evaluator's limit."""
    stored: float = 0.0
    """Bytes of the prepared rows."""
    assumed: bool = False
    """Nothing was read: numbers of the command line."""


def assume_rows(config: RunConfig, train: int, scored: int, answer: int) -> list[TaskRows]:
    """Tasks whose rows are not at hand: prompts of full length, so that memory is a bound."""
    return [_assumed(config, task, train, scored, answer) for task in config.tasks]


def _assumed(config: RunConfig, task: TaskConfig, train: int, scored: int, answer: int) -> TaskRows:
    prompt = config.data.max_source_tokens
    size = (train + scored) * (ROW_ON_DISK + TOKEN_ON_DISK * (prompt + answer))
    metric, classes = task_facts(task, config.data)
    budget = token_budget(config, metric)
    return TaskRows(
        name=task.name,
        train=min(train, config.data.max_train_examples or train),
        scored=min(scored, config.data.max_eval_examples or scored),
        prompt=prompt,
        answer=answer,
        longest_prompt=prompt,
        longest_answer=answer,
        padded_prompt=prompt,
        padded_answer=answer,
        metric=metric,
        classes=classes,
        decoded=is_decoded(config, metric),
        new_tokens=min(answer, budget),
        most_new_tokens=budget,
        stored=float(size),
        assumed=True,
    )


def read_rows(config: RunConfig, handle: TaskHandle, index: int) -> TaskRows:
    """The rows of a prepared task, padded as its first epoch's batches are."""
    stats = handle.stats.train
    longest = stats.max_prompt_tokens
    padded = _padding(config, handle, index) * (stats.mean_prompt_tokens + stats.mean_answer_tokens)
    answers = stats.max_answer_tokens
    if handle.labels is None:
        answers = math.ceil((stats.mean_answer_tokens + answers) / 2)
    decoded = is_decoded(config, handle.metric)
    return TaskRows(
        name=handle.name,
        train=handle.num_train,
        scored=handle.num_eval,
        prompt=stats.mean_prompt_tokens,
        answer=stats.mean_answer_tokens,
        longest_prompt=longest,
        longest_answer=stats.max_answer_tokens,
        padded_prompt=max(1, min(longest, math.ceil(padded - stats.mean_answer_tokens))),
        padded_answer=max(1, answers),
        metric=handle.metric,
        classes=len(handle.labels or ()),
        decoded=decoded,
        new_tokens=decoded_tokens(config, handle) if decoded else 0.0,
        most_new_tokens=token_budget(config, handle.metric),
        stored=folder_bytes(handle.train_dir) + folder_bytes(handle.eval_dir),
    )


def _padding(config: RunConfig, handle: TaskHandle, index: int) -> float:
    """Padded for each real token, over the global batches of the first epoch."""
    if handle.streamed or not handle.train_dir:
        return UNSORTED_PADDING
    import numpy as np

    from accrete.pipeline.data.order import epoch_order
    from accrete.pipeline.data.store import open_train

    batch, window = config.train.global_batch_size, config.data.window_batches
    lengths = getattr(open_train(handle, config.seed, index, batch, window), "lengths", None)
    if lengths is None or not len(lengths):
        return UNSORTED_PADDING
    order = lengths[epoch_order(lengths, config.seed, index, 0, batch, window)]
    whole = len(order) // batch * batch
    padded = int(order[:whole].reshape(-1, batch).max(1).sum()) * batch if whole else 0
    if whole < len(order):
        padded += int(order[whole:].max()) * (len(order) - whole)
    return float(padded / max(1, int(np.sum(lengths))))
