"""Attach peft's LoRA and name its factors.

Shapes: a layer's W is [d_out, d_in], A is [r, d_in], B is [d_out, r] and delta W = s B A with
s = alpha / rank (specs of peft; A and B are swapped in some papers).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.run_dir import sync_folder

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer name -> (A [r, d_in], B [d_out, r])."""

ADAPTER = "default"
ADAPTER_FILE = "adapter_model.safetensors"
SCALE_FILE = "adapter_config.json"
"""Beside the factors: peft's settings, with the scale of every layer."""
PREFIX = "base_model.model."
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
QV_NAMES = (("q", "v"), ("q_proj", "v_proj"), ("query", "value"), ("query_key_value",))


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer with its LoRA branch."""

    name: str
    module: Any
    scale: float

    @property
    def weight(self) -> nn.Parameter:
        """The frozen W [d_out, d_in]."""
        weight: nn.Parameter = self.module.base_layer.weight
        return weight

    @property
    def a(self) -> str:
        """Parameter name of A."""
        return f"{self.name}.lora_A"

    @property
    def b(self) -> str:
        """Parameter name of B."""
        return f"{self.name}.lora_B"


class AdaptedModel:
    """A frozen base with one live LoRA adapter."""

    def __init__(
        self,
        base: nn.Module,
        config: AdapterConfig,
        layer_scales: Callable[[list[str]], dict[str, float]] | None = None,
        revision: str | None = None,
    ) -> None:
        """Attach the adapter.

        Args:
            base: A transformers model.
            config: Rank, scale and targets.
            layer_scales: From the adapted layers' names, in the model's order, to what each one's
                scale is multiplied by; layers left out keep theirs. See `Method.layer_scales`.
            revision: The base's revision on the hub, for who loads a saved adapter.

        Raises:
            ModelError: A target fits no layer, no nn.Linear, or one whose weight is used elsewhere
                too.
        """
        from peft import LoraConfig, get_peft_model

        targets = _targets(base, config)
        self.peft_config = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=targets,
            bias="none",
            revision=revision,
            task_type="SEQ_2_SEQ_LM" if _config_of(base).is_encoder_decoder else "CAUSAL_LM",
        )
        try:
            self.module: nn.Module = get_peft_model(base, self.peft_config)  # type: ignore[arg-type]
        except ValueError as error:
            raise ModelError(
                f"adapter.targets {config.targets!r} fits no layer of {type(base).__name__}: "
                f"{error}"
            ) from error
        self.base = base
        self.layers = _find_layers(self.module)
        _require_own_weights(self.module, self.layers)
        if layer_scales is not None:
            self._scale_layers(layer_scales(list(self.layers)), config)

    def _scale_layers(self, scales: dict[str, float], config: AdapterConfig) -> None:
        """Multiply the branches, in peft's own terms, so that a saved adapter says it too."""
        pattern: dict[str, float] = {}
        for name, scale in scales.items():
            module, alpha = self.layers[name].module, config.alpha * scale
            module.lora_alpha[ADAPTER] = alpha
            module.scaling[ADAPTER] = alpha / config.rank
            pattern[re.escape(name)] = alpha
        self.peft_config.alpha_pattern = pattern
        self.layers = _find_layers(self.module)

    def decoding(self, keep_casts: bool) -> AbstractContextManager[None]:
        """What answers are generated in.

        Args:
            keep_casts: Weights that are cast for products may stay cast to its end, as a second
                copy: not where a rank holds a part of the model only (ZeRO 3).
        """
        return nullcontext()

    def parameters(self, a: bool = True, b: bool = True) -> dict[str, nn.Parameter]:
        """The trainable factors by name; factors left out are frozen."""
        chosen: dict[str, nn.Parameter] = {}
        for layer in self.layers.values():
            for name, parameter, wanted in (
                (layer.a, layer.module.lora_A[ADAPTER].weight, a),
                (layer.b, layer.module.lora_B[ADAPTER].weight, b),
            ):
                parameter.requires_grad_(wanted)
                if wanted:
                    chosen[name] = parameter
        return chosen

    def carried(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds, by name: the factors, trained or frozen."""
        found: dict[str, nn.Parameter] = {}
        for layer in self.layers.values():
            found[layer.a] = layer.module.lora_A[ADAPTER].weight
            found[layer.b] = layer.module.lora_B[ADAPTER].weight
        return found

    def merged(self) -> nn.Module:
        """An ordinary model with the live adapter inside its weights; this one is used up."""
        model: nn.Module = self.module.merge_and_unload()  # type: ignore[operator]
        return model


def _config_of(base: nn.Module) -> Any:
    """The Hugging Face configuration of a model."""
    return base.config


def _targets(base: nn.Module, config: AdapterConfig) -> str | list[str]:
    if isinstance(config.targets, list):
        return _fitting(base, config.targets)
    if config.targets == "all_linear":
        return "all-linear"
    if config.targets != "qv":
        return _fitting(base, [config.targets])
    leaves = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
    for names in QV_NAMES:
        if leaves.issuperset(names):
            return list(names)
    raise ModelError(
        f"adapter.targets=qv: {type(base).__name__} has no query and value projections that "
        "accrete knows. Name the layers with adapter.targets=[...]; this model has "
        f"{', '.join(sorted(leaves)[:40])}."
    )


def _fitting(base: nn.Module, targets: list[str]) -> list[str]:
    """The targets, each of which must fit: peft is content if one of them does.

    Their blocks may be others: a forecast builds a few of a model's blocks.
    """
    names = {_NUMBER.sub("0", f".{name}") for name, _ in base.named_modules()}
    ends = {target: _NUMBER.sub("0", f".{target}") for target in targets}
    wrong = [t for t, end in ends.items() if not any(name.endswith(end) for name in names)]
    if wrong:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
        }
        raise ModelError(
            f"adapter.targets: {', '.join(map(repr, wrong))} fits no layer of "
            f"{type(base).__name__}. Correct it or leave it out; the linear layers of this model "
            f"are called {', '.join(sorted(linear)[:40])}."
        )
    return targets


def _find_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    from peft.tuners.lora import LoraLayer

    layers: dict[str, AdaptedLayer] = {}
    for name, candidate in module.named_modules():
        if isinstance(candidate, LoraLayer):
            short = name.removeprefix(PREFIX)
            if not isinstance(candidate.base_layer, nn.Linear):
                raise ModelError(
                    f"adapter.targets: {short} is a {type(candidate.base_layer).__name__}; allowed "
                    "are nn.Linear layers. Name such layers, or choose another model."
                )
            layers[short] = AdaptedLayer(short, candidate, float(candidate.scaling[ADAPTER]))
    return layers


def _require_own_weights(module: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """No adapted weight may be used elsewhere, where its update would come in as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.removeprefix(PREFIX))
    for layer in layers.values():
        shared = [name for name in names[id(layer.weight)] if not name.startswith(f"{layer.name}.")]
        if shared:
            raise ModelError(
                f"adapter.targets: {layer.name} shares its weight with {', '.join(shared)} (tied "
                "embeddings), which an update of this layer alone would change as well. Leave it "
                "out of adapter.targets."
            )


