"""Hooks that show what adapted layers see in a pass: inputs, and the gradients behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.errors import MethodError
from accrete.pipeline.models.lora import AdaptedLayer
from accrete.pipeline.stage import Stage

Visit = Callable[[AdaptedLayer, torch.Tensor, torch.Tensor], None]
"""(layer, x [b, T, d_in], g [b, T, d_out]); g is the gradient of each row's own loss."""


@contextmanager
def shown(
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


class Sides:
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
        return self.encoded is not None and same(self.encoded, x)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
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
def sides(stage: Stage) -> Iterator[Sides]:
    """Follow the encoder of an encoder-decoder through every forward inside the context."""
    side = Sides()
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


class Watch:
    """What a pass differentiates by, and the micro-batch that it is at."""

    def __init__(self, leaf: torch.Tensor) -> None:
        self.leaf = leaf
        self.batch: Batch | None = None


@contextmanager
def watched(stage: Stage, visit: Visit) -> Iterator[Watch]:
    """Hooks on the embeddings and on every adapted layer, for the time of a pass."""
    state = Watch(torch.zeros(1, device=stage.engine.device, requires_grad=True))

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
