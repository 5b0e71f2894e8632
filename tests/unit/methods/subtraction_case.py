"""What the tests of LoRA subtraction share: runs, and an oracle by plain autograd."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

from toys import ToyRows, base_model, make_parts

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.models.lora import initial_factors, load_factors
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.train_task import learning_rate

MODELS = ("t5", "llama")
ENERGY = 0.9
SCALE = 2.0
SHARP = {"eps": 1e-8}
"""With the large eps of the toys Adam is close to plain descent, which leaks little."""


def parts_of(folder, model="llama", settings=None, method="lora_subtraction", **more):
    if method == "lora_subtraction":
        settings = {"energy": ENERGY, **(settings or {})}
    return make_parts(
        Ranks(0, 1, torch.device("cpu")),
        folder,
        **{"model": model, "zero": None, "micro": 8, "tasks": 3, **more},
        method=method,
        settings=settings,
    )


def factors_of(parts):
    return [load_factors(parts.run.stage(i).adapter) for i in range(len(parts.tasks))]


def run(parts):
    StageRunner(parts).run()
    parts.recorder.close()
    return factors_of(parts)


def events(parts, kind):
    lines = map(json.loads, parts.run.events.read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def dense(projector):
    return projector.rows(torch.eye(projector.basis.shape[0])).double()


# -- a second implementation -------------------------------------------------------------------


class Oracle:
    """The method by autograd on dense weights W_0 + V + s B A, without engine, peft or hooks."""

    def __init__(self, parts, model, *, triplet, margin, pool, closed):
        self.parts, self.seq2seq = parts, model == "t5"
        self.base = base_model(model)
        self.names = list(parts.adapted.layers)
        self.start = {n: self.base.get_submodule(n).weight.detach().clone() for n in self.names}
        self.past = {n: torch.zeros_like(w) for n, w in self.start.items()}
        self.triplet, self.margin, self.pool, self.closed = triplet, margin, pool, closed
        self.old: list[np.ndarray] = []
        self.means: list[np.ndarray] = []
        self.triplets: list[float] = []

    def forward(self, rows, weights):
        """Logits of the label positions, labels, last features, masks of source and answer."""
        batch = self.parts.collator.train(rows)
        changed = {f"{name}.weight": weight for name, weight in weights.items()}
        out = functional_call(
            self.base, changed, kwargs={**batch.inputs, "output_hidden_states": True}
        )
        logits = out.logits[:, -batch.labels.shape[1] :]
        if self.seq2seq:
            features = out.decoder_hidden_states[-1][:, 0]
        else:
            last = [batch.inputs["attention_mask"].shape[1] - len(r.answer) for r in rows]
            features = torch.stack(
                [out.hidden_states[-1][i, place] for i, place in enumerate(last)]
            )
        return logits, batch.labels, features, batch.inputs["attention_mask"]

    def projectors(self, rows):
        """Layer -> P [d, d] in fp64, from the inputs under W_0 - V of every single row."""
        inputs = {name: [] for name in self.names}
        handles = [
            self.base.get_submodule(name).register_forward_pre_hook(
                lambda module, given, name=name: inputs[name].append(given[0].detach())
            )
            for name in self.names
        ]
        with torch.no_grad():
            for row in rows:
                self.forward([row], {n: w - self.past[n] for n, w in self.start.items()})
        for handle in handles:
            handle.remove()
        found = {}
        for name, pieces in inputs.items():
            x = np.concatenate([piece[0].double().numpy() for piece in pieces])
            values, vectors = np.linalg.eigh(x.T @ x)
            share = np.cumsum(values[::-1]) / values.sum()
            top = vectors[:, ::-1][:, : int(np.argmax(share >= ENERGY)) + 1]
            assert 1 < top.shape[1] < top.shape[0]
            found[name] = torch.from_numpy(top @ top.T)
        return found

    def triplet_of(self, rows, features):
        """Sum over rows; positives, negatives and prototypes by loops."""
        f = torch.nn.functional.normalize(features, dim=1)
        total = torch.zeros(())
        for start in range(0, len(rows), self.pool):
            block = range(start, min(start + self.pool, len(rows)))
            for i in block:
                distance = {j: (f[i] - f[j].detach()).norm() for j in block if j != i}
                alike = [d for j, d in distance.items() if rows[j].answer == rows[i].answer]
                unlike = [d for j, d in distance.items() if rows[j].answer != rows[i].answer]
                unlike += [(f[i] - torch.from_numpy(p)).norm() for p in self.old]
                if unlike:
                    far = max(alike) if alike else torch.zeros(())
                    total = total + (far - min(unlike) + self.margin).clamp(min=0)
        return total

    def task(self, index):
        """Train one task; its final (A, B)."""
        data = ToyRows(index, 21, 8, self.closed)
        initial = initial_factors(self.parts.adapted, self.parts.config.seed, index)
        a = {n: initial[n][0].clone().requires_grad_() for n in self.names}
        b = {n: initial[n][1].clone().requires_grad_() for n in self.names}
        spaces = self.projectors(data.all) if index else {}
        for name, p in spaces.items():
            a[name].data = (a[name].data.double() @ p).float()
        train = self.parts.config.train
        optimizer = torch.optim.AdamW(
            [*a.values(), *b.values()],
            betas=(0.9, 0.999),
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
        for step in range(data.steps_per_epoch):
            rows = data.rows(step, 0, 1)
            logits, labels, features, _ = self.forward(rows, self.live(a, b))
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100
            )
            if self.triplet:
                mean = self.triplet_of(rows, features) / len(rows)
                self.triplets.append(float(mean.detach()))
                loss = loss + self.triplet * mean
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, step, data.steps_per_epoch)
            before = {n: a[n].detach().clone() for n in spaces}
            optimizer.step()
            for name, p in spaces.items():
                step_made = (a[name].data - before[name]).double() @ p
                a[name].data = (before[name].double() + step_made).float()
        self.finish(data.all, a, b)
        return {n: (a[n].detach(), b[n].detach()) for n in self.names}

    def live(self, a, b):
        return {n: w + self.past[n] + SCALE * b[n] @ a[n] for n, w in self.start.items()}

    def finish(self, rows, a, b):
        with torch.no_grad():
            weights = self.live(a, b)
            singles = [self.forward([row], weights)[2][0].numpy() for row in rows]
            for answer in dict.fromkeys(tuple(row.answer) for row in rows):
                own = [f for f, r in zip(singles, rows, strict=True) if tuple(r.answer) == answer]
                self.means.append(np.mean(own, axis=0))
            for name in self.names:
                self.past[name] += SCALE * b[name] @ a[name]
        self.old = [m / np.linalg.norm(m) for m in self.means] if self.triplet else []


def assert_close(got, expected, tolerance=1e-5):
    for which in (0, 1):
        x = torch.cat([pair[which].flatten() for pair in got.values()])
        y = torch.cat([expected[name][which].flatten() for name in got])
        assert float((x - y).norm() / y.norm()) < tolerance


def watched(parts, look):
    """Call `look(stage)` after every step, behind the method's own hook."""
    hook = parts.method.after_step

    def after_step(stage):
        hook(stage)
        look(stage)

    parts.method.after_step = after_step
    return parts
