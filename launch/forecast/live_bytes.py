"""Bytes of tensors that are alive, counted where every tensor is born: in the dispatcher."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators made inside the context, and their peak.

    Works for real tensors and for fake ones, on any device; tensors on `meta` count nothing. What
    was alive before the context began is not known to it, nor are the buffers that a kernel
    allocates and frees for itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes that were alive at once since the last `reset_peak`."""
        self.made = 0
        """Storages that came into being: about as many as kernels ran."""
        self._sizes: dict[int, int] = {}
        self._left_out: dict[int, Any] = {}

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors from before the context: views of them are not news."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._left_out[storage._cdata] = storage

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returned."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.count(value)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Take in a tensor (again, if its storage has grown)."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._left_out:
            return
        before = self._sizes.get(key)
        if before == size:
            return
        if before is None:
            weakref.finalize(storage, self._forget, key)
            self.made += 1
        self._sizes[key] = size
        self.now += size - (before or 0)
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
