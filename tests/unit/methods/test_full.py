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
from accrete.pipeline.data.collate import Collator
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.errors import MethodError, ModelError
from accrete.pipeline.methods.ewc import Ewc
from accrete.pipeline.methods.full import Full
from accrete.pipeline.methods.gpm import Gpm
from accrete.pipeline.methods.sequential import Sequential
from accrete.pipeline.models.config import ModelConfig
from accrete.pipeline.models.full import FullModel, kept_precision
from accrete.pipeline.stage import aligned_logits, row_losses
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


def test_trained_weights_are_kept_in_fp32():
    half = ModelConfig(builder="tiny_t5", dtype="bf16")
    for method in (Full, Ewc, Gpm):
        assert kept_precision(half, method).dtype == "fp32"
    assert kept_precision(half, Sequential) is half
    with pytest.raises(ModelError, match="bfloat16"):
        FullModel(toys.base_model("llama").to(torch.bfloat16))


def collator(kind):
    return Collator(kind == "t5", toys.PAD, toys.facts(kind).decoder_start_id, toys.EOS)


def batch_of(kind):
    rows = toys.ToyRows(0, 4, 4).rows(0, 0, 1)
    return collator(kind).train(rows, len(rows))


def in_low(values):
    return torch.equal(values, values.bfloat16().float())


def outputs_of(layers):
    """Dtypes that linear layers give, filled by the forwards that follow."""
    found = set()
    for layer in layers:
        layer.module.register_forward_hook(lambda _m, _x, output: found.add(output.dtype))
    return found


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_bf16_is_for_products_alone(kind):
    """What is multiplied is cast; weights, gradients and logits are fp32."""
    gradients, logits = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        adapted = FullModel(toys.base_model(kind), arithmetic=dtype)
        weights = adapted.parameters()
        layer = list(adapted.layers.values())[-1]
        seen = []
        layer.module.register_forward_hook(lambda _m, x, y, seen=seen: seen.append((x[0], y)))
        found = outputs_of(adapted.layers.values())
        batch = batch_of(kind)
        logits[dtype] = aligned_logits(adapted.module, batch, kind == "t5")
        row_losses(logits[dtype], batch.labels).sum().backward()
        gradients[dtype] = {name: value.grad for name, value in weights.items()}
        assert {w.dtype for w in weights.values()} == {torch.float32}
        assert {g.dtype for g in gradients[dtype].values()} == {torch.float32}
        assert found == {dtype}
        (x, y) = seen[0]
        assert torch.equal(y, x.to(dtype) @ layer.weight.to(dtype).T)
        products = [gradients[dtype][full.parameter] for full in adapted.layers.values()]
        assert all(in_low(g) for g in products) is (dtype == torch.bfloat16)
    low, full = torch.bfloat16, torch.float32
    assert logits[low].dtype == torch.float32
    assert 0 < (logits[low] - logits[full]).norm() / logits[full].norm() < 0.02
    for name, gradient in gradients[full].items():
        assert (gradients[low][name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name


def test_small_steps_are_kept_with_bf16_products(tmp_path):
    got = cases.sequence(ALONE, tmp_path, model="llama", dtype="bf16", **PLAIN)
    assert got["dtypes"] == ["torch.float32"]
    moved = [value for name, value in got.items() if name.endswith("proj.weight/W")]
    assert moved
    assert not any(in_low(value) for value in moved)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_are_decoded_with_bf16_products_throughout(kind, keep):
    """Also in a T5's encoder, which `generate` calls beside the model's forward."""
    adapted = FullModel(toys.base_model(kind), arithmetic=torch.bfloat16)
    prompts = collator(kind).prompts(toys.ToyRows(0, 4, 4).rows(0, 0, 1)).inputs
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    found = outputs_of(adapted.layers.values())
    with torch.no_grad(), adapted.decoding(keep_casts=keep):
        low = adapted.module.generate(**prompts, **settings)
    assert found == {torch.bfloat16}
    found.clear()
    with torch.no_grad():  # Control: without it the forward alone casts.
        adapted.module.generate(**prompts, **settings)
    assert (torch.float32 in found) is (kind == "t5")
    again = FullModel(toys.base_model(kind), arithmetic=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, again.module.generate(**prompts, **settings))


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
