"""Load a Hugging Face encoder-decoder or decoder as a frozen base."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DROPOUTS = (
    "dropout_rate",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "emb_pdrop",
    "attn_pdrop",
    "resid_dropout",
    "residual_dropout",
    "embed_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "moe_token_dropout",
    "dropout_p",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "local_attention_probs_dropout_prob",
    "lsh_attention_probs_dropout_prob",
)
"""What model families call the dropout that `model.dropout` sets."""
LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Whole blocks left out at random: never here, as ranks would leave out different ones."""


@dataclass(frozen=True)
class ModelFacts:
    """What collating and scoring need to know about a model."""

    seq2seq: bool
    pad_id: int
    eos_id: int
    decoder_start_id: int | None
    unknown_inputs: frozenset[str] = frozenset()
    """Inputs that other models take and this one's forward does not."""


def unknown_inputs(base: nn.Module) -> frozenset[str]:
    """Which of the optional inputs that accrete passes a model's forward does not know."""
    known = inspect.signature(base.forward).parameters
    return frozenset({"position_ids", "logits_to_keep"} - known.keys())


def read_config(path: str | Path, revision: str | None = None) -> Any:
    """A model's own configuration.

    Raises:
        ModelError: It is missing, or transformers does not take it.
    """
    from transformers import AutoConfig

    try:
        # Without a word about remote code transformers would ask on the terminal.
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # not found, not JSON, a field of a wrong type: no common base class
        raise ModelError(
            f"model.path {path}: its configuration cannot be read ({type(error).__name__}: "
            f"{error}). Give a folder with a config.json that transformers takes, or a hub id; "
            "accrete runs no code that comes with a model."
        ) from error


def read_facts(path: str | Path, tokenizer: Any, revision: str | None = None) -> ModelFacts:
    """Read `ModelFacts` from a model's configuration and its tokenizer.

    Args:
        path: Model folder or hub id.
        tokenizer: Its tokenizer.
        revision: Hub revision.

    Raises:
        ModelError: The tokenizer has no end token, the encoder-decoder no start token, or the
            configuration cannot be read.
    """
    config = read_config(path, revision)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"The tokenizer of {path} has no end-of-sequence token; accrete needs one."
        )
    pad = tokenizer.pad_token_id
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if pad is None or (size is not None and pad >= size):
        pad = eos  # never attended; a token that the model has no embedding for ends in an error
    seq2seq = bool(config.is_encoder_decoder)
    start = getattr(config, "decoder_start_token_id", None) if seq2seq else None
    if seq2seq and start is None:
        # T5Gemma says it in its decoder's part alone.
        start = getattr(getattr(config, "decoder", None), "bos_token_id", None)
    if seq2seq and start is None:
        raise ModelError(f"{path}/config.json has no decoder_start_token_id; add it.")
    return ModelFacts(seq2seq, int(pad), int(eos), start)


def base_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of the frozen base: bf16 on a GPU and fp32 on a CPU unless the recipe says."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bf16" else torch.float32


def set_dropout(settings: PreTrainedConfig, dropout: float) -> None:
    """Set a model's dropout, whatever its family calls it, in all parts of its configuration.

    Raises:
        ModelError: The family cannot have this dropout.
    """
    wanted = dict.fromkeys(DROPOUTS, dropout) | dict.fromkeys(LAYER_DROPS, 0.0)
    for name, value in wanted.items():
        given = getattr(settings, name, None)
        if isinstance(given, (int, float)) and given != value:
            try:
                setattr(settings, name, value)
            except StrictDataclassError as error:
                raise ModelError(
                    f"model.dropout {dropout}: {type(settings).__name__}.{name} is {given} and "
                    f"cannot be set ({error}). Use {given}."
                ) from error
    for name in settings.sub_configs:
        part = getattr(settings, name, None)
        if part is not None:
            set_dropout(part, dropout)


def load_base(path: str | Path, config: ModelConfig, device: torch.device) -> nn.Module:
    """Load the base model, frozen, on the CPU; the engine moves it.

    Args:
        path: Model folder or hub id, as `materialize` returned it.
        config: Precision, attention, dropout, gradient checkpointing.
        device: Where the run began (decides `dtype: auto`).

    Raises:
        ModelError: The folder or the architecture cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings = read_config(path, config.revision)
    try:
        set_dropout(settings, config.dropout)
        family = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
        attention = config.attention if _has_sdpa(settings) else "eager"
        model = family.from_pretrained(
            path,
            config=settings,
            revision=config.revision,
            dtype=base_dtype(config, device),
            attn_implementation=attention,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path {path} could not be loaded: {error}") from error
    model.requires_grad_(False)
    keep_no_cache(model)
    _silence_generation_defaults(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module: nn.Module = model
    return module


def keep_no_cache(model: nn.Module) -> None:
    """No keys and values are kept where nothing is decoded; a T5's decoder has its own config."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _has_sdpa(settings: Any) -> bool:
    """Whether transformers offers scaled-dot-product attention for this architecture."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    families = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
    cls = families._model_mapping.get(type(settings), None)
    return bool(getattr(cls, "_supports_sdpa", False))


def _silence_generation_defaults(model: Any) -> None:
    """Make `generate` greedy and nothing else: what a checkpoint wants sampled, forbidden or forced
    (BART forces a first token and forbids repetitions) must not reach the scores.
    """
    from transformers import GenerationConfig

    kept = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in kept})
