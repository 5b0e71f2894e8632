"""Watched runs of KeepLoRA on the toy models, and oracles for what they must find.

Gradients come from a trainable copy of W by autograd, row by row, and bases from numpy.linalg.svd
of weights and of captured inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))

import toys

from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.stage import aligned_logits, row_losses
from accrete.pipeline.stage_runner import StageRunner

ALONE = Ranks(0, 1, torch.device("cpu"))
MODELS = ("t5", "llama")
EPS = {"eps_w": 0.2, "eps_f": 0.6}
RANK, TASKS = 5, 3


def make(folder, model, **params):
    base = {"zero": None, "micro": 8, "method": "keep_lora", "settings": EPS, "tasks": TASKS}
    return toys.make_parts(ALONE, folder, **{**base, "model": model, **params})


class Watched:
    """A run that notes each task's factors, and the memory before and after it."""

    def __init__(self, folder, model, **params):
        self.parts = make(folder, model, **params)
        self.method = method = self.parts.method
        self.before, self.started, self.after, self.factors = [], [], [], []
        start, end = method.on_task_start, method.on_task_end

        def on_task_start(stage):
            start(stage)
            self.before.append(memory_of(method))
            self.started.append(stage.factors())

        def on_task_end(stage):
            self.factors.append(stage.factors())
            end(stage)
            self.after.append(memory_of(method))

        method.on_task_start, method.on_task_end = on_task_start, on_task_end
        self.runner = StageRunner(self.parts)
        self.runner.run()
        self.parts.recorder.close()
        lines = (folder / "run" / "events.jsonl").read_text().splitlines()
        self.events = [json.loads(line) for line in lines]
        self.notes = [e for e in self.events if e["event"] == "consolidated"]

    def warnings_before_training(self, task):
        """What was said between a task's start and its first step."""
        said, stage = [], None
        for event in self.events:
            if event["event"] == "stage_started":
                stage = event["stage"]
            elif event["event"] == "step":
                stage = None
            elif event["event"] == "warning" and stage == task:
                said.append(event["message"])
        return said

    def key(self, name):
        """Name of a layer's memory: readers of one input share that of features."""
        grown = self.method.config.memory
        return name if grown == "gradients" else self.method._inputs[name]

    def delta(self, task, name):
        a, b = self.factors[task][name]
        return 2.0 * b.double().numpy() @ a.double().numpy()


def cached(tmp_path_factory):
    """Every run once, by its model and settings."""
    made = {}

    def run(model, **params):
        key = (model, json.dumps(params, sort_keys=True))
        if key not in made:
            made[key] = Watched(tmp_path_factory.mktemp("run"), model, **params)
        return made[key]

    return run


def memory_of(method):
    return {name: basis.clone() for name, basis in getattr(method, "memory", {}).items()}


# -- oracles --------------------------------------------------------------------------------------


def model_after(run, model, tasks):
    """The base with the deltas of the first `tasks` tasks added by hand, and its linear layers."""
    base = toys.base_model(model)
    layers = {name: base.get_submodule(name) for name in run.parts.adapted.layers}
    with torch.no_grad():
        for task in range(tasks):
            for name, layer in layers.items():
                layer.weight += torch.tensor(run.delta(task, name), dtype=torch.float32)
    return base.eval(), layers


def batches(run, rows):
    for row in rows:
        yield run.parts.collator.train([row])


def gradients(run, model, tasks, rows, mean=False):
    """Layer -> mean over rows of the dense gradient, by autograd."""
    base, layers = model_after(run, model, tasks)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    total = [np.zeros(w.shape) for w in weights]
    for batch in batches(run, rows):
        loss = row_losses(aligned_logits(base, batch, model == "t5"), batch.labels).sum()
        if mean:
            loss = loss / batch.num_tokens
        for sums, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sums += gradient.double().numpy()
    return {name: sums / len(rows) for name, sums in zip(layers, total, strict=True)}


def features(run, model, tasks, rows):
    """Layer -> its inputs [tokens, d], one row at a time."""
    base, layers = model_after(run, model, tasks)
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0][0].double())
        )
    with torch.no_grad():
        for batch in batches(run, rows):
            base(**batch.inputs)
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def leading(matrix, share):
    """Right singular vectors [k, d] that hold a share of the squared singular values."""
    _, values, right = np.linalg.svd(matrix, full_matrices=False)
    shares = np.cumsum(values**2) / (values**2).sum()
    return right[: int(np.argmax(shares >= share)) + 1]


def principal(model, name):
    return leading(toys.base_model(model).get_submodule(name).weight.double().numpy(), EPS["eps_w"])


def span(*rows):
    """Projector on the span of several sets of [k, d] rows."""
    stacked = np.concatenate([np.asarray(r, dtype=np.float64) for r in rows])
    _, values, right = np.linalg.svd(stacked, full_matrices=False)
    right = right[values > 1e-5]
    return right.T @ right


def protected(run, model, task, name):
    """The projector on M of one layer before a task."""
    memory = run.before[task].get(run.key(name))
    return span(principal(model, name), *([] if memory is None else [memory.T]))


def rows_of(run, task):
    return run.runner._stage(task).rows.all
