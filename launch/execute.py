"""One rank of a run: put the pieces together and run the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.launch.cluster.attempts import mark_finished
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.distributed import comm
from accrete.pipeline.fence import Fence
from accrete.pipeline.run_dir import RunDir, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.distributed.comm import Ranks
    from accrete.pipeline.distributed.engine import Engine
    from accrete.pipeline.interruption import StopSignal
    from accrete.pipeline.models.lora import AdaptedModel
    from accrete.pipeline.parts import Parts, Scores
    from accrete.pipeline.records import Recorder


def execute(
    run_dir: Path,
    overrides: tuple[str, ...] = (),
    stop: StopSignal | None = None,
    token: str | None = None,
) -> None:
    """Run (or go on with) the run in `run_dir` on this rank.

    Args:
        run_dir: A prepared run folder (`recipe.yaml`, `run.json`, `prepared.json`).
        overrides: `a.b=v` changes for a resumed run.
        stop: Whether this process was asked to stop.
        token: The fencing token, on rank 0 where a launcher gave one.

    Raises:
        InterruptionError: The run was asked to stop; everything up to the last step is saved.

    Collective: yes; every rank of the launch calls it once.
    """
    run = RunDir(run_dir)
    run.require_run()
    config = load_recipe(run.recipe, overrides).config
    ranks = comm.start(config.engine.device, config.engine.timeout_s)
    fence = Fence(run.owner, token)
    fence.check()
    parts = build(run, config, ranks, fence=fence)
    parts.stop = stop or parts.stop
    from accrete.pipeline.stage_runner import StageRunner

    with parts.recorder:
        announce(parts)
        StageRunner(parts).run()
    if ranks.rank == 0 and run.launch.is_dir():
        mark_finished(run)
    # Not after an error: NCCL's farewell waits for the other ranks, who may wait for this one.
    comm.stop()


def build(
    run: RunDir,
    config: RunConfig,
    ranks: Ranks,
    record: bool = True,
    fence: Fence | None = None,
) -> Parts:
    """All the pieces of a run on this rank; without `record` nothing is written to its events.

    Collective: yes.
    """
    from accrete.eval.evaluator import SequenceEvaluator
    from accrete.launch.positions import require_positions
    from accrete.launch.prepare import hub_revision, open_tokenizer
    from accrete.pipeline.data.collate import Collator
    from accrete.pipeline.data.prepare import TaskHandle
    from accrete.pipeline.data.store import open_train
    from accrete.pipeline.methods.registry import method_class
    from accrete.pipeline.models.full import FullModel, kept_precision
    from accrete.pipeline.models.load import base_dtype, load_base, read_facts, unknown_inputs
    from accrete.pipeline.models.lora import AdaptedModel
    from accrete.pipeline.models.past import Past, choose_mode
    from accrete.pipeline.parts import Parts
    from accrete.pipeline.records import Recorder

    prepared = read_json(run.prepared)
    model_path = str(prepared["model_path"])
    tasks = [TaskHandle.from_json(task) for task in prepared["tasks"]]
    tokenizer = open_tokenizer(run, config)
    facts = read_facts(model_path, tokenizer, config.model.revision)
    collator = Collator(facts.seq2seq, facts.pad_id, facts.decoder_start_id, facts.eos_id)
    method = method_class(config.method.kind)(config.method)
    model = kept_precision(config.model, type(method))
    origin = began_on(run, ranks.device)
    base = load_base(model_path, model, origin)
    require_positions(base, tasks, config)
    facts = replace(facts, unknown_inputs=unknown_inputs(base))
    adapted = (
        FullModel(base, method.weights, base_dtype(config.model, origin), ranks.device.type)
        if method.trains == "weights"
        else AdaptedModel(base, config.adapter, method.layer_scales, hub_revision(config))
    )
    engine = build_engine(config, ranks, adapted, method)
    mode = choose_mode(config.adapter.past, base_dtype(model, origin))
    evaluator = SequenceEvaluator(config.eval, collator, tokenizer, config.data.max_target_tokens)
    chief = ranks.rank == 0
    recorder = open_recorder(run, config, chief, fence) if record else Recorder(None)
    return Parts(
        config=config,
        run=run,
        model_path=model_path,
        tasks=tasks,
        open_rows=lambda task, index: open_train(
            task,
            config.seed,
            index,
            config.train.global_batch_size,
            config.data.window_batches,
        ),
        adapted=adapted,
        engine=engine,
        past=Past(adapted, engine, mode, method.merge),
        method=method,
        facts=facts,
        collator=collator,
        evaluator=evaluator,
        recorder=recorder,
        on_scores=lambda scores: write_results(run, scores),
        fence=fence,
    )


def began_on(run: RunDir, here: torch.device) -> torch.device:
    """The device of the run's first start, where `auto` settings were decided for all its lives."""
    import torch

    from accrete.pipeline.records import Event

    events = events_so_far(run)
    started = next((event for event in events if event["event"] == Event.RUN_STARTED), {})
    return torch.device(started.get("device", here))


