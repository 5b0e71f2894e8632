"""Counts of what a case does: calls and bytes of collectives, checkpointed blocks."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "all_to_all_single",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "reduce",
    "broadcast",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
)


def count_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(count_bytes(item) for item in value)
    return 0


@contextmanager
def counted() -> Any:
    """Count calls and bytes where every collective ends: in the process group."""
    counts: Counter[str] = Counter()
    group = dist.ProcessGroup
    # The class's own descriptors: what getattr returns would no longer bind when put back.
    originals = {name: vars(group)[name] for name in COLLECTIVES if name in vars(group)}

    def wrap(name: str, original: Any) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            counts[f"{name} calls"] += 1
            counts[f"{name} bytes"] += count_bytes(arguments)
            return original(self, *arguments, **named)

        return call

    for name in originals:
        setattr(group, name, wrap(name, getattr(group, name)))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def checkpoint_calls(base: Any) -> list[int]:
    """Grows by one with every block that is checkpointed from now on."""
    calls: list[int] = []
    for block in base.modules():
        original = getattr(block, "_gradient_checkpointing_func", None)
        if original is not None:

            def call(*arguments: Any, original: Any = original) -> Any:
                calls.append(1)
                return original(*arguments)

            block._gradient_checkpointing_func = call
    return calls
