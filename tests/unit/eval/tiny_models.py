"""A word tokenizer, tiny random models, and a `ModelView` that counts what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accrete.pipeline.data.collate import Batch, Collator
from accrete.pipeline.data.encode import EncodedRow
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats

PAD, EOS, UNKNOWN = 0, 1, 2
WORDS = ("yes", "Yes", "no", "world", "sports", "news", "business", *(f"w{i}" for i in range(24)))


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *WORDS]
    words = models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(kind: str) -> Any:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    size = len(WORDS) + 3
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=size,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=PAD,
                eos_token_id=EOS,
                decoder_start_token_id=PAD,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )


def collator(kind: str) -> Collator:
    return Collator(kind == "t5", PAD, PAD if kind == "t5" else None, EOS)


def learn(model: Any, rows: Sequence[EncodedRow], collate: Collator, steps: int) -> None:
    """Fit some rows, so that a model says something with an end token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = collate.train(rows)
    keep = batch.labels.shape[1]
    model.train()
    for _ in range(steps):
        logits = model(**batch.inputs).logits[:, -keep:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


class Ranks:
    """Several ranks as threads of one process; `gather` waits for all of them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world, timeout=60)
        self._values: list[Any] = [None] * world

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world
        errors: list[BaseException] = []

        def target(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@dataclass
class CountingView:
    """A view on a model (or on functions), for one rank."""

    model: Any
    seq2seq: bool
    rank: int = 0
    world: int = 1
    ranks: Ranks | None = None
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    """What was called, real rows, padded tokens."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        keep = batch.labels.shape[1]
        logits: torch.Tensor = self.model(**batch.inputs).logits.float()
        width = batch.inputs["input_ids"].shape[1] + (keep if self.seq2seq else 0)
        self.calls.append(("logits", batch.real_rows, batch.labels.shape[0] * width))
        return logits[:, -keep:]

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[list[int]]:
        inputs = batch.inputs
        width = inputs["input_ids"].shape[1] + max_new_tokens
        self.calls.append(("generate", batch.real_rows, batch.labels.shape[0] * width))
        found = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        skip = 1 if self.seq2seq else inputs["input_ids"].shape[1]
        return [until_end(tokens) for tokens in found[:, skip:].tolist()]

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.ranks is None else self.ranks.gather(self.rank, value)


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


class ListedRows:
    """Evaluation rows in memory."""

    def __init__(self, rows: list[EncodedRow], references: list[tuple[str, ...]]) -> None:
        self._rows = rows
        self._references = references
        self.lengths = [len(row.prompt) + len(row.answer) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Sequence[int]) -> list[EncodedRow]:
        return [self._rows[i] for i in indices]

    def references(self, index: int) -> tuple[str, ...]:
        return self._references[index]


def handle(name: str, metric: Any = "exact_match", num_rows: int = 1) -> TaskHandle:
    split = SplitStats(
        rows=num_rows,
        truncated_pct=0.0,
        mean_prompt_tokens=1.0,
        max_prompt_tokens=1,
        mean_answer_tokens=1.0,
        max_answer_tokens=1,
    )
    return TaskHandle(
        name=name,
        metric=metric,
        labels=None,
        train_dir=f"{name}/train",
        eval_dir=f"{name}/eval",
        num_train=num_rows,
        num_eval=num_rows,
        streamed=False,
        stats=TaskStats(train=split, eval=split),
        fingerprint=name,
    )
