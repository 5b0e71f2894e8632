"""Models of real layer sizes with random weights, rows, and the parts of a run over both."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from accrete.launch.execute import build_engine
from accrete.pipeline.config.fields import known_keys
from accrete.pipeline.config.run import CheckpointConfig, EvalConfig, RunConfig, TrainConfig
from accrete.pipeline.data.collate import Collator
from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.distributed.comm import Ranks
from accrete.pipeline.distributed.config import EngineConfig
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.models.config import AdapterConfig, ModelConfig
from accrete.pipeline.models.full import FullModel
from accrete.pipeline.models.load import ModelFacts
from accrete.pipeline.models.lora import AdaptedModel
from accrete.pipeline.models.past import Past, choose_mode
from accrete.pipeline.parts import Parts
from accrete.pipeline.records import Recorder
from accrete.pipeline.run_dir import RunDir

PAD, EOS, BOS, FIRST = 0, 1, 2, 3
LABELS = 4
"""Answers of a task: closed, so that class-wise losses work too."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes and its batches: rows x (prompt + answer) tokens per optimizer step."""

    kind: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.rows * (self.prompt + self.answer)


SHAPES = {
    "t5_base_like": Shape("t5", 768, 2048, 2, 12, 12, 1024, 16, 120, 8),
    "llama_like": Shape("llama", 2048, 8192, 2, 32, 8, 1024, 8, 248, 8),
    "t5_large": Shape("t5", 1024, 4096, 24, 16, 16, 32128, 16, 120, 8),
    "llama32_1b": Shape("llama", 2048, 8192, 16, 32, 8, 128256, 8, 248, 8),
    # Real sizes, a few tokens: what two slow cores can do.
    "t5_large_few": Shape("t5", 1024, 4096, 24, 16, 16, 32128, 4, 24, 4),
    "llama32_1b_few": Shape("llama", 2048, 8192, 16, 32, 8, 128256, 4, 24, 4),
    # Their layers, fewer of them: for methods that train every weight.
    "t5_large_6_blocks": Shape("t5", 1024, 4096, 6, 16, 16, 32128, 4, 24, 4),
    "llama32_1b_2_blocks": Shape("llama", 2048, 8192, 2, 32, 8, 128256, 4, 24, 4),
    # Three sizes of each, for the forecast's check.
    "t5_s": Shape("t5", 256, 1024, 4, 4, 4, 2048, 16, 120, 8),
    "t5_m": Shape("t5", 512, 2048, 6, 8, 8, 4096, 16, 120, 8),
    "t5_l": Shape("t5", 768, 3072, 6, 12, 12, 8192, 16, 120, 8),
    "llama_s": Shape("llama", 256, 1024, 6, 4, 2, 2048, 16, 120, 8),
    "llama_m": Shape("llama", 512, 2048, 8, 8, 4, 4096, 16, 120, 8),
    "llama_l": Shape("llama", 1024, 4096, 6, 16, 8, 8192, 16, 120, 8),
    "tiny_t5": Shape("t5", 32, 48, 2, 4, 4, 64, 4, 12, 4),
    "tiny_llama": Shape("llama", 32, 48, 2, 4, 2, 64, 4, 12, 4),
}


