"""The live, sharded model as the scorer sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from accrete.pipeline.distributed import comm
from accrete.pipeline.stage import aligned_logits

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache

    from accrete.pipeline.data.collate import Batch
    from accrete.pipeline.distributed.engine import Engine
    from accrete.pipeline.models.load import ModelFacts
    from accrete.pipeline.models.lora import AdaptedModel


class LiveModel:
    """`scoring.ModelView` over an engine. Every forward is a collective at ZeRO 3."""

    def __init__(
        self, engine: Engine, adapted: AdaptedModel, facts: ModelFacts, synced: bool
    ) -> None:
        """Wrap an engine.

        Args:
            engine: Holds the model.
            adapted: The model that it holds.
            facts: Its kind and special tokens.
            synced: Whether ranks must decode the same number of tokens (ZeRO 3).
        """
        self.rank, self.world = engine.rank, engine.world
        self.device = engine.device
        self.seq2seq = facts.seq2seq
        self._engine = engine
        self._adapted = adapted
        self._whole = not synced
        self._facts = facts
        self._synced = synced and engine.world > 1

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [b, K, V] in fp32, aligned with `batch.labels`."""
        self._engine.module.eval()
        return aligned_logits(
            self._engine.module,
            batch.to(self.device),
            self._facts.seq2seq,
            self._facts.unknown_inputs,
        )

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of every prompt, without the prompt and from the end token on."""
        self._engine.module.eval()
        inputs = batch.to(self.device).inputs
        with self._adapted.decoding(keep_casts=self._whole):
            sequences = self._engine.module.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                past_key_values=self._cache(),
                pad_token_id=self._facts.pad_id,
                eos_token_id=self._facts.eos_id,
                # As training has it: a checkpoint's generation_config.json may lack it, or name
                # another.
                decoder_start_token_id=self._facts.decoder_start_id,
                synced_gpus=self._synced,
            )
        skip = 1 if self.seq2seq else inputs["input_ids"].shape[1]
        return [self._until_end(tokens) for tokens in sequences[:, skip:].tolist()]

    def _cache(self) -> EncoderDecoderCache | None:
        """A cache that grows block by block, where transformers would size it by the encoder.

        It does for the T5 family: with a deeper decoder, `generate` ends in an IndexError.
        """
        config = self._engine.module.config
        if (getattr(config, "num_decoder_layers", None) or 0) <= getattr(config, "num_layers", 0):
            return None
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _until_end(self, tokens: list[int]) -> list[int]:
        return (
            tokens[: tokens.index(self._facts.eos_id)] if self._facts.eos_id in tokens else tokens
        )

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        return comm.gather(value, self.world)
