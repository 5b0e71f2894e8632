"""Tiny models and rows that every distributed case builds in the same way on every rank."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from accrete.pipeline.config.run import CheckpointConfig, EvalConfig, RunConfig, TrainConfig
from accrete.pipeline.data.collate import Collator
from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.distributed.config import EngineConfig
from accrete.pipeline.distributed.engine import OptimizerSettings
from accrete.pipeline.distributed.plain import PlainEngine
from accrete.pipeline.distributed.zero import ZeroEngine
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.models.config import AdapterConfig, ModelConfig
from accrete.pipeline.models.full import FullModel
from accrete.pipeline.models.load import ModelFacts
from accrete.pipeline.models.lora import AdaptedModel
from accrete.pipeline.models.past import Past
from accrete.pipeline.parts import Parts
from accrete.pipeline.records import Recorder
from accrete.pipeline.run_dir import RunDir
from accrete.pipeline.scoring import TaskScore
from accrete.pipeline.stage import accumulation

VOCAB, PAD, EOS, BOS = 48, 0, 1, 2
EPS = 1e-2
"""AdamW divides by |g| + eps: with the usual 1e-8 the last bit of a vanishing gradient decides the
sign of a whole step, on one process as on four."""

NAMES = ("one", "two", "three")


def base_model(kind: str) -> torch.nn.Module:
    """A T5 with smooth activations (a ReLU turns last-bit differences into jumps) or a LLaMA.

    A `_short` one has one layer a side, for what costs much and does not grow with layers;
    `t5_uneven` two in the encoder and one in the decoder, as every module costs at ZeRO 3. An
    `_idle` one has layers that do not run, such as those for pictures.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(7)
    layers = 1 if kind.endswith("_short") else 2
    if kind.startswith("t5"):
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=layers,
                num_decoder_layers=1 if kind == "t5_uneven" else layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=PAD,
                eos_token_id=EOS,
                decoder_start_token_id=PAD,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=BOS,
                eos_token_id=EOS,
                pad_token_id=None,
            )
        )
    if kind.endswith("_idle"):
        for layer in model.model.layers:
            layer.idle = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32)})
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def facts(kind: str) -> ModelFacts:
    seq2seq = kind.startswith("t5")
    return ModelFacts(seq2seq, PAD, EOS, PAD if seq2seq else None)


