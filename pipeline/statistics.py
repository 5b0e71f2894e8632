"""Passes over a task's rows that show every adapted layer's inputs, or inputs and gradients.

Nothing here touches a parameter's gradient: the frozen base never needs one, and the trainable
factors' are not computed, so a pass works the same at every ZeRO stage. Padding is left out of
inputs; gradients are zero there by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.distributed.comm import sum_to_owners
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
        max_rows: Use only the first so many rows of the first epoch's order.
        after_batch: Called after each global batch with its number of rows.

    Returns:
        The number of rows visited, over all ranks.

    Collective: at ZeRO 3; every rank runs the same number of batches.
    """
    total = stage.rows.num_rows if max_rows is None else min(max_rows, stage.rows.num_rows)
    seen, step = 0, 0
    module = stage.engine.module
    was_training = module.training
    module.eval()
    with _watched(stage, visit) as leaf:
        while seen < total:
            rows = stage.global_batch(step)[: total - seen]
            for batch in stage.micro_batches(rows):
                losses = row_losses(stage.logits(batch, through_engine=False), batch.labels)
                if token_mean:
                    losses = losses / (batch.labels != -100).sum(1).clamp(min=1)
                # Differentiating by this one leaf runs the whole graph, so that every layer's
                # hook fires, and leaves `.grad` of all parameters (and DeepSpeed's hooks) alone.
                torch.autograd.grad(losses.sum(), leaf)
            seen, step = seen + len(rows), step + 1
            if after_batch is not None:
                after_batch(len(rows))
    module.train(was_training)
    return total


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
        max_rows: Use only the first so many rows of the first epoch's order.

    Returns:
        The number of rows visited, over all ranks.

    Collective: at ZeRO 3; every rank runs the same number of rows.
    """
    engine = stage.engine
    total = stage.rows.num_rows if max_rows is None else min(max_rows, stage.rows.num_rows)
    seen, step = 0, 0
    was_training = engine.module.training
    engine.module.eval()
    handles = [
        parameter.register_hook(_row_gradient_shown(name, visit))  # type: ignore[no-untyped-call]
        for name, parameter in engine.parameters.items()
    ]
    while seen < total:
        rows = stage.global_batch(step)[: total - seen]
        mine = rows[engine.rank :: engine.world]
        for place in range(-(-len(rows) // engine.world)):
            # A rank that has run out of rows takes one without labels: its gradient is zero.
            batch = stage.collator.train(mine[place : place + 1], 1).to(engine.device)
            loss = row_losses(stage.logits(batch, through_engine=False), batch.labels).sum()
            if token_mean:
                loss = loss / (batch.labels != IGNORED).sum().clamp(min=1)
            # As in `visit_gradients`: `.grad` and DeepSpeed's hooks are left alone.
            torch.autograd.grad(loss, list(engine.parameters.values()), allow_unused=True)
        seen, step = seen + len(rows), step + 1
    for handle in handles:
        handle.remove()
    engine.module.train(was_training)
    return total


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
        max_rows: Use only the first so many rows of the first epoch's order.

    Returns:
        The number of rows visited, over all ranks.

    Collective: at ZeRO 3; every rank runs the same number of batches.
    """
    names = input_names(stage)
    firsts = set(names.values())
    total = stage.rows.num_rows if max_rows is None else min(max_rows, stage.rows.num_rows)
    seen, step = 0, 0
    module = stage.engine.module
    was_training = module.training
    module.eval()
    with _sides(stage) as side, torch.no_grad():

        def show(name: str, x: torch.Tensor) -> None:
            real = x[side.mask(x)]
            if len(real):
                visit(name, real)

        with _shown(stage, firsts, show):
            while seen < total:
                rows = stage.global_batch(step)[: total - seen]
                for batch in stage.micro_batches(rows):
                    side.batch = batch
                    stage.logits(batch, through_engine=False)
                seen, step = seen + len(rows), step + 1
    module.train(was_training)
    return total


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
        max_rows: Use only the first so many rows of the first epoch's order.

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

    Found by one forward over the first row, the same on every rank. Collective: at ZeRO 3.
    """
    held: list[tuple[torch.Tensor, str]] = []
    names: dict[str, str] = {}

    def show(name: str, x: torch.Tensor) -> None:
        for tensor, first in held:
            if _same(tensor, x):
                names[name] = first
                return
        held.append((x, name))
        names[name] = name

    module = stage.engine.module
    was_training = module.training
    module.eval()
    with _shown(stage, set(stage.adapted.layers), show), torch.no_grad():
        batch = stage.collator.train(stage.global_batch(0)[:1]).to(stage.engine.device)
        stage.logits(batch, through_engine=False)
    module.train(was_training)
    return names


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

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """[b, T] bool, True where a real token is."""
        assert self.batch is not None
        inputs = self.batch.inputs
        if "decoder_input_ids" not in inputs or self.inside_encoder or self._is_encoded(x):
            real = inputs["attention_mask"] != 0
            # Rows that only fill up a batch hold one attended token.
            real[self.batch.real_rows :] = False
            return real
        return self.batch.labels != IGNORED

    def _is_encoded(self, x: torch.Tensor) -> bool:
        return self.encoded is not None and _same(self.encoded, x)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two live tensors are one; ZeRO 3 hands every module a view of its own."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape


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


@contextmanager
def _watched(stage: Stage, visit: Visit) -> Iterator[torch.Tensor]:
    """Hooks on the embeddings and on every adapted layer, for the time of a pass."""
    leaf = torch.zeros(1, device=stage.engine.device, requires_grad=True)

    def root(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + leaf.to(output.dtype)

    def watch(layer: AdaptedLayer) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            # The gradient hook sits on the output tensor and fires once per micro-batch; the
            # forward hook itself fires twice under gradient checkpointing.
            inputs = arguments[0].detach()
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: visit(layer, inputs, gradient.detach())
                )

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
        yield leaf
    finally:
        for handle in handles:
            handle.remove()
