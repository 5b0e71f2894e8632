"""The model without an adapter: its own weights are trained, in fp32.

Same face as `lora.AdaptedModel`, so that the loop, the statistics and the checkpoints need not know
which of the two they have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from accrete.pipeline.errors import ConfigError, ModelError
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

    def __init__(self, base: nn.Module, which: Literal["all", "linear"] = "all") -> None:
        """Take a loaded model.

        Args:
            base: A transformers model, in fp32.
            which: `all` its weights, or those of the linear layers of its blocks alone.

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


def trained_precision(config: ModelConfig, method: type[Method]) -> ModelConfig:
    """The model's settings with the precision that a method needs: trained weights are fp32.

    Raises:
        ConfigError: The recipe asks for trained weights in bf16.
    """
    if method.trains == "factors":
        return config
    if config.dtype == "bf16":
        kind = method.Config.__dataclass_fields__["kind"].default
        raise ConfigError(
            f"model.dtype: given: bf16; allowed with method.kind={kind}, which "
            "trains the model's own weights: fp32 or auto. AdamW's small steps would be rounded "
            "away in bf16 weights. Remove model.dtype, or take a method with an adapter."
        )
    return replace(config, dtype="fp32")
