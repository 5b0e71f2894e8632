"""The face of a training engine: everything a loop or a method may do to sharded parameters.

Two implementations: `plain.PlainEngine` (one process) and `zero.ZeroEngine` (DeepSpeed ZeRO 0 to
3). Both own the gap between backward and step, which Accelerate's ordinary loop closes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What the optimizer needs; the learning rate is given at every step."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimizer over `parameters`, at learning rate 0."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.0, weight_decay=self.weight_decay)
        return torch.optim.AdamW(
            parameters, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of all whole gradients that are there, as one vector."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


class Engine(Protocol):
    """A model, its optimizer and its shards. `names` are the trainable parameters, in order."""

    rank: int
    world: int
    device: torch.device
    accumulation: int
    module: nn.Module
    parameters: dict[str, nn.Parameter]

    def forward(self, **inputs: Any) -> Any:
        """Run the model. Collective: at ZeRO 3."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of one micro-batch; `last` ends the step. The loss is divided by the
        accumulation count, gradients are averaged over ranks. Collective: yes.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, move the weights, drop the gradients; returns the gradient's norm before clipping.
        Where that is not finite no weight has moved. Collective: yes.
        """
        ...

    def aside(self) -> AbstractContextManager[None]:
        """For forwards without gradients between a forward and its backward, which that backward
        must not notice. Collective: no.
        """
        ...

    def watch(self) -> None:
        """Make `peek` available from the next forward on."""
        ...

    def peek(self, name: str) -> torch.Tensor:
        """A parameter as the last forward used it, whole, fp32, read-only; zeros, at ZeRO 3, where
        it did not. Collective: no.
        """
        ...

    def value(self, name: str) -> torch.Tensor:
        """A parameter's fp32 master value, whole. Collective: yes."""
        ...

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter, master and copy; every rank passes the same tensor. Collective: no."""
        ...

    def gradient(self, name: str) -> torch.Tensor:
        """In the gap: the reduced gradient, whole. Collective: yes."""
        ...

    def write_gradient(self, name: str, value: torch.Tensor) -> None:
        """In the gap: replace the reduced gradient; every rank passes the same tensor."""
        ...

    def moment(self, name: str, key: str) -> torch.Tensor:
        """AdamW's `exp_avg` or `exp_avg_sq` of a parameter, whole. Collective: yes."""
        ...

    def write_moment(self, name: str, key: str, value: torch.Tensor) -> None:
        """Set a moment; every rank passes the same tensor. Collective: no."""
        ...

    @property
    def optimizer_step(self) -> int:
        """Steps that AdamW has counted since the last reset."""
        ...

    def write_optimizer_step(self, step: int) -> None:
        """Set AdamW's step count."""
        ...

    def reset_optimizer(self) -> None:
        """Forget moments and step count, as a new optimizer would start."""
        ...

    def gathered(
        self, parameters: Iterable[nn.Parameter], write: bool = False
    ) -> AbstractContextManager[None]:
        """Frozen parameters whole inside the context; with `write`, what every rank puts there
        stays. Collective: yes.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
