"""Ranks of the second device: collectives carried by gloo, and the device as DeepSpeed sees it.

As with NCCL, a tensor on the CPU has no backend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from counting import COLLECTIVES
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from second_device import NAME

BACKEND = "relay"
ELDER = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}
"""A collective's name -> what gloo itself still calls it."""


def join() -> None:
    """From now on process groups are relays, and DeepSpeed's accelerator is the second device."""
    from deepspeed.accelerator import set_accelerator

    dist.Backend.register_backend(BACKEND, Relay, devices=[NAME])
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **options: start(BACKEND, **options)
    set_accelerator(Accelerator())


class Accelerator(CPU_Accelerator):  # type: ignore[misc]
    """Every rank has a device of its own, number 0."""

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = NAME, BACKEND

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:0"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME


class Relay(dist.ProcessGroup):  # type: ignore[misc]
    """Copies to the CPU, lets gloo send, and copies what was received back."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._place = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(NAME)]

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def rank(self) -> int:
        return self._place[0]

    def size(self) -> int:
        return self._place[1]


class Done(dist.Work):  # type: ignore[misc]
    """A collective that has ended."""

    def __init__(self, received: Any) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(received)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


def _carried(name: str, of_gloo: str) -> Any:
    def call(self: Relay, *arguments: Any, **options: Any) -> Done:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def on_cpu(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(on_cpu, value))
            if not isinstance(value, torch.Tensor):
                return value
            if value.device.type != NAME:
                raise RuntimeError(f"{name}: no backend for a tensor on {value.device}")
            pairs.append((value.detach(), value.detach().cpu()))
            return pairs[-1][1]

        # What is received comes first; what is sent may be a part of the same memory.
        first = [on_cpu(value) for value in arguments[:1]]
        received = list(pairs)
        rest = [on_cpu(value) for value in arguments[1:]]
        getattr(self._gloo, of_gloo)(*first, *rest, **options).wait()
        for target, value in received:
            target.copy_(value)
        return Done(arguments[:1])

    return call


for _name in COLLECTIVES:
    _there = _name if hasattr(dist.ProcessGroupGloo, _name) else ELDER.get(_name)
    if _there is not None:
        setattr(Relay, _name, _carried(_name, _there))
