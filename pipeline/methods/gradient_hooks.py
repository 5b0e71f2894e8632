"""Add closed-form gradients to a backward pass, without any traffic of their own.

A tensor hook sees a parameter's gradient on its way into the reduction, at every ZeRO stage. What
it adds is averaged over ranks with the rest: a part that is one of `world` summands goes in
multiplied by `world`, something that every rank computes alike goes in as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accrete.pipeline.distributed.engine import Engine


class GradientHooks:
    """Hooks on some parameters, what they add in this step, and what passed through them."""

    def __init__(self) -> None:
        self.added: dict[str, torch.Tensor] = {}
        """Parameter -> what the next backward adds to its gradient. Filled before the last backward
        of a step, emptied by `forget`."""
        self._passed: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, engine: Engine, names: Iterable[str]) -> None:
        """Hook these parameters, in place of whatever was hooked before."""
        self.detach()
        for name in names:
            parameter = engine.parameters[name]
            handle = parameter.register_hook(self._edit(name))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    @property
    def attached(self) -> bool:
        """Whether anything is hooked."""
        return bool(self._handles)

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """A new step: nothing is added, nothing has passed."""
        self.added.clear()
        self._passed.clear()

    def norms(self) -> dict[str, torch.Tensor]:
        """`penalty_norm` and `task_norm` of the step, for `Method.step_sums`."""
        return {"penalty_norm": _norm(self.added), "task_norm": _norm(self._passed)}

    def _edit(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            before = self._passed.get(name)
            self._passed[name] = gradient.detach() if before is None else before + gradient
            added = self.added.get(name)
            return gradient if added is None else gradient + added

        return hook


def _norm(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = torch.stack(torch._foreach_norm(list(tensors.values()))).norm()
    return total
