"""What a recipe says about the model and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model: exactly one of `path` and `builder` is given."""

    path: str | None = None
    """Hub id or folder of a Hugging Face model (encoder-decoder or decoder)."""
    builder: Literal["tiny_t5", "tiny_llama", "small_t5"] | None = None
    """A model that accrete makes itself, once, and keeps in its cache."""
    builder_data: str | None = None
    """`small_t5` only: folder of real rows (compact format) to learn vocabulary and words from;
    default: `data.root`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `path`, for checkpoints in that format."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the model's own."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the base: auto is bf16 on a GPU and fp32 on a CPU, decided when the run first
    starts. Factors are fp32. Weights that a method trains are, too: bf16 casts them for products.
    """
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation, as transformers names it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the base model; 0 keeps results independent of the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """LoRA: delta W = (alpha / rank) B A."""

    rank: Annotated[int, Field(ge=1)] = 8
    """Rank r of one task's factors."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale: the branch is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the LoRA branch during training."""
    targets: str | list[str] = "qv"
    """`qv` (query and value projections), `all_linear`, or a list of module names."""
    past: Literal["auto", "fold", "branch"] = "auto"
    """How finished tasks enter the forward: `fold`ed into the base weights or as one concatenated
    low-rank `branch` beside them; auto folds an fp32 base and keeps a branch for a bf16 one."""
    lines: Annotated[float, Field(ge=0, le=1)] | None = None
    """LiNeS: when a task ends, its update is scaled by a + (1 - a) l / (n - 1) in block l of the n
    in a stack, with a = `lines`: shallow blocks, which tasks share, keep less of it. Search a in
    0, 0.1, ... 1 on dev rows; null: no scaling. Only for methods whose tasks have an adapter each.
    """
