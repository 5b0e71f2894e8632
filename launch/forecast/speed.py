"""Seconds from arithmetic: a table of GPUs, a quick measurement, or a calibration by real steps."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from accrete.launch.forecast.trace import Trace
from accrete.pipeline.errors import ConfigError

ASSUMED_MFU = 0.3
"""Share of a GPU's peak that tuning with an adapter is assumed to reach."""
ASSUMED_KERNEL_SECONDS = 15e-6
"""Between the starts of two kernels of a GPU: small batches wait for Python, not for the GPU."""
ASSUMED_CPU_SHARE = 0.6
"""Share of a matrix product's speed that a whole step is assumed to reach on a CPU."""
ASSUMED_EIGEN_SHARE = 0.35
"""Speed of a decomposition on a CPU, in nominal fp64 operations, as a share of its matrix products'
in fp32."""
ASSUMED_GPU_EIGEN = 200e9
"""The same of a GPU in FLOP/s, whichever it is: decompositions wait for memory and for each other's
small parts."""
SMALL_CALLS = 100
READ_ROWS = 4096
MIG_SLICES = 7
STARTS_PER_CALL = 4.0
"""A kernel inside a model is taken to start in so many times the time of a bare call: modules,
views and autograd come with it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's peaks, as its maker gives them."""

    name: str
    bf16: float
    """Dense FLOP/s in bf16."""
    fp32: float
    """FLOP/s in fp32 (PyTorch's default precision: no TF32)."""
    gib: float
    """Memory."""
    link: float
    """Bytes per second and direction to other GPUs of the node."""
    memory: float
    """Bytes per second from its own memory."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 2250e12, 75e12, 180, 900e9, 8000e9),
        Gpu("h200", 989e12, 67e12, 141, 450e9, 4800e9),
        Gpu("h100", 989e12, 67e12, 80, 450e9, 3350e9),
        Gpu("h100-pcie", 756e12, 51e12, 80, 64e9, 2000e9),
        Gpu("a100-80", 312e12, 19.5e12, 80, 300e9, 2039e9),
        Gpu("a100-40", 312e12, 19.5e12, 40, 300e9, 1555e9),
        Gpu("l40s", 362e12, 91.6e12, 48, 32e9, 864e9),
        Gpu("l40", 181e12, 90.5e12, 48, 32e9, 864e9),
        Gpu("l4", 121e12, 30.3e12, 24, 32e9, 300e9),
        Gpu("a10", 125e12, 31.2e12, 24, 32e9, 600e9),
        Gpu("rtx4090", 165e12, 82.6e12, 24, 32e9, 1008e9),
        Gpu("rtx3090", 71e12, 35.6e12, 24, 32e9, 936e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: It is not there.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in GPUS:
        raise ConfigError(
            f"--gpu {name}: no such GPU in the table. Known: {', '.join(GPUS)}. For another one "
            "take the nearest and set --mfu so that peak times MFU is right."
        )
    return GPUS[key]


def gpu_here() -> tuple[Gpu | None, float]:
    """This machine's GPU in the table, by its name, and the GiB that it reports itself."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return gpu_by_name(torch.cuda.get_device_name()), size / 2**30


def gpu_by_name(name: str) -> Gpu | None:
    """The GPU of the table that a driver's name means, word by word; a MIG slice has its share."""
    whole, _, part = name.lower().partition(" mig ")
    words = re.findall("[a-z0-9]+", re.sub(r"rtx[ -](?=\d)", "rtx", whole))
    known = {word.removesuffix("gb") for word in words}
    near = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in known]
    if not near or "laptop" in known:
        return None
    exact = [gpu for gpu in near if known.issuperset(gpu.name.split("-"))]
    gpu = max(exact or near, key=lambda gpu: len(gpu.name))
    return _slice(gpu, int(part[0])) if part[:1].isdigit() else gpu


def _slice(gpu: Gpu, count: int) -> Gpu:
    share = count / MIG_SLICES
    return replace(
        gpu,
        name=f"{gpu.name} MIG {count}g",
        bf16=gpu.bf16 * share,
        fp32=gpu.fp32 * share,
        memory=gpu.memory * share,
    )


@dataclass(frozen=True)
class Timing:
    """Seconds of one micro-batch and of what ends a step, on a rank."""

    forward: float
    micro: float
    """Forward and backward of a micro-batch that does not end the step."""
    last: float
    """The same for the one that ends it, reduction included."""
    update: float
    """The optimizer's step."""

    def step(self, accumulation: int) -> float:
        """Seconds of an optimizer step."""
        return (accumulation - 1) * self.micro + self.last + self.update


@dataclass(frozen=True, kw_only=True)
class OneToken:
    """A forward with cache that adds one token to every row of a decoded batch."""

    flops: float
    kernels: float
    read_bytes: float
    """Weights and cache, which have to come from memory once."""
    gathered_bytes: float = 0.0
    """Parameters that come from other ranks (ZeRO 3)."""


class Speed(Protocol):
    """Turns a traced micro-batch into seconds."""

    @property
    def basis(self) -> str:
        """Where the seconds come from, in words."""
        ...

    @property
    def rough(self) -> bool:
        """Whether a share of a peak is assumed instead of measured."""
        ...

    def timing(self, trace: Trace, traffic_bytes: float) -> Timing:
        """Seconds of a micro-batch with this arithmetic and this traffic per step."""
        ...

    def token_seconds(self, token: OneToken) -> float:
        """Seconds of a forward that adds one token to every row of a batch."""
        ...

    def eigen_seconds(self, flops: float) -> float:
        """Seconds of decompositions of so many nominal operations."""
        ...


