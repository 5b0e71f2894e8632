"""What a rank does in each kind of case. Every function runs on every rank."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counting import checkpoint_calls, counted
from toys import make_parts

from accrete.launch.forecast.live_bytes import LiveBytes
from accrete.pipeline import checkpoint
from accrete.pipeline.checkpoint import Position
from accrete.pipeline.distributed.comm import gather_rows, reduce_rows, row_block
from accrete.pipeline.errors import MethodError
from accrete.pipeline.models.lora import initial_factors, load_factors
from accrete.pipeline.stage import row_losses
from accrete.pipeline.stage_runner import StageRunner
from accrete.pipeline.train_task import train_task


def losses(folder: Path) -> list[float]:
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [e["loss"] for e in map(json.loads, lines) if e["event"] == "step"]


def sequence(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Tasks through the stage runner: losses, all factors or weights, the method's state."""
    parts = make_parts(ranks, folder, **params)
    StageRunner(parts).run()
    parts.recorder.close()
    kinds = {str(parts.engine.value(name).dtype) for name in parts.engine.parameters}
    result: dict[str, Any] = {"bytes": parts.method.state_bytes(), "dtypes": sorted(kinds)}
    result.update({f"state/{k}": v for k, v in parts.method.state_dict().items()})
    if ranks.rank == 0:
        result["losses"] = losses(folder)
        for stage in range(len(parts.tasks)):
            if parts.method.trains == "weights":
                live = checkpoint.load(parts.run.path, Position(stage=stage), "state")
                for name, value in live.items():
                    result[f"{stage}/{name.removeprefix('factor/')}/W"] = value
                continue
            for name, (a, b) in load_factors(parts.run.stage(stage).adapter).items():
                result[f"{stage}/{name}/A"], result[f"{stage}/{name}/B"] = a, b
    return result


def zero_in_gap(ranks: Any, folder: Path, how: str, **params: Any) -> dict[str, Any]:
    """Train one task while something sets gradients to zero; how far did any weight move?"""
    parts = make_parts(ranks, folder, train={"weight_decay": 0.0}, **params)
    runner = StageRunner(parts)
    stage = runner._stage(0)
    stage.write_factors(
        {
            name: (a, torch.full_like(b, 0.02))
            for name, (a, b) in initial_factors(parts.adapted, 0, 0).items()
        }
    )
    start = {name: parts.engine.value(name) for name in parts.engine.parameters}
    if how in ("hook", "nan"):
        change = torch.zeros_like if how == "hook" else (lambda gradient: gradient * float("nan"))
        for parameter in parts.engine.parameters.values():
            parameter.register_hook(change)
    if how == "gap":

        def edit(stage: Any) -> None:
            for name in parts.engine.parameters:
                gradient = parts.engine.gradient(name)
                parts.engine.write_gradient(name, torch.zeros_like(gradient))

        parts.method.after_backward = edit  # type: ignore[method-assign]
    if how == "grad_attribute":  # the way that silently does nothing

        def edit_grad(stage: Any) -> None:
            for parameter in parts.engine.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.zero_()

        parts.method.after_backward = edit_grad  # type: ignore[method-assign]
    said = ""
    try:
        train_task(stage, parts.method, parts.recorder)
    except MethodError as error:
        said = str(error)
    moved = max(
        float((parts.engine.value(name) - value).abs().max()) for name, value in start.items()
    )
    return {"moved": moved, "steps": stage.steps, "said": said}


def edited(ranks: Any, folder: Path, copy_alone: bool = False, **params: Any) -> dict[str, Any]:
    """Overwrite trained factors; what the next forward and one after a step of rate 0 use.

    `copy_alone`: not through the engine, so the optimizer's master does not know.
    """
    parts = make_parts(ranks, folder, **params)
    engine = parts.engine
    engine.watch()
    stage = StageRunner(parts)._stage(0)
    stage.write_factors(initial_factors(parts.adapted, 0, 0))
    stage.steps = 1
    train_task(stage, parts.method, parts.recorder)
    result: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in engine.parameters.items():
        result[f"trained/{name}"] = engine.value(name)
        wanted = torch.randn(result[f"trained/{name}"].shape, generator=generator)
        result[f"wanted/{name}"] = wanted
        if copy_alone:
            parameter.data.copy_(wanted)
        else:
            engine.write(name, wanted)
    [batch] = stage.micro_batches(stage.global_batch(0))
    for moment in ("next", "later"):
        loss = row_losses(stage.logits(batch), batch.labels).sum()
        for name in engine.parameters:
            result[f"{moment}/peek/{name}"] = engine.peek(name).clone()
            result[f"{moment}/value/{name}"] = engine.value(name)
        engine.backward(loss, last=True)
        engine.step(0.0)
    return result


