"""One micro-batch of a model without weights or data: arithmetic, live bytes, distinct inputs.

The very modules of a run are called on fake tensors, which have shapes and no memory, so whatever
an architecture does is counted, not guessed. Long stacks are traced with two and three blocks and
continued, as all blocks of a stack are alike; whole where few blocks do not show the peak of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.launch.forecast.shapes import ModelPlan, depth
from accrete.pipeline.data.collate import IGNORED, Batch
from accrete.pipeline.models.load import unknown_inputs
from accrete.pipeline.stage import aligned_logits, row_losses

SHORT = 4
"""Stacks of at most so many blocks are traced whole."""
UNSETTLED = 0.01
"""Share of the model and its activations that short stacks may leave open."""
_aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


# PyTorch counts the GPU kernels of attention and leaves out the CPU's.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(LiveBytes):  # type: ignore[no-untyped-call]
    """Counts arithmetic as well. PyTorch's own counter hooks modules and so keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class BatchShape:
    """A padded micro-batch."""

    rows: int
    prompt: int
    """Tokens of the longest prompt."""
    answer: int
    """Tokens of the longest answer, the end token included."""


@dataclass(frozen=True)
class Trace:
    """What one micro-batch does and holds, beside the parameters."""

    forward_flops: float
    """Two per multiplication and addition; matrix products and attention alone."""
    backward_flops: float
    activations: float
    """Most bytes alive at once in forward and backward; of gradients the one in the making."""
    held: float
    """Bytes that wait for the backward when the forward ends."""
    scoring: float
    """Most bytes alive in a forward without gradients."""
    forward_kernels: float
    """Tensors made, about as many as kernels that are started."""
    backward_kernels: float

    def __add__(self, other: Trace) -> Trace:
        return Trace(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Trace:
        return Trace(*(factor * a for a in astuple(self)))


class Tracer:
    """Traces micro-batches of one model; every shape once."""

    def __init__(self, plan: ModelPlan, inputs: bool = False) -> None:
        """Trace the model of a recipe.

        Args:
            plan: The model.
            inputs: Every adapted layer's input waits for the backward, as where A is trained: so it
                is in a method's passes with gradients, whatever the method trains.
        """
        self._plan = plan
        self._inputs = inputs
        self._depth = depth(plan.settings)
        self._models: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._known: dict[BatchShape, Trace] = {}
        self._scored: dict[BatchShape, float] = {}
        self._whole = max(self._depth) <= SHORT

    def trace(self, shape: BatchShape) -> Trace:
        """Forward and backward of a micro-batch."""
        if shape not in self._known:
            self._known[shape] = self._continued(lambda blocks: self._run(shape, blocks))
        return self._known[shape]

    def scoring(self, shape: BatchShape) -> float:
        """Most bytes alive while a batch is scored; blocks leave nothing behind."""
        if shape not in self._scored:
            blocks = tuple(min(2, size) for size in self._depth)
            self._scored[shape] = self._score(shape, blocks)
        return self._scored[shape]

    def _continued(self, run: Callable[[tuple[int, ...]], Trace]) -> Trace:
        """The whole stack's trace from those of short ones, if they show its peak."""
        if self._whole:
            return run(self._depth)
        start = tuple(min(2, size) for size in self._depth)
        base = run(start)
        total, most = base, base.activations
        for place, size in enumerate(self._depth):
            if size > start[place]:
                longer = tuple(b + (i == place) for i, b in enumerate(start))
                blocks = (run(longer) + base * -1.0) * (size - start[place])
                total, most = total + blocks, most + blocks.held
        # A block adds at most what it holds. It adds less while the peak comes at another moment,
        # such as when a tied embedding's gradient is made; from how many blocks on is not known.
        least = max(total.activations, total.held)
        if most - least > UNSETTLED * (most + self._plan.whole_bytes):
            self._whole = True  # and for other batches, which rarely differ in this
            return run(self._depth)
        return replace(total, activations=max(least, most))

    def _model(self, blocks: tuple[int, ...]) -> tuple[Any, Any]:
        if blocks not in self._models:
            adapted = self._plan.build(blocks=blocks)
            if self._inputs:
                adapted.parameters()
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                _give_fake_weights(adapted.module)
            for parameter in adapted.module.parameters():
                if parameter.requires_grad:
                    # Who holds gradients, and in how many parts, is the engine's business.
                    parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
            self._models[blocks] = (adapted, mode)
        return self._models[blocks]

    def _run(self, shape: BatchShape, blocks: tuple[int, ...]) -> Trace:
        adapted, mode = self._model(blocks)
        adapted.module.train()
        count = Counter()
        with mode:
            batch = fake_batch(shape, self._plan.seq2seq)
            count.leave_out(_given(adapted.module, batch))
            with count:
                loss = self._loss(adapted, batch)
                flops, held, kernels = count.flops, count.now, count.made
                loss.backward()  # type: ignore[no-untyped-call]
        return Trace(
            forward_flops=flops,
            backward_flops=count.flops - flops,
            activations=float(count.peak),
            held=float(held),
            scoring=0.0,
            forward_kernels=float(kernels),
            backward_kernels=float(count.made - kernels),
        )

    def _loss(self, adapted: Any, batch: Batch) -> torch.Tensor:
        logits = aligned_logits(
            adapted.module, batch, self._plan.seq2seq, unknown_inputs(adapted.base)
        )
        return row_losses(logits, batch.labels).sum()

    def _score(self, shape: BatchShape, blocks: tuple[int, ...]) -> float:
        adapted, mode = self._model(blocks)
        adapted.module.eval()
        live = LiveBytes()
        with mode, torch.no_grad():
            batch = fake_batch(shape, self._plan.seq2seq)
            live.leave_out(_given(adapted.module, batch))
            with live:
                logits = aligned_logits(
                    adapted.module, batch, self._plan.seq2seq, unknown_inputs(adapted.base)
                )
                logits.argmax(dim=-1)
        return float(live.peak)

    def distinct_inputs(self) -> dict[str, str]:
        """Adapted layer -> the first layer that reads the same tensor, over the whole model."""
        adapted, mode = self._model(self._depth)
        held: list[tuple[Any, str]] = []
        names: dict[str, str] = {}

        def show(name: str) -> Callable[..., None]:
            def hook(module: Any, arguments: Any) -> None:
                for tensor, first in held:
                    if tensor is arguments[0]:
                        names[name] = first
                        return
                held.append((arguments[0], name))
                names[name] = name

            return hook

        handles = [
            layer.module.register_forward_pre_hook(show(layer.name))
            for layer in adapted.layers.values()
        ]
        adapted.module.eval()
        with mode, torch.no_grad():
            self._loss(adapted, fake_batch(BatchShape(1, 4, 2), self._plan.seq2seq))
        for handle in handles:
            handle.remove()
        return names


def fake_batch(shape: BatchShape, seq2seq: bool) -> Batch:
    """A batch of zeros, as the collator shapes it."""

    def tokens(width: int) -> torch.Tensor:
        return torch.zeros(shape.rows, width, dtype=torch.long)

    if seq2seq:
        width = shape.prompt
        inputs = {"decoder_input_ids": tokens(shape.answer)}
    else:
        width = shape.prompt + shape.answer - 1
        inputs = {"position_ids": tokens(width)}
    inputs["input_ids"] = tokens(width)
    inputs["attention_mask"] = torch.ones(shape.rows, width, dtype=torch.long)
    return Batch(
        inputs=inputs,
        labels=torch.full((shape.rows, shape.answer), IGNORED, dtype=torch.long),
        num_tokens=0,
        ids=[],
        real_rows=shape.rows,
    )


def _given(module: nn.Module, batch: Batch) -> Iterator[torch.Tensor]:
    """What is there before a micro-batch begins."""
    yield from module.parameters()
    yield from module.buffers()
    yield from batch.inputs.values()
    yield batch.labels


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _give_fake_weights(module: nn.Module) -> None:
    """Replace parameters and buffers on `meta` by fake ones on the CPU; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                kept.append(parameter)  # its id must stay taken
                made[id(parameter)] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"),
                    requires_grad=parameter.requires_grad,
                )
            part._parameters[name] = made[id(parameter)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