def initial_factors(adapted: AdaptedModel, seed: int, stage: int) -> Factors:
    """Fresh factors of one stage: A uniform on +-1/sqrt(d_in), B zero.

    A layer's values depend on seed, stage and its name alone: not on ranks, device or sharding.

    Source: Kaiming-uniform with a = sqrt(5), as peft and the LoRA paper's code initialise A.
    """
    factors: Factors = {}
    for name, layer in adapted.layers.items():
        digest = hashlib.sha256(f"{seed}/{stage}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        linear = layer.module.base_layer
        rank = layer.module.r[ADAPTER]
        bound = 1.0 / math.sqrt(linear.in_features)
        a = (torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound
        factors[name] = (a, torch.zeros(linear.out_features, rank))
    return factors


def save_adapter(adapted: AdaptedModel, factors: Factors, model_path: str, folder: Path) -> None:
    """Write a peft folder (fp32) that `PeftModel.from_pretrained` loads.

    Every file takes its place whole; other files of the folder stay.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.float().cpu().contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    aside.mkdir()
    save_file(tensors, aside / ADAPTER_FILE, metadata={"format": "pt"})
    config = adapted.peft_config
    config.base_model_name_or_path = model_path
    training = config.inference_mode
    config.inference_mode = True
    config.save_pretrained(str(aside))
    config.inference_mode = training
    folder.mkdir(exist_ok=True)
    for file in aside.iterdir():
        # A checkpoint will name it by its checksum: it must not be younger on disk than that.
        with file.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(file, folder / file.name)
    aside.rmdir()
    sync_folder(folder)


def load_scales(folder: Path, layers: Iterable[str]) -> dict[str, float]:
    """The scale alpha / rank that layers have in a peft folder written by `save_adapter`."""
    config = json.loads((folder / SCALE_FILE).read_text(encoding="utf-8"))
    alphas: dict[str, float] = config["alpha_pattern"]
    return {
        name: alphas.get(re.escape(name), config["lora_alpha"]) / config["r"] for name in layers
    }


def load_factors(folder: Path) -> Factors:
    """Read the factors of a peft folder written by `save_adapter`."""
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_FILE)
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    return {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"])
        for name in sorted(names)
    }
