"""What a recipe says about processes and sharding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is sharded over processes."""

    kind: Literal["deepspeed", "plain"] = "deepspeed"
    """`deepspeed` (ZeRO through Accelerate) or `plain` (one process, PyTorch only)."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 1 shards moments, 2 also gradients, 3 also weights."""
    procs: Annotated[int, Field(ge=1)] | None = None
    """Processes on this machine; default: all GPUs, or 2 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA GPUs when there are any."""
    bucket_elements: Annotated[int, Field(ge=1)] = 50_000_000
    """Size of DeepSpeed's reduction buckets, in elements."""
    timeout_s: Annotated[int, Field(ge=10)] = 1800
    """A collective that waits longer than this ends the run with an error."""