def events_so_far(run: RunDir) -> Iterator[dict[str, Any]]:
    """The events of a run; none before its first."""
    from accrete.pipeline.records import read_events

    return read_events(run.events) if run.events.exists() else iter(())


def build_engine(config: RunConfig, ranks: Ranks, adapted: AdaptedModel, method: Any) -> Engine:
    """The engine that the recipe names. Collective: yes."""
    from accrete.pipeline.distributed.engine import OptimizerSettings
    from accrete.pipeline.distributed.plain import PlainEngine
    from accrete.pipeline.distributed.zero import ZeroEngine
    from accrete.pipeline.stage import accumulation

    train = config.train
    settings = OptimizerSettings(
        optimizer=train.optimizer,
        betas=train.betas,
        eps=train.eps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    parameters = adapted.parameters(method.trainable("A"), method.trainable("B"))
    micro_batches = accumulation(train.global_batch_size, train.micro_batch_size, ranks.world)
    engine: Engine
    if config.engine.kind == "plain":
        engine = PlainEngine(
            adapted.module, parameters, settings, accumulation=micro_batches, device=ranks.device
        )
    else:
        engine = ZeroEngine(
            adapted.module,
            parameters,
            settings,
            ranks=ranks,
            stage=config.engine.zero_stage,
            accumulation=micro_batches,
            micro_batch=train.micro_batch_size,
            bucket_elements=config.engine.bucket_elements,
        )
    if method.peeks:
        engine.watch()
    return engine


def open_recorder(
    run: RunDir, config: RunConfig, chief: bool, fence: Fence | None = None
) -> Recorder:
    """The run's event file with its views; on other ranks than 0 a recorder that does nothing."""
    from accrete.pipeline.records import Recorder
    from accrete.pipeline.sinks import make_sinks

    if not chief:
        return Recorder(None)
    return Recorder(run.events, make_sinks(config.log, run), fence)


def announce(parts: Parts) -> None:
    """Say what is going to happen, once: a resumed run has said it, a branch its parent's plan."""
    from accrete.launch.forecast.methods import epoch_rows
    from accrete.pipeline.records import Event
    from accrete.pipeline.stage_runner import planned_steps

    if parts.engine.rank:
        return
    config = parts.config
    batch = config.train.global_batch_size
    counts = [task.num_train for task in parts.tasks]
    plan = []
    for index, task in enumerate(parts.tasks):
        rows = epoch_rows(config.method.kind, config.method, counts, index, batch)
        train = task.stats.train
        plan.append(
            {
                "task": task.name,
                "steps": planned_steps(config, index, -(-rows // batch)),
                "rows_train": task.num_train,
                "rows_eval": task.num_eval,
                "tokens": round(train.mean_prompt_tokens + train.mean_answer_tokens, 2),
            }
        )
    news: dict[str, Any] = {
        "method": config.method.kind,
        "forward_transfer": config.eval.forward_transfer,
        "plan": plan,
    }
    said = [e for e in events_so_far(parts.run) if e["event"] == Event.RUN_STARTED][-1:]
    if said and news.items() <= said[0].items():
        return
    parts.recorder.emit(
        Event.RUN_STARTED,
        name=config.name,
        seed=config.seed,
        world=parts.engine.world,
        device=str(parts.engine.device),
        zero_stage=config.engine.zero_stage if config.engine.kind == "deepspeed" else None,
        model=parts.model_path,
        **news,
    )
    for task in parts.tasks:
        for warning in task.stats.warnings:
            parts.recorder.emit(Event.WARNING, message=f"{task.name}: {warning}", task=task.name)


def write_results(run: RunDir, scores: Scores) -> dict[str, Any]:
    """The matrix so far and the report, after every stage (rank 0); the matrix as JSON."""
    from accrete.eval.matrix import AccuracyMatrix
    from accrete.eval.report import refresh_report

    matrix = AccuracyMatrix(
        tasks=tuple(scores.tasks),
        rows=tuple(tuple(row) for row in scores.rows),
        untrained=_known(scores.untrained),
        before=_known(scores.before),
        counts=tuple(scores.counts),
    )
    content = matrix.to_json()
    write_json(run.matrix, content)
    refresh_report(run.path)
    return content


def _known(values: list[float | None]) -> tuple[float | None, ...] | None:
    return tuple(values) if any(value is not None for value in values) else None
