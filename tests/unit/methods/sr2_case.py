"""What the tests of SR2-LoRA share: runs over shuffled rows and a row-by-row oracle."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

from toys import PAD, ToyRows, base_model, make_parts

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.models.lora import initial_factors, load_factors
from accrete.pipeline.stage_runner import StageRunner

MODELS = ("t5", "llama")
WIDTH = 32
SCALE = 2.0


class ShuffledRows(ToyRows):
    """Another order in every epoch, as real rows have."""

    def rows(self, step, rank, world):
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = random.Random(epoch).sample(self.all, len(self.all))
        start = batch * self.global_batch
        return order[start : start + self.global_batch][rank::world]


def parts_of(folder, kind="llama", micro=8, method="sr2_lora", **changes):
    return make_parts(
        Ranks(0, 1, torch.device("cpu")),
        folder,
        model=kind,
        zero=None,
        micro=micro,
        method=method,
        **{"tasks": 2, **changes},
    )


def second_stage(folder, kind="llama", shuffled=False, **changes):
    """The runner at the start of its second task, before any hook of that task."""
    parts = parts_of(folder, kind, **changes)
    if shuffled:
        parts.open_rows = lambda task, index: ShuffledRows(index, 21, 8)
    runner = StageRunner(parts)
    runner._learn(0, None)
    stage = runner._stage(1)
    stage.write_factors(initial_factors(parts.adapted, 3, 1))
    return parts.method, stage


def move(stage, size=0.3):
    """Give the live B some values."""
    g = torch.Generator().manual_seed(5)
    for name, parameter in stage.engine.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=g))


def term_of(method, stage, step=0):
    """The added loss of one step and its gradient by the engine's own rules."""
    stage.step = step
    method.before_step(stage)
    parameters = list(stage.engine.parameters.values())
    total, grads = 0.0, [torch.zeros_like(p) for p in parameters]
    for batch in stage.micro_batches(stage.global_batch(step)):
        terms = method.loss_terms(stage, batch, stage.logits(batch))
        assert list(terms) == ["relations"]
        loss = terms["relations"] / stage.engine.accumulation
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total += float(loss.detach())
        grads = [a + b for a, b in zip(grads, found, strict=True)]
    return total, torch.cat([g.flatten() for g in grads])


def trained(folder, **changes):
    parts = parts_of(folder, **changes)
    StageRunner(parts).run()
    factors = [load_factors(parts.run.stage(i).adapter) for i in range(len(parts.tasks))]
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return factors, [json.loads(line) for line in lines], parts


def same_factors(a, b):
    return all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for name in one
        for x, y in zip(one[name], two[name], strict=True)
    )


# -- an oracle: a plain model with dense weights, row by row, NumPy for the spectra ---------------


def dense_model(kind, original, *factor_sets):
    """An unadapted model whose weights hold W_0 + s B A of every set; B and A stay leaves."""
    model = base_model(kind)
    weights = dict(original)
    for factors in factor_sets:
        for name, (a, b) in factors.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + SCALE * b @ a
    return lambda **inputs: functional_call(model, weights, (), inputs)


def matrices(run, kind, row, weight, eps, divisor):
    """The relation matrices of one row: its hidden states without any padding, normed, pooled."""
    prompt = torch.tensor([row.prompt])

    def normed(state):
        return state / (state.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    if kind == "t5":
        start = torch.tensor([[PAD, *row.answer[:-1]]])
        out = run(input_ids=prompt, decoder_input_ids=start, output_hidden_states=True)
        stacks = [
            [normed(out.encoder_hidden_states[1]).mean(1), out.encoder_hidden_states[2].mean(1)],
            [normed(out.decoder_hidden_states[1])[:, 0], out.decoder_hidden_states[2][:, 0]],
        ]
    else:
        out = run(input_ids=prompt, output_hidden_states=True)
        stacks = [[normed(out.hidden_states[1])[:, -1], out.hidden_states[2][:, -1]]]
    phis = [torch.cat(stack) for stack in stacks]
    return [phi @ phi.T / divisor for phi in phis]


def smooth_l1(x):
    return torch.where(x.abs() < 1, 0.5 * x * x, x.abs() - 0.5)


def oracle(kind, rows, original, past, live, divisor=float(WIDTH)):
    """Mean over rows of L_rel, and the gradient by the live factors."""
    live = {
        name: (a.clone().requires_grad_(), b.clone().requires_grad_())
        for name, (a, b) in live.items()
    }
    before = dense_model(kind, original, past)
    now = dense_model(kind, original, past, live)
    weight, eps = torch.ones(WIDTH), 1e-6  # norms as they are initialised
    total = torch.zeros(())
    for row in rows:
        old = matrices(before, kind, row, weight, eps, divisor)
        new = matrices(now, kind, row, weight, eps, divisor)
        losses = []
        for a, b in zip(new, old, strict=True):
            target = np.linalg.svd(b.detach().numpy())[1]
            losses.append(smooth_l1(torch.linalg.svdvals(a) - torch.from_numpy(target)).mean())
        total = total + sum(losses) / len(losses) / len(rows)
    leaves = [x for pair in live.values() for x in pair]
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return float(total.detach()), torch.cat([g.flatten() for g in grads])


def originals(kind):
    return {
        **dict(base_model(kind).named_parameters()),
        **dict(base_model(kind).named_buffers()),
    }
