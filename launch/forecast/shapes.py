"""The model of a recipe without weights: its configuration, its parameters, its adapted layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accrete.pipeline.errors import ModelError
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.models.full import FullModel, kept_precision
from accrete.pipeline.models.load import base_dtype, keep_no_cache, read_config, set_dropout
from accrete.pipeline.models.lora import AdaptedModel

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.methods.base import Method

PUBLISHED = Path(__file__).parent / "published"
"""Configurations of well-known models, so that a plan needs no download."""
DEPTHS = ("num_layers", "num_decoder_layers", "num_hidden_layers")
FP32 = 4


def read_settings(path: str, revision: str | None = None) -> Any:
    """A model's configuration: from its folder, from the published ones kept here, or the hub.

    Raises:
        ModelError: There is none at hand.
    """
    from transformers import AutoConfig

    published = PUBLISHED / f"{path.replace('/', '--').lower()}.json"
    if not Path(path).expanduser().exists() and published.is_file():
        raw = json.loads(published.read_text(encoding="utf-8"))
        return AutoConfig.for_model(raw.pop("model_type"), **raw)
    try:
        return read_config(path, revision)
    except ModelError as error:
        raise ModelError(
            f"{error} A plan needs no weights beside config.json: a folder that holds one will do."
        ) from error


def depth(settings: Any) -> tuple[int, ...]:
    """Blocks of every stack: (encoder, decoder), or one number."""
    if settings.is_encoder_decoder and hasattr(settings, "num_decoder_layers"):
        return int(settings.num_layers), int(settings.num_decoder_layers)
    return (int(settings.num_hidden_layers),)


def with_depth(settings: Any, blocks: tuple[int, ...]) -> Any:
    """The same configuration with other numbers of blocks."""
    changed = copy.deepcopy(settings)
    if len(blocks) == 2:
        changed.num_layers, changed.num_decoder_layers = blocks
        return changed
    changed.num_hidden_layers = blocks[0]
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(changed, name, None)
        if isinstance(kinds, list):
            setattr(changed, name, kinds[: blocks[0]])
    return changed


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer (or, where weights are trained, one linear layer)."""

    name: str
    rows: int
    """d_out."""
    columns: int
    """d_in."""


@dataclass(frozen=True)
class ModelPlan:
    """What builds the model of a recipe, whole or with fewer blocks, without its weights."""

    config: RunConfig
    settings: Any
    """The model's configuration (transformers)."""
    device: str
    """`cpu` or `cuda`: decides the precision of the base."""

    @classmethod
    def of(cls, config: RunConfig, path: str, device: str) -> ModelPlan:
        """Read the configuration of the model at `path`; see `read_settings` for `Raises`."""
        return cls(config, read_settings(path, config.model.revision), device)

    @cached_property
    def method(self) -> Method:
        """The recipe's method."""
        return method_class(self.config.method.kind)(self.config.method)

    @property
    def seq2seq(self) -> bool:
        """Encoder-decoder."""
        return bool(self.settings.is_encoder_decoder)

    @property
    def vocabulary(self) -> int:
        """Rows of the output head."""
        return int(self.settings.get_text_config().vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the base is kept in."""
        kept = kept_precision(self.config.model, type(self.method))
        return base_dtype(kept, torch.device(self.device))

    @property
    def arithmetic(self) -> torch.dtype:
        """Precision of the products with it."""
        return base_dtype(self.config.model, torch.device(self.device))

    def build(self, device: str = "meta", blocks: tuple[int, ...] | None = None) -> AdaptedModel:
        """The adapted model, frozen as in a run; on `meta` it has shapes and no memory.

        Args:
            device: Where its random weights are made.
            blocks: Blocks of every stack; default: all.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        settings = self.settings if blocks is None else with_depth(self.settings, blocks)
        settings = copy.deepcopy(settings)
        set_dropout(settings, self.config.model.dropout)
        family = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        with torch.device(device):
            try:
                base = family.from_config(
                    settings, dtype=self.dtype, attn_implementation=self.config.model.attention
                )
            except ValueError:  # not every architecture has every kind of attention
                base = family.from_config(settings, dtype=self.dtype, attn_implementation="eager")
            base.requires_grad_(False)
            keep_no_cache(base)
            if self.config.model.gradient_checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            adapted = (
                FullModel(
                    base,
                    self.method.weights,
                    self.arithmetic,
                    "cuda" if device.startswith("cuda") else "cpu",  # `meta` is traced as a CPU
                )
                if self.method.trains == "weights"
                else AdaptedModel(base, self.config.adapter, self.method.layer_scales)
            )
        adapted.parameters(self.method.trainable("A"), self.method.trainable("B"))
        return adapted

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The whole model on `meta`."""
        return self.build()

    @cached_property
    def trained(self) -> list[int]:
        """Elements of every trained parameter, in the engine's order."""
        method = self.method
        chosen = self.adapted.parameters(method.trainable("A"), method.trainable("B"))
        return [parameter.numel() for parameter in chosen.values()]

    @cached_property
    def frozen(self) -> list[tuple[int, int]]:
        """(elements, bytes of one) of every other parameter; shared ones count once."""
        return [
            (p.numel(), p.element_size())
            for p in self.adapted.module.parameters()
            if not p.requires_grad
        ]

    @property
    def whole_bytes(self) -> int:
        """All parameters in their precision, the adapter's included."""
        return FP32 * sum(self.trained) + sum(count * size for count, size in self.frozen)

    @cached_property
    def base_parameters(self) -> int:
        """Parameters of the model without an adapter."""
        factors = set() if self.method.trains == "weights" else set(_factors(self.adapted))
        return sum(p.numel() for p in self.adapted.module.parameters() if id(p) not in factors)

    @cached_property
    def layers(self) -> list[Layer]:
        """The adapted layers, in the model's order."""
        return [
            Layer(layer.name, layer.weight.shape[0], layer.weight.shape[1])
            for layer in self.adapted.layers.values()
        ]

    @property
    def factor_bytes(self) -> int:
        """A and B of all layers in fp32; 0 without an adapter."""
        if self.method.trains == "weights":
            return 0
        return FP32 * self.config.adapter.rank * sum(la.rows + la.columns for la in self.layers)


def _factors(adapted: AdaptedModel) -> Iterator[int]:
    for parameter in adapted.carried().values():
        yield id(parameter)
