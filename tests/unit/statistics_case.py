"""Stages of toy models for the passes of `statistics`, with any layers adapted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.models.config import AdapterConfig
from accrete.pipeline.models.lora import AdaptedModel, initial_factors
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
LINEAR = {
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def tiny_opt(dropout=0.0):
    """It flattens rows and tokens before fc1 and fc2, and its blocks drop out by themselves."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(7)
    config = OPTConfig(
        vocab_size=toys.VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        dropout=dropout,
        pad_token_id=toys.PAD,
        bos_token_id=toys.BOS,
        eos_token_id=toys.EOS,
    )
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which start at zero
            nn.init.normal_(parameter, std=0.1)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def tiny_base(kind, dropout=0.0):
    if kind == "opt":
        return tiny_opt(dropout)
    base = toys.base_model(kind)
    if base.config.tie_word_embeddings:  # an adapted head needs a weight of its own
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone(), False)
        base.config.tie_word_embeddings = False
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return base


def make_parts(folder, model, base=None, targets=None, **params):
    """Parts of a run on one process; all linear layers of the blocks are adapted."""

    def attach(module, config, scales=None):
        return AdaptedModel(module, AdapterConfig(rank=5, targets=targets or LINEAR[model]), scales)

    base = tiny_base(model) if base is None else base
    given = {"zero": None, "micro": 8, "method": "ewc_lora", **params}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "AdaptedModel", attach)
        patch.setattr(toys, "base_model", lambda kind: base)
        return toys.make_parts(ALONE, folder, model=model, **given)


def make_stage(folder, model, **params):
    """The first stage of such a run, with factors that are not zero."""
    stage = StageRunner(make_parts(folder, model, **params))._stage(0)
    draw = torch.Generator().manual_seed(0)
    factors = initial_factors(stage.adapted, 0, 0) if params.get("method") != "ewc" else {}
    if factors:
        stage.write_factors(
            {k: (a, 0.1 * torch.randn(b.shape, generator=draw)) for k, (a, b) in factors.items()}
        )
    return stage


def dense_gradients(stage, visit_gradients, **settings):
    """Layer -> sum over rows of the dense gradient, from what a pass shows."""
    seen = dict.fromkeys(stage.adapted.layers, 0.0)

    def visit(layer, x, g):
        seen[layer.name] += torch.einsum("nto,nti->oi", g.double(), x.double())

    visit_gradients(stage, visit, **settings)
    return seen
