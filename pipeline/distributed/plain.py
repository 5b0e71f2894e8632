"""One process, PyTorch only: the reference that every sharded engine is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from accrete.pipeline.distributed.engine import MOMENTS, OptimizerSettings, gradient_norm


class PlainEngine:
    """The `Engine` protocol without any sharding. No method is a collective."""

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        settings: OptimizerSettings,
        *,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.rank, self.world = 0, 1
        self.device = device
        self.accumulation = accumulation
        self.module = module.to(device)
        self.parameters = parameters
        self._max_grad_norm = settings.max_grad_norm
        self._optimizer = settings.build(list(parameters.values()))
        self._has_moments = settings.optimizer == "adamw"

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Backward of one micro-batch."""
        (loss / self.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> float:
        """Clip, move the weights, drop the gradients; if they are not finite, nothing moves."""
        norm = gradient_norm(self.parameters.values())
        for parameter in self.parameters.values():
            if parameter.grad is None:  # unused in this step: ZeRO's optimizers see zeros as well
                parameter.grad = torch.zeros_like(parameter)
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            return norm
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.parameters.values()), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def aside(self) -> AbstractContextManager[None]:
        """Nothing is kept for a backward beside the graph."""
        return nullcontext()

    def watch(self) -> None:
        """Nothing to prepare: parameters are always whole."""

    def peek(self, name: str) -> torch.Tensor:
        """A parameter as the last forward used it."""
        return self.parameters[name].detach()

    def value(self, name: str) -> torch.Tensor:
        """A copy of a parameter."""
        return self.parameters[name].detach().clone()

    def write(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter."""
        self.parameters[name].data.copy_(value)

    def gradient(self, name: str) -> torch.Tensor:
        """A copy of the gradient."""
        gradient = self.parameters[name].grad
        return torch.zeros_like(self.parameters[name]) if gradient is None else gradient.clone()

    def write_gradient(self, name: str, value: torch.Tensor) -> None:
        """Replace the gradient."""
        self.parameters[name].grad = value.clone()

    def moment(self, name: str, key: str) -> torch.Tensor:
        """A copy of one moment; zeros before the first step."""
        parameter = self.parameters[name]
        state: dict[str, torch.Tensor] = self._optimizer.state.get(parameter, {})
        return state[key].clone() if key in state else torch.zeros_like(parameter.data)

    def write_moment(self, name: str, key: str, value: torch.Tensor) -> None:
        """Set one moment."""
        if self._has_moments:
            self._state(name)[key].copy_(value)

    @property
    def optimizer_step(self) -> int:
        """Steps counted since the last reset."""
        steps = {int(s["step"]) for s in self._optimizer.state.values() if "step" in s}
        return max(steps, default=0)

    def write_optimizer_step(self, step: int) -> None:
        """Set the step count."""
        if self._has_moments:
            for name in self.parameters:
                self._state(name)["step"].fill_(step)

    def reset_optimizer(self) -> None:
        """Forget all optimizer state."""
        self._optimizer.state.clear()

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        parameter = self.parameters[name]
        state: dict[str, torch.Tensor] = self._optimizer.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state.update({key: torch.zeros_like(parameter.data) for key in MOMENTS})
        return state

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
        """Parameters are always whole here."""
        yield

    def close(self) -> None:
        """Nothing is held beside the module."""