@dataclass(frozen=True)
class AssumedSpeed:
    """A rate for all arithmetic; collectives are not hidden behind it."""

    basis: str
    rate: float
    """FLOP/s of a rank."""
    link: float | None = None
    """Bytes per second of a rank's collectives; None: they are taken to be free."""
    rough: bool = True
    kernel_seconds: float = 0.0
    """Time to start a kernel: on a GPU beside the arithmetic, on a CPU before it."""
    overlaps: bool = True
    memory: float | None = None
    """Bytes per second that weights are read with; None: as fast as wanted."""
    eigen: float = ASSUMED_GPU_EIGEN
    """FLOP/s of decompositions."""

    def timing(self, trace: Trace, traffic_bytes: float) -> Timing:
        """See `Speed.timing`."""
        forward = self._seconds(trace.forward_flops, trace.forward_kernels)
        micro = forward + self._seconds(trace.backward_flops, trace.backward_kernels)
        wire = traffic_bytes / self.link if self.link else 0.0
        return Timing(forward, micro, micro + wire, 0.0)

    def _seconds(self, flops: float, kernels: float, read_bytes: float = 0.0) -> float:
        reading = read_bytes / self.memory if self.memory else 0.0
        parts = (max(flops / self.rate, reading), kernels * self.kernel_seconds)
        return max(parts) if self.overlaps else sum(parts)

    def token_seconds(self, token: OneToken) -> float:
        """See `Speed.token_seconds`: reading the weights takes longer than using them once."""
        wire = token.gathered_bytes / self.link if self.link else 0.0
        return self._seconds(token.flops, token.kernels, token.read_bytes) + wire

    def eigen_seconds(self, flops: float) -> float:
        """See `Speed.eigen_seconds`."""
        return flops / self.eigen


UNKNOWN_GPU = AssumedSpeed("this GPU", float("inf"), kernel_seconds=ASSUMED_KERNEL_SECONDS)
"""What is left of a GPU outside the table: the time to start kernels."""


@dataclass(frozen=True)
class MeasuredPoint:
    """A micro-batch that was run: its arithmetic and its seconds."""

    flops: float
    """Of forward and backward."""
    timing: Timing


@dataclass(frozen=True)
class CalibratedSpeed:
    """Seconds between and beyond measured micro-batches of the same model, by their arithmetic."""

    basis: str
    points: tuple[MeasuredPoint, ...]
    """At least one, by arithmetic."""
    beside: AssumedSpeed = UNKNOWN_GPU
    """For what training steps do not show: one-token forwards and decompositions."""
    rough: bool = False

    def timing(self, trace: Trace, traffic_bytes: float) -> Timing:
        """See `Speed.timing`; traffic is part of what was measured."""
        flops = trace.forward_flops + trace.backward_flops
        first, last = self.points[0], self.points[-1]
        if first.flops == last.flops:
            share = flops / first.flops
            start = first.timing
            return Timing(
                share * start.forward, share * start.micro, share * start.last, start.update
            )
        share = max(0.0, (flops - first.flops) / (last.flops - first.flops))
        # Below the smallest there is no less than it: launching kernels takes its time.
        a, b = first.timing, last.timing
        return Timing(
            a.forward + share * (b.forward - a.forward),
            a.micro + share * (b.micro - a.micro),
            a.last + share * (b.last - a.last),
            a.update + share * (b.update - a.update),
        )

    def token_seconds(self, token: OneToken) -> float:
        """See `Speed.token_seconds`; assumed, as no step that is measured has so few tokens."""
        return self.beside.token_seconds(token)

    def eigen_seconds(self, flops: float) -> float:
        """See `Speed.eigen_seconds`; assumed."""
        return self.beside.eigen_seconds(flops)


def assumed_gpu(gpu: Gpu, dtype: torch.dtype, mfu: float, link: float | None) -> AssumedSpeed:
    """A GPU of the table at an assumed share of its peak."""
    half = dtype == torch.bfloat16
    peak = gpu.bf16 if half else gpu.fp32
    return AssumedSpeed(
        f"{gpu.name}: {mfu:.0%} of {peak / 1e12:.0f} TFLOP/s "
        f"({'bf16' if half else 'fp32'}) and {1e6 * ASSUMED_KERNEL_SECONDS:.0f} us a kernel "
        "assumed, nothing measured",
        peak * mfu,
        gpu.link if link is None else link,
        kernel_seconds=ASSUMED_KERNEL_SECONDS,
        memory=gpu.memory,
    )


def quick_cpu(threads: int) -> AssumedSpeed:
    """This machine's matrix products, measured for a moment, at an assumed share."""
    size = 1024
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        a, b = torch.rand(size, size), torch.rand(size, size)
        best = float("inf")
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
        reading = _reading_speed()
        small = torch.rand(8, requires_grad=True)
        call = float("inf")
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(SMALL_CALLS):
                torch.mul(small, small)
            call = min(call, (time.perf_counter() - began) / SMALL_CALLS)
    finally:
        torch.set_num_threads(before)
    peak = 2.0 * size**3 / best
    return AssumedSpeed(
        f"this CPU: {ASSUMED_CPU_SHARE:.0%} of {peak / 1e9:.0f} GFLOP/s a process assumed "
        "(fp32 matrix products measured for a moment)",
        peak * ASSUMED_CPU_SHARE,
        kernel_seconds=STARTS_PER_CALL * call,
        overlaps=False,
        memory=reading,
        eigen=peak * ASSUMED_EIGEN_SHARE,
    )


def _reading_speed() -> float:
    """Bytes per second that a matrix too large for the caches is read with."""
    matrix, vector = torch.rand(READ_ROWS, READ_ROWS), torch.rand(READ_ROWS)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - began)
    return matrix.nbytes / best