def model_settings(shape: Shape) -> Any:
    """The configuration of a model of these sizes."""
    from transformers import LlamaConfig, T5Config

    if shape.kind == "t5":
        return T5Config(
            vocab_size=shape.vocab,
            d_model=shape.width,
            d_kv=shape.width // shape.heads,
            d_ff=shape.inner,
            num_layers=shape.layers,
            num_heads=shape.heads,
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def base_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A frozen model; the same random weights in every process."""
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        family: Any = T5ForConditionalGeneration if shape.kind == "t5" else LlamaForCausalLM
        model = family(model_settings(shape))
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.to(dtype)


class Rows:
    """Random rows, all of one length, in a fixed cyclic order; the `TrainRows` face.

    `ragged`: two of four prompts lack a token, so that there is padding as with real rows.
    """

    def __init__(self, shape: Shape, task: int, num_rows: int, ragged: bool = False) -> None:
        pick = random.Random(task)

        def tokens(count: int) -> list[int]:
            return [pick.randrange(FIRST, shape.vocab) for _ in range(count - 1)] + [EOS]

        answers = [tokens(shape.answer) for _ in range(LABELS)]
        self.all = [
            EncodedRow(
                f"{task}-{i}",
                tokens(shape.prompt - (ragged and i % 4 < 2)),
                answers[i % LABELS],
                i,
            )
            for i in range(num_rows)
        ]
        self.num_rows = num_rows
        self.steps_per_epoch = -(-num_rows // shape.rows)
        self._batch = shape.rows

    def rows(self, step: int, rank: int, world: int) -> list[EncodedRow]:
        start = step % self.steps_per_epoch * self._batch
        return self.all[start : start + self._batch][rank::world]


def method_of(text: str) -> Any:
    """A method from `kind` or `kind:key=value,key=value`, as recipes spell keys and values."""
    kind, _, more = text.partition(":")
    chosen = method_class(kind)
    settings = {}
    for part in filter(None, more.split(",")):
        key, _, value = part.partition("=")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        settings[known_keys(chosen.Config)[key].field] = parsed
    return chosen(chosen.Config(**settings))


def make_config(spec: dict[str, Any], world: int) -> RunConfig:
    """The recipe of a benchmark.

    Of `spec`, `engine` (default: DeepSpeed from two ranks on), `micro` (rows; default: one
    micro-batch a step), `optimizer` and `checkpointing` may be left out.
    """
    shape = SHAPES[spec["shape"]]
    method = method_of(spec["method"])
    return RunConfig(
        name="bench",
        tasks=[TaskConfig(name=f"task{i}") for i in range(spec["tasks"])],
        model=ModelConfig(
            builder="tiny_t5", gradient_checkpointing=spec.get("checkpointing", False)
        ),
        adapter=AdapterConfig(rank=8, alpha=16.0, targets=spec["targets"], past=spec["past"]),
        method=method.config,
        engine=EngineConfig(
            kind=spec.get("engine", "plain" if world == 1 else "deepspeed"),
            zero_stage=spec["zero"],
        ),
        data=DataConfig(window_batches=1),
        train=TrainConfig(
            global_batch_size=shape.rows,
            micro_batch_size=spec.get("micro", -(-shape.rows // world)),
            optimizer=spec.get("optimizer", "adamw"),
        ),
        eval=EvalConfig(forward_transfer=False),
        checkpoint=CheckpointConfig(every_steps=None),
    )


def make_parts(spec: dict[str, Any], ranks: Ranks, folder: Path) -> Parts:
    """The pieces of a run, put together as `launch.execute.build` does."""
    shape = SHAPES[spec["shape"]]
    config = make_config(spec, ranks.world)
    method: Any = method_class(config.method.kind)(config.method)
    weights = method.trains == "weights"
    arithmetic = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    dtype = torch.float32 if weights else arithmetic
    base = base_model(shape, dtype, ranks.device)
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    adapted = (
        FullModel(base, method.weights, arithmetic, ranks.device.type)
        if weights
        else AdaptedModel(base, config.adapter, method.layer_scales)
    )
    engine = build_engine(config, ranks, adapted, method)
    run = RunDir(folder / f"run-{ranks.rank}")
    run.path.mkdir(parents=True)
    seq2seq = shape.kind == "t5"
    start = PAD if seq2seq else None
    rows = dict.fromkeys(spec["measured"], spec["rows"])
    return Parts(
        config=config,
        run=run,
        model_path="bench",
        tasks=[
            SimpleNamespace(
                name=task.name,
                num_eval=0,
                metric="exact_match",
                labels=tuple(f"label {i}" for i in range(LABELS)),
            )
            for task in config.tasks
        ],
        open_rows=lambda task, index: Rows(
            shape, index, rows.get(index, spec["simulated_rows"]), spec.get("ragged", False)
        ),
        adapted=adapted,
        engine=engine,
        past=Past(adapted, engine, choose_mode(config.adapter.past, dtype), method.merge),
        method=method,
        facts=ModelFacts(seq2seq, PAD, EOS, start),
        collator=Collator(seq2seq, PAD, start, EOS),
        evaluator=lambda view, tasks: [],
        recorder=Recorder(None),
        on_scores=lambda scores: {},
    )