def unused(ranks: Any, folder: Path, used: list[list[bool]], **params: Any) -> dict[str, Any]:
    """Train with a layer that has no gradient where `used`, by step and micro-batch, says no."""
    parts = make_parts(ranks, folder, train={"weight_decay": 0.1}, **params)
    stage = StageRunner(parts)._stage(0)
    stage.write_factors(
        {
            name: (a, torch.full_like(b, 0.02))
            for name, (a, b) in initial_factors(parts.adapted, 0, 0).items()
        }
    )
    calls = iter([part for step in used for part in step])

    def cut(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output if next(calls) else output.detach()

    next(iter(parts.adapted.layers.values())).module.register_forward_hook(cut)
    stage.steps = len(used)
    train_task(stage, parts.method, parts.recorder)
    assert next(calls, None) is None
    return {name: parts.engine.value(name) for name in parts.engine.parameters}


def gathered(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Elements of all weights that ZeRO 3 holds whole when each factor gets its gradient."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parts = make_parts(ranks, folder, **params)
    runner = StageRunner(parts)
    runner._learn(0, None)
    weights: list[Any] = list(parts.engine.module.parameters())
    held: list[int] = []

    def note(gradient: torch.Tensor) -> None:
        held.append(sum(w.ds_numel for w in weights if w.ds_status is ZeroParamStatus.AVAILABLE))

    for parameter in parts.engine.parameters.values():
        parameter.register_hook(note)  # type: ignore[no-untyped-call]
    runner._learn(1, None)
    result = {"held": held[-len(parts.engine.parameters) :]}
    return {**result, "all": sum(weight.ds_numel for weight in weights)}


def traffic(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Collectives of the second task's training steps; what this rank has of every A."""
    parts = make_parts(ranks, folder, **params)
    runner = StageRunner(parts)
    runner._learn(0, None)
    stage = runner._stage(1)
    if parts.method.fresh_adapter:
        stage.write_factors(initial_factors(parts.adapted, 3, 1))
    parts.engine.reset_optimizer()
    parts.method.on_task_start(stage)
    layers = parts.adapted.layers.values() if parts.method.trains == "factors" else ()
    factors = [layer.a for layer in layers]
    frozen = [name for name in factors if name not in parts.engine.parameters]
    result: dict[str, Any] = {f"written/{name}": stage.read(name) for name in frozen}
    # DeepSpeed checks its ZeRO-3 trace across ranks in the first steps after any other pass.
    train_task(stage, parts.method, parts.recorder)
    with counted() as counts:
        train_task(stage, parts.method, parts.recorder)
    result.update({f"trained/{name}": stage.read(name) for name in factors})
    return {"counts": dict(counts), "steps": stage.steps, **result}


def fisher(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """The Fisher of the first task at fixed factors; whole, and the size of this rank's part."""
    parts = make_parts(ranks, folder, method="ewc_lora", **params)
    runner = StageRunner(parts)
    stage = runner._stage(0)
    generator = torch.Generator().manual_seed(0)
    stage.write_factors(
        {
            name: (a, 0.1 * torch.randn(b.shape, generator=generator))
            for name, (a, b) in initial_factors(parts.adapted, 0, 0).items()
        }
    )
    before = {name: parts.engine.value(name) for name in parts.engine.parameters}
    calls = checkpoint_calls(parts.adapted.base)
    parts.method.on_task_start(stage)
    parts.method.on_task_end(stage)
    unchanged = all(torch.equal(parts.engine.value(k), v) for k, v in before.items())
    whole = sum(
        layer.module.base_layer.in_features * layer.module.base_layer.out_features * 4
        for layer in parts.adapted.layers.values()
    )
    gradients = [p.grad for p in parts.adapted.module.parameters() if p.grad is not None]
    return {
        **parts.method.state_dict(),
        "bytes": parts.method.state_bytes(),
        "whole_bytes": whole,
        "unchanged": unchanged,
        "stray_gradients": len(gradients),
        "checkpoints": len(calls),
    }


def reset(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """A second task on an engine reset in place, and on an engine made for it."""
    outcome: dict[str, Any] = {}
    for name in ("reset", "fresh"):
        parts = make_parts(ranks, folder / name, **params)
        runner = StageRunner(parts)
        if name == "reset":
            train_task(runner._stage(0), parts.method, parts.recorder)
        stage = runner._stage(1)
        stage.write_factors(initial_factors(parts.adapted, 3, 1))
        parts.engine.reset_optimizer()
        step = parts.engine.optimizer_step
        train_task(stage, parts.method, parts.recorder)
        outcome[f"{name}/step"] = step
        outcome.update({f"{name}/{k}": parts.engine.value(k) for k in parts.engine.parameters})
    return outcome


def interrupted(ranks: Any, folder: Path, cut: int, **params: Any) -> dict[str, Any]:
    """A run that ends, as by a kill, just after its checkpoint at step `cut` of stage 1."""

    class CutError(Exception):
        pass

    parts = make_parts(ranks, folder, **params)
    runner = StageRunner(parts)
    save = runner._save

    def save_and_die(stage: Any, position: Any) -> None:
        save(stage, position)
        if position.stage == 1 and position.step == cut:
            raise CutError

    runner._save = save_and_die  # type: ignore[method-assign]
    try:
        runner.run()
    except CutError:
        pass
    else:
        raise AssertionError("the run was not cut")
    parts.recorder.close()
    return {}


def resumed(ranks: Any, folder: Path, source: str, **params: Any) -> dict[str, Any]:
    """Go on from what an interrupted run left; its events are dropped to see the new ones alone."""
    if ranks.rank == 0:
        shutil.copytree(folder.parent / source / "run", folder / "run")
        (folder / "run" / "events.jsonl").unlink()
    if ranks.world > 1:
        dist.barrier()
    return sequence(ranks, folder, **params)


def scoring(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Greedy exact match by one teacher-forced pass and by `generate`, row by row."""
    from toys import ToyRows

    from accrete.pipeline.data.encode import EncodedRow
    from accrete.pipeline.view import LiveModel

    rows = ToyRows(5, 7, 4).all
    parts = make_parts(ranks, folder, learned=rows, **params)
    view = LiveModel(parts.engine, parts.adapted, parts.facts, synced=params["zero"] == 3)
    # The model knows these rows by heart; every third gets another answer, so that there are
    # hits and misses.
    golds = [
        EncodedRow(
            id=row.id,
            prompt=row.prompt,
            index=row.index,
            answer=[7, *row.answer] if i % 3 == 0 else row.answer,
        )
        for i, row in enumerate(rows)
    ]
    texts = [view.generate(parts.collator.prompts([row]), 8)[0] for row in golds]
    batch = parts.collator.train(golds, len(golds)).to(parts.engine.device)
    guess = view.logits(batch).argmax(-1)
    hit = ((guess == batch.labels) | (batch.labels == -100)).all(1).tolist()
    together = view.generate(parts.collator.prompts(golds), 8)
    same = [text == gold.answer[:-1] for text, gold in zip(together, golds, strict=True)]
    return {"forward": hit, "generate": same, "alone": texts, "together": together}


def consolidation(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Logits before and after the factors join the past."""
    parts = make_parts(ranks, folder, **params)
    runner = StageRunner(parts)
    result: dict[str, Any] = {}
    for index in (0, 1):
        stage = runner._stage(index)
        generator = torch.Generator().manual_seed(index)
        stage.write_factors(
            {
                name: (a, 0.1 * torch.randn(b.shape, generator=generator))
                for name, (a, b) in initial_factors(parts.adapted, 0, index).items()
            }
        )
        batch = parts.collator.train(stage.rows.all[:6], 6)
        view = runner._view
        result[f"{index}/before"] = view.logits(batch)
        error = parts.past.add(stage.factors())
        result[f"{index}/error"] = error
        stage.write_factors(initial_factors(parts.adapted, 0, index + 1))
        result[f"{index}/after"] = view.logits(batch)
    return result


def rows(ranks: Any, folder: Path, count: int) -> dict[str, Any]:
    """Row blocks: reduce to owners, gather on rank 0."""
    own = torch.arange(count * 3, dtype=torch.float32).view(count, 3) * (ranks.rank + 1)
    block = reduce_rows(own.clone(), ranks.rank, ranks.world)
    whole = gather_rows(block, count, ranks.rank, ranks.world)
    part = row_block(count, ranks.rank, ranks.world)
    result: dict[str, Any] = {"start": part.start, "stop": part.stop, "block": block}
    if whole is not None:
        result["whole"] = whole
    return result


def held(ranks: Any, folder: Path, **params: Any) -> dict[str, Any]:
    """Bytes of live tensors: when the engine stands, after a step, and most in later steps."""
    live = LiveBytes()
    gc.collect()
    with live:
        parts = make_parts(ranks, folder, **params)
        gc.collect()
        result = {"static": live.now}
        stage = StageRunner(parts)._stage(0)
        if parts.method.trains == "factors":
            stage.write_factors(initial_factors(parts.adapted, 3, 0))
        stage.steps = 1
        train_task(stage, parts.method, parts.recorder)
        gc.collect()
        result["trained"] = live.now
        live.reset_peak()
        stage.steps = 3
        train_task(stage, parts.method, parts.recorder, start=1)
    result["peak"] = live.peak
    return result


CASES = {
    function.__name__: function
    for function in (
        sequence,
        zero_in_gap,
        edited,
        unused,
        gathered,
        traffic,
        fisher,
        reset,
        interrupted,
        resumed,
        scoring,
        consolidation,
        rows,
        held,
    )
}
