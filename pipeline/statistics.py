"""Passes over a task's rows that show every adapted layer's inputs, or inputs and gradients.

Nothing here touches a parameter's gradient: the frozen base never needs one, and the trainable
factors' are not computed, so a pass works the same at every ZeRO stage. Padding is left out of
inputs; gradients are zero there by themselves. Passes run in evaluation mode, and with
`model.gradient_checkpointing` those with gradients are checkpointed as a training step is.

A pass with `max_rows` takes rows that are evenly spread over the first epoch's order: its batches
are of like lengths, so that the first rows alone would be of a few lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accrete.pipeline.data.collate import IGNORED
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.mix import Reader
from accrete.pipeline.distributed.comm import sum_over_ranks, sum_to_owners
from accrete.pipeline.errors import MethodError
from accrete.pipeline.layer_hooks import Visit, same, shown, sides, watched
from accrete.pipeline.math.subspace import add_outer
from accrete.pipeline.stage import Stage, row_losses


def visit_gradients(
    stage: Stage,
    visit: Visit,
    *,
    token_mean: bool = False,
    max_rows: int | None = None,
    after_batch: Callable[[int], None] | None = None,
) -> int:
    """Run the task's rows forward and backward once, in evaluation mode.

    Args:
        stage: The stage; its weights are not changed.
        visit: Called for every adapted layer and micro-batch, after that layer's backward.
        token_mean: Each row's loss is the mean instead of the sum over its label tokens.
        max_rows: Use only so many rows, evenly spread over the first epoch's order.
        after_batch: Called after each global batch with its number of rows.

    Returns:
        The number of rows visited, over all ranks.

    Raises:
        MethodError: A layer's input has no place for rows; see `input_names`.

    Collective: at ZeRO 3; every rank runs the same number of batches.
    """
    seen = 0
    module = stage.engine.module
    with evaluating(module), _checkpointing(module), watched(stage, visit) as watch:
        for rows in global_batches(stage, max_rows):
            for batch in stage.micro_batches(rows):
                watch.batch = batch
                losses = row_losses(stage.logits(batch, through_engine=False), batch.labels)
                if token_mean:
                    losses = losses / (batch.labels != IGNORED).sum(1).clamp(min=1)
                # Differentiating by this one leaf runs the whole graph, so that every layer's
                # hook fires, and leaves `.grad` of all parameters (and DeepSpeed's hooks) alone.
                torch.autograd.grad(losses.sum(), watch.leaf)
            seen += len(rows)
            if after_batch is not None:
                after_batch(len(rows))
    return seen


RowVisit = Callable[[str, torch.Tensor], None]
"""(name of a trained parameter, the gradient of one row's own loss, whole)."""


def visit_row_gradients(
    stage: Stage, visit: RowVisit, *, token_mean: bool = False, max_rows: int | None = None
) -> int:
    """Show every row's own gradient of every trained parameter, in evaluation mode.

    For parameters of any kind, weights of norms and embeddings among them. Hooks on outputs cannot
    tell rows apart there (a table of relative positions has no row dimension), so this goes row by
    row: exact, but slower than `visit_gradients`. One parameter's gradient is held at a time.

    Args:
        stage: The stage; its weights are not changed.
        visit: Called once for every parameter and row of this rank.
        token_mean: A row's loss is the mean instead of the sum over its label tokens.
        max_rows: Use only so many rows, evenly spread over the first epoch's order.

    Returns:
        The number of rows visited, over all ranks.

    Collective: at ZeRO 3; every rank runs the same number of rows.
    """
    engine, seen = stage.engine, 0
    module = engine.module
    with evaluating(module), _checkpointing(module), _row_gradients(stage, visit):
        for rows in global_batches(stage, max_rows):
            mine = rows[engine.rank :: engine.world]
            for place in range(-(-len(rows) // engine.world)):
                # A rank that has run out of rows takes one without labels: its gradient is zero.
                batch = stage.collator.train(mine[place : place + 1], 1).to(engine.device)
                loss = row_losses(stage.logits(batch, through_engine=False), batch.labels).sum()
                if token_mean:
                    loss = loss / (batch.labels != IGNORED).sum().clamp(min=1)
                # As in `visit_gradients`: `.grad` and DeepSpeed's hooks are left alone.
                torch.autograd.grad(loss, list(engine.parameters.values()), allow_unused=True)
            seen += len(rows)
    return seen


@contextmanager
def _row_gradients(stage: Stage, visit: RowVisit) -> Iterator[None]:
    """Call `visit` with every gradient that is made inside the context."""
    handles = [
        parameter.register_hook(_row_gradient_shown(name, visit))  # type: ignore[no-untyped-call]
        for name, parameter in stage.engine.parameters.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _row_gradient_shown(name: str, visit: RowVisit) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        visit(name, gradient)
        # What `autograd.grad` collects until its end, without memory of its own.
        return gradient.new_zeros(()).expand_as(gradient)

    return hook


InputVisit = Callable[[str, torch.Tensor], None]
"""(name of the input, x [n, d_in] of its real tokens)."""


def visit_inputs(stage: Stage, visit: InputVisit, *, max_rows: int | None = None) -> int:
    """Run the task's rows forward once, in evaluation mode, without gradients.

    Layers that read the same tensor (query, key and value of a block; in an encoder-decoder all
    cross-attentions) share one input, named after the first of them: see `input_names`.

    Args:
        stage: The stage; its weights are not changed.
        visit: Called once for every distinct input and micro-batch with at least one real token.
        max_rows: Use only so many rows, evenly spread over the first epoch's order.

    Returns:
        The number of rows visited, over all ranks.

    Raises:
        MethodError: A layer's input has no place for rows; see `input_names`.

    Collective: at ZeRO 3; every rank runs the same number of batches.
    """
    firsts = set(input_names(stage).values())
    seen = 0
    with evaluating(stage.engine.module), sides(stage) as side, torch.no_grad():

        def show(name: str, x: torch.Tensor) -> None:
            real = side.real(name, x)
            if len(real):
                visit(name, real)

        with shown(stage, firsts, show):
            for rows in global_batches(stage, max_rows):
                for batch in stage.micro_batches(rows):
                    side.batch = batch
                    stage.logits(batch, through_engine=False)
                seen += len(rows)
    return seen


def covariances(
    stage: Stage,
    sizes: Mapping[str, int],
    owners: Mapping[str, int],
    *,
    max_rows: int | None = None,
) -> dict[str, torch.Tensor]:
    """Sum of x x^T over the real tokens of the task's rows, for the inputs that this rank owns.

    Every rank holds the sums of all inputs, d^2 numbers each, during the pass.

    Args:
        stage: The stage; its weights are not changed.
        sizes: Name of an input (see `input_names`) -> its dimension d.
        owners: Name of an input -> the rank that gets its sum.
        max_rows: Use only so many rows, evenly spread over the first epoch's order.

    Returns:
        Name of an owned input -> [d, d].

    Raises:
        MethodError: See `require_finite`.

    Collective: yes.
    """
    engine = stage.engine
    totals = {name: torch.zeros(size, size, device=engine.device) for name, size in sizes.items()}
    visit_inputs(stage, lambda name, x: add_outer(totals[name], x), max_rows=max_rows)
    require_finite(stage, totals.values(), "inputs of the layers")
    sum_to_owners(totals, owners, engine.rank, engine.world)
    return totals


def require_finite(stage: Stage, sums: Iterable[torch.Tensor], what: str) -> None:
    """Let no nan or infinity into what a method keeps.

    A decomposition of one fails on the rank that makes it, or returns directions all the same.

    Args:
        stage: The stage whose rows were passed over.
        sums: What this rank has added up in the pass, or its part of it.
        what: What they are sums of.

    Raises:
        MethodError: On every rank, if the sums of any are not finite.

    Collective: yes.
    """
    wrong = torch.zeros((), device=stage.engine.device)
    for tensor in sums:
        wrong += ~tensor.sum().isfinite()  # of its entries by themselves it would make copies
    if sum_over_ranks(wrong, stage.engine.world) == 0:
        return
    raise MethodError(
        f"The {what} in a pass over the rows of task {stage.name} (stage {stage.index}) are not "
        "all finite; the method's memory was not changed. Either the training has diverged: lower "
        "train.learning_rate in a new run, or in a branch from an earlier stage. Or some rows meet "
        "weights of the base model that are not finite, such as a token's embedding: look for "
        "those, or leave such rows out."
    )


def input_names(stage: Stage) -> dict[str, str]:
    """Adapted layer -> the name of its input: the first layer that reads the same tensor.

    Found by one forward over the first two rows, the same on every rank; layers that do not run in
    it are left out. Every pass needs inputs that tell rows and tokens apart, so this is also the
    check to make before any training. (One row would not show an input that all rows share.)

    Raises:
        MethodError: The input of a layer is neither [b, T, d] nor, with rows and tokens in one
            dimension, [b * T, d], where T counts a batch's padded tokens, or the label positions
            that an output head reads.

    Collective: at ZeRO 3.
    """
    held: list[tuple[torch.Tensor, str]] = []
    names: dict[str, str] = {}

    with evaluating(stage.engine.module), sides(stage) as side, torch.no_grad():

        def show(name: str, x: torch.Tensor) -> None:
            side.real(name, x)
            for tensor, first in held:
                if same(tensor, x):
                    names[name] = first
                    return
            held.append((x, name))
            names[name] = name

        with shown(stage, set(stage.adapted.layers), show):
            side.batch = stage.collator.train(stage.global_batch(0)[:2]).to(stage.engine.device)
            stage.logits(side.batch, through_engine=False)
    return names


def global_batches(stage: Stage, max_rows: int | None = None) -> Iterator[list[EncodedRow]]:
    """Global batches of the first epoch: of all its rows, or of `max_rows` spread evenly over it.

    The same on every rank. The source is read front to back and each of its batches once.
    """
    total = stage.rows.num_rows
    if max_rows is None or max_rows >= total:
        for step in range(stage.rows.steps_per_epoch):
            yield stage.global_batch(step)
        return
    size = stage.config.train.global_batch_size
    reader = Reader(stage.rows, size)
    for first in range(0, max_rows, size):
        numbers = range(first, min(first + size, max_rows))
        # The middle of each of `max_rows` stretches: a batch's first row would be its shortest.
        found = reader.pick(0, [(2 * i + 1) * total // (2 * max_rows) for i in numbers])
        # Lengths are mixed by now; sorted, a micro-batch still needs little padding.
        yield sorted(found.values(), key=lambda row: len(row.prompt) + len(row.answer))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context: without dropout. Every part gets its own mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, checkpoint what is checkpointed in training."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    checkpoints = {
        block: block._gradient_checkpointing_func
        for block in module.modules()
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing
    }
    # A block looks at its own mode to decide. Its parts stay in evaluation mode, and so does the
    # block itself for the time of its forward: it may drop out by itself.
    for block, checkpoint in checkpoints.items():
        block.training = True
        block._gradient_checkpointing_func = _in_evaluation(block, checkpoint)
    try:
        yield
    finally:
        for block, checkpoint in checkpoints.items():
            block.training = False
            block._gradient_checkpointing_func = checkpoint


def _in_evaluation(block: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function that runs the block in evaluation mode, at first and again."""

    def run(forward: Callable[..., Any], *arguments: Any) -> Any:
        def evaluated(*again: Any) -> Any:
            block.training = False
            try:
                return forward(*again)
            finally:  # the second run is broken off as soon as it has made what is needed
                block.training = True

        return checkpoint(evaluated, *arguments)

    return run
