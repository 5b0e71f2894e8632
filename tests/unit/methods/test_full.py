"""Full fine-tuning against a plain loop; what every method that trains weights rests on."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import cases
import toys

from accrete.pipeline import checkpoint
from accrete.pipeline.checkpoint import Position
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import ConfigError, MethodError, ModelError
from accrete.pipeline.methods.ewc import Ewc
from accrete.pipeline.methods.full import Full
from accrete.pipeline.methods.gpm import Gpm
from accrete.pipeline.methods.sequential import Sequential
from accrete.pipeline.models.config import ModelConfig
from accrete.pipeline.models.full import FullModel, trained_precision
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
PLAIN = {"zero": None, "micro": 8, "method": "full"}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_two_tasks_equal_a_plain_loop(tmp_path, kind):
    got = cases.sequence(ALONE, tmp_path, model=kind, **PLAIN)
    model = toys.base_model(kind)
    model.requires_grad_(True)
    settings = toys.make_config(None).train
    losses = []
    for task in (0, 1):
        rows = toys.ToyRows(task, 21, 8)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        for step in range(rows.steps_per_epoch):
            batch = rows.rows(step, 0, 1)
            tokens = sum(len(row.answer) for row in batch)
            loss = sum(toys.own_loss(model, row, kind) for row in batch) / tokens
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        for name, value in model.named_parameters():
            torch.testing.assert_close(got[f"{task}/{name}/W"], value, rtol=1e-4, atol=1e-5)
    assert got["losses"] == pytest.approx(losses, rel=1e-5)


def test_a_boundary_checkpoint_holds_the_whole_model_and_no_adapter_is_written(tmp_path):
    parts = toys.make_parts(ALONE, tmp_path, model="t5", **PLAIN)
    StageRunner(parts).run()
    parts.recorder.close()
    state = checkpoint.load(parts.run.path, Position(stage=0), "state")
    assert set(state) == {f"factor/{name}" for name, _ in parts.adapted.base.named_parameters()}
    assert not parts.run.stage(0).adapter.exists()
    again = toys.make_parts(ALONE, tmp_path, model="t5", **PLAIN)
    StageRunner(again).open_stage(0)
    live = dict(again.adapted.base.named_parameters())
    assert all(torch.equal(live[key.removeprefix("factor/")], v) for key, v in state.items())
    last = dict(parts.adapted.base.named_parameters())
    moved = [name for name, value in last.items() if not torch.equal(value, live[name])]
    assert len(moved) == len(last)


def test_shared_weights_count_once_and_the_head_is_no_layer():
    t5, llama = (FullModel(toys.base_model(kind)) for kind in ("t5", "llama"))
    names = set(t5.parameters())
    assert len([name for name in names if "shared" in name or "embed_tokens" in name]) == 1
    unique = {id(p): p.numel() for p in t5.base.parameters()}
    assert sum(p.numel() for p in t5.parameters().values()) == sum(unique.values())
    assert all(p.requires_grad for p in t5.base.parameters())
    assert "lm_head" not in llama.layers
    assert len(llama.layers) == 2 * 7
    assert all(layer.parameter == f"{name}.weight" for name, layer in llama.layers.items())
    linear = FullModel(toys.base_model("llama"), "linear")
    assert set(linear.parameters()) == {layer.parameter for layer in linear.layers.values()}
    frozen = [n for n, p in linear.base.named_parameters() if not p.requires_grad]
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= set(frozen)


def test_bf16_weights_are_refused():
    for method in (Full, Ewc, Gpm):
        with pytest.raises(ConfigError, match=r"model\.dtype.*bf16.*fp32 or auto"):
            trained_precision(ModelConfig(builder="tiny_t5", dtype="bf16"), method)
        assert trained_precision(ModelConfig(builder="tiny_t5"), method).dtype == "fp32"
    kept = ModelConfig(builder="tiny_t5", dtype="bf16")
    assert trained_precision(kept, Sequential) is kept
    with pytest.raises(ModelError, match="bfloat16"):
        FullModel(toys.base_model("llama").to(torch.bfloat16))


def test_a_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    assert not FullModel(model).layers
    with pytest.raises(ModelError, match=r"nn\.Linear"):
        FullModel(model, "linear")


@pytest.mark.parametrize("wrong", [{"fresh_adapter": True}, {"restarts": True}])
def test_weights_that_do_not_go_on_are_refused(tmp_path, wrong):
    parts = toys.make_parts(ALONE, tmp_path, model="llama", **PLAIN)
    parts.method = type("Odd", (Full,), wrong)(parts.config.method)
    with pytest.raises(MethodError, match="fresh_adapter = False"):
        StageRunner(parts)


def test_the_optimizer_starts_anew_but_the_weights_do_not(tmp_path):
    """The second task's first loss is that of the weights which the first one left."""
    parts = toys.make_parts(ALONE, tmp_path, model="llama", **PLAIN)
    runner = StageRunner(parts)
    runner._learn(0, None)
    assert parts.engine.optimizer_step == 0
    stage = runner._stage(1)
    rows = stage.global_batch(0)
    batch = next(stage.micro_batches(rows))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            stage.logits(batch).flatten(0, 1), batch.labels.flatten(), reduction="sum"
        )
    expected = float(losses) / sum(len(row.answer) for row in rows)
    runner._learn(1, None)
    parts.recorder.close()
    assert math.isclose(cases.losses(tmp_path)[3], expected, rel_tol=1e-6)
