"""The model without an adapter: its own weights are trained, kept in fp32.

Same face as `lora.AdaptedModel`, so that the loop, the statistics and the checkpoints need not know
which of the two they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.lora import AdaptedLayer, AdaptedModel

if TYPE_CHECKING:
    from accrete.pipeline.methods.base import Method
    from accrete.pipeline.models.config import ModelConfig


@dataclass(frozen=True)
class FullLayer(AdaptedLayer):
    """One linear layer of the blocks, as it is: `module` is the nn.Linear, `scale` says nothing."""

    parameter: str = ""
    """Name of W among the engine's parameters."""

    @property
    def weight(self) -> nn.Parameter:
        """W [d_out, d_in]."""
        weight: nn.Parameter = self.module.weight
        return weight


class FullModel(AdaptedModel):
    """A model whose weights are trained; one that several modules share counts once."""

    def __init__(
        self,
        base: nn.Module,
        which: Literal["all", "linear"] = "all",
        arithmetic: torch.dtype = torch.float32,
        device_type: str = "cpu",
    ) -> None:
        """Take a loaded model.

        Args:
            base: A transformers model, in fp32.
            which: `all` its weights, or those of the linear layers of its blocks alone.
            arithmetic: Precision of the products with its weights. For bf16 its `forward` is
                wrapped: below DeepSpeed, which ends an autocast that surrounds its engine.
            device_type: Where it will run: `cpu` or `cuda`.

        Raises:
            ModelError: Its weights are not fp32, or `linear` finds no such layer.
        """
        self.module = base
        self.base = base
        head: Any = base.get_output_embeddings()  # type: ignore[operator]
        names = {id(parameter): name for name, parameter in base.named_parameters()}
        self.layers = {
            name: FullLayer(name, module, 1.0, names[id(module.weight)])
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self._which = which
        wrong = sorted({str(p.dtype) for p in base.parameters() if p.dtype != torch.float32})
        if wrong:
            raise ModelError(
                f"{type(base).__name__}: weights are trained in fp32, these are {', '.join(wrong)}."
            )
        if which == "linear" and not self.layers:
            raise ModelError(
                f"{type(base).__name__} has no nn.Linear layers besides its output head; this "
                "method trains those alone. Choose another method."
            )
        self._low = device_type if arithmetic == torch.bfloat16 else None
        if self._low is not None:
            _multiply_in_bf16(base, self._low)

    def decoding(self, keep_casts: bool) -> AbstractContextManager[None]:
        """See `AdaptedModel.decoding`."""
        return super().decoding(keep_casts) if self._low is None else _bf16(self._low, keep_casts)

    def parameters(self, a: bool = True, b: bool = True) -> dict[str, nn.Parameter]:
        """The trained weights by name; the others are frozen. `a` and `b` say nothing here."""
        wanted = {id(layer.weight) for layer in self.layers.values()}
        chosen: dict[str, nn.Parameter] = {}
        for name, parameter in self.carried().items():
            trained = self._which == "all" or id(parameter) in wanted
            parameter.requires_grad_(trained)
            if trained:
                chosen[name] = parameter
        return chosen

    def carried(self) -> dict[str, nn.Parameter]:
        """Every weight by name, trained or frozen: a checkpoint holds them all."""
        return dict(self.base.named_parameters())

    def merged(self) -> nn.Module:
        """The model itself."""
        return self.base


def full_layers(adapted: AdaptedModel) -> list[FullLayer]:
    """The linear layers of a model whose weights are trained."""
    return [layer for layer in adapted.layers.values() if isinstance(layer, FullLayer)]


def kept_precision(config: ModelConfig, method: type[Method]) -> ModelConfig:
    """The model's settings with the precision that its weights are kept in: fp32 where a method
    trains them, as bf16 would round AdamW's small steps away.
    """
    return config if method.trains == "factors" else replace(config, dtype="fp32")


def _multiply_in_bf16(base: nn.Module, device_type: str) -> None:
    forward = base.forward

    @wraps(forward)
    def low(*args: Any, **kwargs: Any) -> Any:
        with _bf16(device_type, keep_casts=False):
            return forward(*args, **kwargs)

    base.forward = low


@contextmanager
def _bf16(device_type: str, keep_casts: bool) -> Iterator[None]:
    """Cast weights for each product; `keep_casts` until the end of the context, if one follows
    another without a backward between.
    """
    if torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, torch.bfloat16, cache_enabled=keep_casts):
        yield
