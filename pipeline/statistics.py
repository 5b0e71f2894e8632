"""Passes over a task's rows that show every adapted layer's inputs, or inputs and gradients.

Nothing here touches a parameter's gradient: the frozen base never needs one, and the trainable
factors' are not computed, so a pass works the same at every ZeRO stage. Padding is left out of
inputs; gradients are zero there by themselves. Passes run in evaluation mode, and with
`model.gradient_checkpointing` those with gradients are checkpointed as a training step is.

A pass with `max_rows` takes rows that are evenly spread over the first epoch's order: its batches
are of like lengths, so that the first rows alone would be of a few lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.mix import Reader
from accrete.pipeline.distributed.comm import sum_to_owners
from accrete.pipeline.errors import MethodError
from accrete.pipeline.math.subspace import add_outer
from accrete.pipeline.models.lora import AdaptedLayer
from accrete.pipeline.stage import Stage, row_losses

Visit = Callable[[AdaptedLayer, torch.Tensor, torch.Tensor], None]
"""(layer, x [b, T, d_in], g [b, T, d_out]); g is the gradient of each row's own loss."""


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
    with _evaluating(module), _checkpointing(module), _watched(stage, visit) as watch:
        for rows in _global_batches(stage, max_rows):
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
    with _evaluating(module), _checkpointing(module), _row_gradients(stage, visit):
        for rows in _global_batches(stage, max_rows):
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
    with _evaluating(stage.engine.module), _sides(stage) as side, torch.no_grad():

        def show(name: str, x: torch.Tensor) -> None:
            real = side.real(name, x)
            if len(real):
                visit(name, real)

        with _shown(stage, firsts, show):
            for rows in _global_batches(stage, max_rows):
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

    Collective: yes.
    """
    engine = stage.engine
    totals = {name: torch.zeros(size, size, device=engine.device) for name, size in sizes.items()}
    visit_inputs(stage, lambda name, x: add_outer(totals[name], x), max_rows=max_rows)
    sum_to_owners(totals, owners, engine.rank, engine.world)
    return totals


def input_names(stage: Stage) -> dict[str, str]:
    """Adapted layer -> the name of its input: the first layer that reads the same tensor.

    Found by one forward over the first row, the same on every rank. Every pass needs inputs that
    tell rows and tokens apart, so this is also the check to make before any training.

    Raises:
        MethodError: The input of a layer is neither [b, T, d] nor, with rows and tokens in one
            dimension, [b * T, d], where T counts a batch's padded tokens, or the label positions
            that an output head reads.

    Collective: at ZeRO 3.
    """
    held: list[tuple[torch.Tensor, str]] = []
    names: dict[str, str] = {}

    with _evaluating(stage.engine.module), _sides(stage) as side, torch.no_grad():

        def show(name: str, x: torch.Tensor) -> None:
            side.real(name, x)
            for tensor, first in held:
                if _same(tensor, x):
                    names[name] = first
                    return
            held.append((x, name))
            names[name] = name

        with _shown(stage, set(stage.adapted.layers), show):
            side.batch = stage.collator.train(stage.global_batch(0)[:1]).to(stage.engine.device)
            stage.logits(side.batch, through_engine=False)
    return names


def _global_batches(stage: Stage, max_rows: int | None) -> Iterator[list[EncodedRow]]:
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
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a pass."""
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


