"""Scoring, its seconds and its peak: a forward over every row, or decoding with a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from accrete.launch.forecast.rows import TaskRows
from accrete.launch.forecast.shapes import ModelPlan, depth
from accrete.launch.forecast.speed import OneToken, Speed
from accrete.launch.forecast.trace import BatchShape, Tracer
from accrete.launch.forecast.traffic import gathered_bytes

if TYPE_CHECKING:
    from accrete.pipeline.data.config import Metric

DECODER_SHARE = 3 / 5
"""Kernels of a decoder block among those of a pair of blocks: its attention to the encoder makes
it three parts to the encoder's two."""


@dataclass(frozen=True, kw_only=True)
class TaskScoring:
    """What scoring a task once takes."""

    task: str
    metric: Metric
    rows: int
    decoded: bool
    """All rows are decoded; else a forward pass decides them."""
    new_tokens: float
    """Decoded in a typical batch; 0: none."""
    most_new_tokens: int
    """The evaluator's limit; 0: nothing is decoded."""
    seconds: float
    most_seconds: float
    """If no row that is decoded ends before the limit (and all misses are decoded, if wanted)."""


class Scoring:
    """Scores the tasks of one run."""

    def __init__(self, plan: ModelPlan, tracer: Tracer, world: int, zero_stage: int | None) -> None:
        """Set what is scored, on how many ranks, at which ZeRO stage (None: the plain engine)."""
        self._plan = plan
        self._tracer = tracer
        self._world = world
        self._gathered = gathered_bytes(plan, zero_stage, world)
        self._tokens: dict[BatchShape, tuple[float, float]] = {}

    def of(self, task: TaskRows, shape: BatchShape, speed: Speed) -> TaskScoring:
        """What one pass over a task takes.

        Args:
            task: Its rows.
            shape: A micro-batch of them, traced for the training.
            speed: Turns arithmetic into seconds.
        """
        forward = speed.timing(self._tracer.trace(shape), 0.0).forward
        once = task.scored / (shape.rows * self._world) * forward
        misses = self._plan.config.eval.decode_misses and not task.decoded
        seconds, most = once, once
        if task.decoded:
            seconds = self._decoding(task, shape, speed, task.new_tokens)
            most = self._decoding(task, shape, speed, task.most_new_tokens)
        elif misses:
            most = once + self._decoding(task, shape, speed, task.most_new_tokens)
        return TaskScoring(
            task=task.name,
            metric=task.metric,
            rows=task.scored,
            decoded=task.decoded,
            new_tokens=task.new_tokens if task.decoded else 0.0,
            most_new_tokens=task.most_new_tokens if task.decoded or misses else 0,
            seconds=seconds,
            most_seconds=most,
        )

    def _decoding(self, task: TaskRows, shape: BatchShape, speed: Speed, new: float) -> float:
        """Seconds until all rows are decoded, if every batch takes so many new tokens."""
        rows = self._decoded_rows(task)
        rounds = math.ceil(math.ceil(task.scored / rows) / self._world)
        trace = self._tracer.trace(shape)
        flops, kernels = self._one_token(shape)
        # The first new token comes with the prompt; the trace holds the others' arithmetic as well.
        share = max(0.0, 1.0 - (shape.answer - 1) * flops / trace.forward_flops)
        prompts = share * rows / shape.rows * speed.timing(trace, 0.0).forward
        token = OneToken(
            flops=flops * rows / shape.rows,
            kernels=kernels,
            read_bytes=self._weights + rows * (task.prompt + new / 2) * self._cache,
            gathered_bytes=self._gathered,
        )
        return rounds * (prompts + max(0.0, new - 1.0) * speed.token_seconds(token))

    def peak(self, task: TaskRows, shape: BatchShape) -> float:
        """Most bytes alive while a task is scored.

        Args:
            task: Its rows.
            shape: A batch of them, as a forward pass decides it.
        """
        live = 0.0 if task.decoded else self._tracer.scoring(shape)
        if not (task.decoded or self._plan.config.eval.decode_misses):
            return live
        rows = self._decoded_rows(task)
        prompts = self._tracer.scoring(replace(shape, rows=rows, answer=1))
        if not self._plan.seq2seq:  # an encoder is done before the cache begins
            prompts += rows * task.prompt * self._cache
        # To grow, a block's keys are copied, and then its values.
        blocks = depth(self._plan.settings)[-1]
        last = rows * (task.prompt + task.most_new_tokens) * self._cache * (1 + 0.5 / blocks)
        return max(live, prompts, last)

    def _decoded_rows(self, task: TaskRows) -> int:
        """Rows of a batch, as the evaluator packs them: with room for the longest answer."""
        length = task.prompt + task.answer + task.most_new_tokens
        budget = self._plan.config.eval.batch_tokens
        return max(1, min(int(budget // length), task.scored))

    def _one_token(self, shape: BatchShape) -> tuple[float, float]:
        """Arithmetic and kernels of one more token for every row of a micro-batch."""
        # Nearly the same for all lengths (the look back is small beside the layers): traced once.
        known = BatchShape(shape.rows, 0, 0)
        if known not in self._tokens:
            trace = self._tracer.trace(shape)
            longer = self._tracer.trace(BatchShape(shape.rows, shape.prompt, shape.answer + 1))
            share = 1.0
            if self._plan.seq2seq:
                # The encoder has run; the cache holds what the decoder asks of it.
                both = depth(self._plan.settings)
                decoder = DECODER_SHARE * both[-1]
                share = decoder / (decoder + (1.0 - DECODER_SHARE) * both[0])
            flops = max(0.0, longer.forward_flops - trace.forward_flops)
            self._tokens[known] = (flops, share * trace.forward_kernels)
        return self._tokens[known]

    @cached_property
    def _weights(self) -> float:
        """Bytes of the weights that a one-token forward reads: no encoder, no table of embeddings
        unless the head shares it.
        """
        module = self._plan.adapted.module
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        used = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
        return float(
            sum(
                parameter.numel() * parameter.element_size()
                for name, parameter in module.named_parameters()
                if id(parameter) not in tables - used
                and not (self._plan.seq2seq and ".encoder." in f".{name}")
            )
        )

    @cached_property
    def _cache(self) -> float:
        """Bytes of keys and values that the cache holds for a token of a row."""
        settings = self._plan.settings.get_text_config()
        heads = getattr(settings, "num_attention_heads", 1)
        groups = getattr(settings, "num_key_value_heads", None) or heads
        width = getattr(settings, "head_dim", None) or getattr(settings, "d_kv", None)
        width = width or settings.hidden_size // heads
        blocks = depth(self._plan.settings)[-1]
        return float(2 * blocks * groups * width * self._plan.dtype.itemsize)


def decoding_notes(tasks: Sequence[TaskRows], misses: bool) -> list[str]:
    """Which tasks are decoded, how far, and what that leaves open.

    Args:
        tasks: The run's.
        misses: Rows that a forward pass finds wrong are decoded as well.
    """
    notes = []
    decoded = [task for task in tasks if task.decoded]
    if decoded:
        names = "all tasks" if len(decoded) == len(tasks) else ", ".join(t.name for t in decoded)
        new = _span([task.new_tokens for task in decoded])
        source = "assumed (ANSWER)" if decoded[0].assumed else "a batch, as the right answers end"
        most = max(task.most_new_tokens for task in decoded)
        notes.append(
            f"{names}: scored by decoding, {new} new tokens {source}; a model that does not stop "
            f"takes up to {most}, which `scoring at most` counts"
        )
    if misses and len(decoded) < len(tasks):
        notes.append(
            "eval.decode_misses: how many rows will be missed is not known; their decoding is "
            "counted in `scoring at most` alone, as if all were"
        )
    return notes


def _span(numbers: Sequence[float]) -> str:
    low, high = round(min(numbers)), round(max(numbers))
    return str(low) if low == high else f"{low} to {high}"
