"""Small models and rows for the tests of the forecast."""

from __future__ import annotations

from typing import Any

from accrete.launch.forecast.rows import TaskRows
from accrete.launch.forecast.shapes import ModelPlan
from accrete.launch.forecast.trace import BatchShape
from accrete.pipeline.config.run import EvalConfig, RunConfig, TrainConfig
from accrete.pipeline.data.config import TaskConfig
from accrete.pipeline.distributed.config import EngineConfig
from accrete.pipeline.methods.registry import method_class
from accrete.pipeline.models.config import AdapterConfig, ModelConfig

WIDTH, INNER, VOCAB, HEADS, RANK = 32, 48, 64, 4, 5
BATCH = BatchShape(3, 10, 4)


def settings(kind: str, blocks: int = 2) -> Any:
    from transformers import LlamaConfig, T5Config

    if kind == "t5":
        return T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=INNER,
            num_layers=blocks,
            num_decoder_layers=blocks + 1,
            num_heads=HEADS,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def model_plan(kind: str, method: str = "sequential", blocks: int = 2, **changes: Any) -> ModelPlan:
    config = RunConfig(
        name="x",
        tasks=[TaskConfig(name=name) for name in ("a", "b", "c")],
        model=ModelConfig(builder="tiny_t5", **changes.pop("model", {})),
        adapter=AdapterConfig(rank=RANK, targets=changes.pop("targets", "qv")),
        method=method_class(method).Config(**changes.pop("method_settings", {})),
        engine=EngineConfig(**changes.pop("engine", {})),
        train=TrainConfig(**changes.pop("train", {"global_batch_size": 8})),
        eval=EvalConfig(forward_transfer=False),
    )
    return ModelPlan(config, settings(kind, blocks), "cpu")


def task(name: str = "a", train: int = 20, scored: int = 7) -> TaskRows:
    return TaskRows(
        name=name,
        train=train,
        scored=scored,
        prompt=8,
        answer=3,
        longest_prompt=10,
        longest_answer=4,
        padded_prompt=8,
        padded_answer=4,
        classes=2,
    )