@contextmanager
def _shown(
    stage: Stage, layers: set[str], show: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `show(layer, its input)` in every forward inside the context."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments: show(name, arguments[0])

    handles = [
        layer.module.register_forward_pre_hook(hook(layer.name))
        for layer in stage.adapted.layers.values()
        if layer.name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sides:
    """Which mask belongs to a layer's input: the source's or the answer's."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.inside_encoder = False
        self.encoded: torch.Tensor | None = None

    def real(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """[n, d] of a layer's input x: its real tokens. Raises `MethodError`; see `input_names`."""
        assert self.batch is not None
        apart = _rows_apart(name, x, self.batch)
        mask = self._mask(x, apart.shape[1])
        if mask.shape != apart.shape[:2]:
            raise _unknown_shape(name, x, self.batch)
        return apart[mask]

    def _mask(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """[b, T] bool, True where a real token is."""
        assert self.batch is not None
        inputs, labels = self.batch.inputs, self.batch.labels
        if "decoder_input_ids" in inputs:
            answers = not (self.inside_encoder or self._is_encoded(x))
        else:  # an output head reads the label positions alone
            answers = length != inputs["input_ids"].shape[1]
        if answers:
            return labels != IGNORED
        real = inputs["attention_mask"] != 0
        # Rows that only fill up a batch hold one attended token.
        real[self.batch.real_rows :] = False
        return real

    def _is_encoded(self, x: torch.Tensor) -> bool:
        return self.encoded is not None and _same(self.encoded, x)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two live tensors are one; ZeRO 3 hands every module a view of its own."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


def _rows_apart(name: str, x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A layer's input as [b, T, d]; some models flatten it. Raises `MethodError`."""
    rows = len(batch.labels)
    for length in (batch.inputs["input_ids"].shape[1], batch.labels.shape[1]):
        if x.shape[:-1] in ((rows, length), (rows * length,)):
            return x.reshape(rows, length, -1)
    raise _unknown_shape(name, x, batch)


def _unknown_shape(name: str, x: torch.Tensor, batch: Batch) -> MethodError:
    rows, labels = batch.labels.shape
    tokens = batch.inputs["input_ids"].shape[1]
    return MethodError(
        f"{name}: its input has the shape {list(x.shape)} for {rows} rows of {tokens} tokens and "
        f"{labels} label positions. This method measures layers whose input is [rows, tokens, "
        "features] or [rows * tokens, features]: it cannot tell which row and token this one "
        "belongs to. Name the other layers in adapter.targets, or choose another method."
    )


@contextmanager
def _sides(stage: Stage) -> Iterator[_Sides]:
    """Follow the encoder of an encoder-decoder through every forward inside the context."""
    side = _Sides()
    handles = []
    if stage.facts.seq2seq:
        encoder: nn.Module = stage.adapted.base.get_encoder()  # type: ignore[operator]

        def enter(*_: Any) -> None:
            side.inside_encoder = True

        def leave(module: Any, arguments: Any, output: Any) -> None:
            side.inside_encoder, side.encoded = False, output[0]

        handles = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]
    try:
        yield side
    finally:
        for handle in handles:
            handle.remove()


def _vocabulary(stage: Stage) -> int:
    return int(stage.adapted.base.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


class _Kept(torch.autograd.Function):
    """Holds a tensor the way autograd holds what a backward needs.

    So checkpointing drops it after the first forward and makes it again when it is asked for.
    """

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Keep x; its node hangs on `leaf`, which needs a gradient, and is never run."""
        ctx.save_for_backward(x)
        return leaf.detach()


class _Watch:
    """What a pass differentiates by, and the micro-batch that it is at."""

    def __init__(self, leaf: torch.Tensor) -> None:
        self.leaf = leaf
        self.batch: Batch | None = None


@contextmanager
def _watched(stage: Stage, visit: Visit) -> Iterator[_Watch]:
    """Hooks on the embeddings and on every adapted layer, for the time of a pass."""
    state = _Watch(torch.zeros(1, device=stage.engine.device, requires_grad=True))

    def root(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + state.leaf.to(output.dtype)

    def watch(layer: AdaptedLayer) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            assert state.batch is not None
            x = _rows_apart(layer.name, arguments[0].detach(), state.batch)
            held = [_Kept.apply(state.leaf, x).grad_fn]  # type: ignore[no-untyped-call]

            def show(gradient: torch.Tensor) -> None:
                # Let go of at once: it would keep what its block is made again from.
                (inputs,) = held.pop().saved_tensors
                visit(layer, inputs, gradient.detach().reshape(*inputs.shape[:2], -1))

            # It fires once per micro-batch. The forward hook itself fires twice under gradient
            # checkpointing, but nothing runs back through the second output.
            output.register_hook(show)  # type: ignore[no-untyped-call]

        return hook

    # Encoder and decoder may hold embedding modules of their own over one shared weight.
    handles = [
        module.register_forward_hook(root)
        for module in stage.adapted.base.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= _vocabulary(stage)
    ]
    for layer in stage.adapted.layers.values():
        handles.append(layer.module.register_forward_hook(watch(layer)))
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()
