"""What finished tasks left, in the forward: V = sum over tasks of s B_j A_j.

`fold` writes W_0 + V into the base weights, always from the untouched W_0 and the fp32 factors,
never one rounded sum on top of another. In fp32 it is exact up to the last bit; in bf16 small
deltas are partly rounded away, so the loss is measured and reported. `branch` keeps W_0 and adds
one concatenated low-rank product beside it: exact in both, at a cost that grows with rank x tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn.functional import linear

from accrete.pipeline.distributed.engine import Engine
from accrete.pipeline.models.lora import AdaptedLayer, AdaptedModel, Factors

Merge = Literal["exact", "factor_sum"]


class Past:
    """The finished tasks' factors and their place in the forward."""

    def __init__(
        self,
        adapted: AdaptedModel,
        engine: Engine,
        mode: Literal["fold", "branch"],
        merge: Merge = "exact",
    ) -> None:
        self.mode = mode
        self.merge = merge
        self.stages: list[Factors] = []
        self._scales: list[dict[str, float]] = []
        self._adapted = adapted
        self._engine = engine
        self._original: dict[str, torch.Tensor] = {}
        self._branches: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if mode == "branch":
            for layer in adapted.layers.values():
                layer.module.register_forward_hook(self._add_branch(layer.name))

    def add(self, factors: Factors, scales: Mapping[str, float] | None = None) -> float:
        """Let a finished task's factors join the forward.

        Args:
            factors: (A, B) of every layer, the same on every rank; kept on the CPU in fp32.
            scales: s of every layer as the task was trained with it, which a branch to another
                method must not change; None: that of the layers now.

        Returns:
            ||(W - W_0) - V|| / ||V|| over all layers: what rounding took away. 0 for `branch`.

        Collective: yes (at ZeRO 3, in `fold` mode).
        """
        self.stages.append({k: (a.float().cpu(), b.float().cpu()) for k, (a, b) in factors.items()})
        now = {layer.name: layer.scale for layer in self._adapted.layers.values()}
        self._scales.append({**now, **(scales or {})})
        error = norm = 0.0
        for layer in self._adapted.layers.values():
            if self.mode == "branch":
                self._branches[layer.name] = self.combined(layer)
                continue
            layer_error, layer_norm = self._fold(layer)
            error, norm = error + layer_error, norm + layer_norm
        return (error / norm) ** 0.5 if norm else 0.0

    def combined(self, layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, d_in] and s B [d_out, R] whose product is V."""
        pairs = [
            (stage[layer.name][0], scales[layer.name] * stage[layer.name][1])
            for stage, scales in zip(self.stages, self._scales, strict=True)
        ]
        device = self._engine.device
        if self.merge == "factor_sum":
            a = torch.stack([a for a, _ in pairs]).sum(0)
            b = torch.stack([b for _, b in pairs]).sum(0)
        else:
            a = torch.cat([a for a, _ in pairs])
            b = torch.cat([b for _, b in pairs], dim=1)
        return a.to(device), b.to(device)

    def delta(self, layer: AdaptedLayer) -> torch.Tensor:
        """V [d_out, d_in] of one layer in fp32."""
        a, b = self.combined(layer)
        return b @ a

    def original(self, layer: AdaptedLayer) -> torch.Tensor:
        """W_0 [d_out, d_in] of one layer in fp32, a copy. Collective: yes (at ZeRO 3)."""
        if layer.name in self._original:
            kept = self._original[layer.name]
            return kept.to(self._engine.device, torch.float32, copy=True)
        with self._engine.gathered([layer.weight]):
            return layer.weight.detach().float().clone()

    @contextmanager
    def subtracted(self) -> Iterator[None]:
        """The model of W_0 - V instead of W_0 + V, for forwards inside the context.

        A branch of -2 V stands beside every layer, in both modes: W_0 + V - 2 V. No weight is
        touched, so none has to be put back. Collective: no.
        """
        handles = []
        for layer in self._adapted.layers.values() if self.stages else ():
            handles.append(layer.module.register_forward_hook(_subtract(*self.combined(layer))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def subtracted_weight(self, layer: AdaptedLayer) -> torch.Tensor:
        """W_0 - V [d_out, d_in] of one layer in fp32, from what the layer holds now.

        After folding that is W_merged - 2 V, not W_merged - V. Collective: yes (at ZeRO 3).
        """
        with self._engine.gathered([layer.weight]):
            weight = layer.weight.detach().float().clone()
        if not self.stages:
            return weight
        return weight.sub_(self.delta(layer), alpha=2.0 if self.mode == "fold" else 1.0)

    def _fold(self, layer: AdaptedLayer) -> tuple[float, float]:
        """Write W_0 + V into W; squared rounding error and squared norm of V."""
        with self._engine.gathered([layer.weight], write=True):
            weight = layer.weight.data
            if layer.name not in self._original:
                self._original[layer.name] = weight.detach().cpu().clone()
            original = self._original[layer.name].to(weight.device).float()
            delta = self.delta(layer)
            weight.copy_(original + delta)
            lost = (weight.float() - original) - delta
            return float(lost.square().sum()), float(delta.square().sum())

    def _add_branch(self, name: str) -> Any:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            if name not in self._branches:
                return output
            a, b = self._branches[name]
            delta = linear(linear(arguments[0].to(a.dtype), a), b)
            return output + delta.to(output.dtype)

        return hook


def _subtract(a: torch.Tensor, b: torch.Tensor) -> Any:
    """A hook that takes 2 V x from a layer's output."""

    def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        delta = linear(linear(arguments[0].to(a.dtype), a), b)
        return output - (2.0 * delta).to(output.dtype)

    return hook


def choose_mode(asked: str, dtype: torch.dtype) -> Literal["fold", "branch"]:
    """`auto` folds an fp32 base and keeps a branch beside a bf16 one."""
    if asked == "auto":
        return "fold" if dtype == torch.float32 else "branch"
    return "fold" if asked == "fold" else "branch"