def memorise(model: torch.nn.Module, rows: list[EncodedRow], kind: str) -> None:
    """Full training until the model knows the rows by heart; the same on every rank."""
    from accrete.pipeline.stage import aligned_logits, row_losses

    batch = Collator(kind == "t5", PAD, PAD if kind == "t5" else None, EOS).train(rows, len(rows))
    batch = batch.to(next(model.parameters()).device)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        row_losses(aligned_logits(model, batch, kind == "t5"), batch.labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def own_loss(model: torch.nn.Module, row: EncodedRow, kind: str) -> torch.Tensor:
    """A row's negative log-likelihood as transformers itself computes it."""
    if kind == "t5":
        inputs = {"input_ids": [row.prompt], "labels": [row.answer]}
    else:
        labels = [-100] * len(row.prompt) + row.answer
        inputs = {"input_ids": [row.prompt + row.answer], "labels": [labels]}
    loss = model(**{name: torch.tensor(value) for name, value in inputs.items()}).loss
    return loss * len(row.answer)


class ToyRows:
    """Rows of unequal lengths in a fixed cyclic order; the `TrainRows` face."""

    def __init__(
        self, task: int, num_rows: int, global_batch: int, closed: int | None = None
    ) -> None:
        pick = random.Random(task)
        self.all = [
            EncodedRow(
                id=f"{task}-{i}",
                prompt=[pick.randrange(3, VOCAB) for _ in range(pick.randrange(3, 12))] + [EOS],
                answer=[pick.randrange(3, VOCAB) for _ in range(pick.randrange(1, 5))] + [EOS],
                index=i,
            )
            for i in range(num_rows)
        ]
        if closed is not None:  # so many answers for all rows
            known = [row.answer for row in self.all[:closed]]
            self.all = [replace(row, answer=pick.choice(known)) for row in self.all]
        self.num_rows = num_rows
        self.global_batch = global_batch
        self.steps_per_epoch = -(-num_rows // global_batch)

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        start = step % self.steps_per_epoch * self.global_batch
        return self.all[start : start + self.global_batch][rank::world]


def spread(rows: list[EncodedRow], count: int) -> list[EncodedRow]:
    """The middle row of each of `count` equal stretches: what a pass with a limit measures."""
    return [rows[int((i + 0.5) * len(rows) / count)] for i in range(count)]


def make_config(method: Any, **changes: Any) -> RunConfig:
    train = {"learning_rate": 1e-2, "global_batch_size": 8, "weight_decay": 0.01, "eps": EPS}
    train.update(changes.pop("train", {}))
    config = RunConfig(
        name="toy",
        seed=3,
        tasks=[TaskConfig(name=name) for name in NAMES[: changes.pop("tasks", 2)]],
        model=ModelConfig(builder="tiny_t5"),
        adapter=AdapterConfig(
            rank=5,
            alpha=10.0,
            past=changes.pop("past", "fold"),
            lines=changes.pop("lines", None),
            dropout=changes.pop("dropout", 0.0),
        ),
        method=method,
        engine=EngineConfig(**changes.pop("engine", {})),
        data=DataConfig(window_batches=1),
        train=TrainConfig(**train),
        eval=EvalConfig(forward_transfer=False),
        checkpoint=CheckpointConfig(every_steps=changes.pop("every_steps", None)),
    )
    return replace(config, **changes)


def make_parts(
    ranks: Any,
    folder: Path,
    *,
    model: str,
    zero: int | None,
    micro: int,
    method: str = "sequential",
    settings: dict[str, Any] | None = None,
    rows: int = 21,
    past: str = "fold",
    train: dict[str, Any] | None = None,
    every_steps: int | None = None,
    checkpointing: bool = False,
    evaluator: Any = None,
    learned: list[EncodedRow] | None = None,
    dtype: str = "fp32",
    tasks: int = 2,
    closed: int | None = None,
    lines: float | None = None,
    whole_below: int | None = None,
    most_live: int | None = None,
    dropout: float = 0.0,
) -> Parts:
    """All pieces of a run on a toy model; zero None is the plain engine.

    `closed` tasks have so many labels; others have open answers.
    """
    chosen_class = method_class(method)
    known = facts(model)
    method_config = chosen_class.Config(**(settings or {}))
    engine_settings = {"kind": "plain"} if zero is None else {"zero_stage": zero}
    config = make_config(
        method_config,
        past=past,
        lines=lines,
        dropout=dropout,
        engine=engine_settings,
        train={"micro_batch_size": micro, **(train or {})},
        every_steps=every_steps,
        tasks=tasks,
    )
    base = base_model(model)
    half = torch.bfloat16 if dtype == "bf16" else torch.float32
    if chosen_class.trains == "factors":
        base.to(half)
    if learned is not None:
        memorise(base, learned, model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = chosen_class(method_config)
    adapted = (
        FullModel(base, chosen.weights, half, ranks.device.type)
        if chosen.trains == "weights"
        else AdaptedModel(base, config.adapter, chosen.layer_scales)
    )
    settings_ = OptimizerSettings(
        optimizer=config.train.optimizer,
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
    )
    batch = config.train.global_batch_size
    micro_batches = accumulation(batch, micro, ranks.world)
    trained = adapted.parameters(chosen.trainable("A"), chosen.trainable("B"))
    engine: Any
    if zero is None:
        engine = PlainEngine(
            adapted.module,
            trained,
            settings_,
            accumulation=micro_batches,
            device=ranks.device,
        )
    else:
        engine = ZeroEngine(
            adapted.module,
            trained,
            settings_,
            ranks=ranks,
            stage=zero,
            accumulation=micro_batches,
            micro_batch=micro,
            bucket_elements=2000,
            whole_below=whole_below,
            most_live=most_live,
        )
    if chosen.peeks:
        engine.watch()
    run = RunDir(folder / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(run.events if ranks.rank == 0 else None)
    return Parts(
        config=config,
        run=run,
        model_path="toy",
        tasks=[
            SimpleNamespace(
                name=n,
                num_eval=0,
                metric="exact_match",
                labels=None if closed is None else tuple(f"label {i}" for i in range(closed)),
            )
            for n in NAMES[:tasks]
        ],
        open_rows=lambda task, index: ToyRows(index, rows, batch, closed),
        adapted=adapted,
        engine=engine,
        past=Past(adapted, engine, past, chosen.merge),
        method=chosen,
        facts=known,
        collator=Collator(known.seq2seq, PAD, known.decoder_start_id, EOS),
        evaluator=evaluator or no_scores,
        recorder=recorder,
        on_scores=lambda scores: {},
    )


def no_scores(view: Any, tasks: list[Any]) -> list[TaskScore]:
    return [TaskScore(task=task.name, score=0.0, rows=[], seconds=0.0) for task in tasks]
