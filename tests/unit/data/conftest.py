"""Tiny tokenizers, and folders in the layouts of the field, made for each test."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from data_samples import Prepare, WriteRows, rows_of

from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.encode import Encoder
from accrete.pipeline.data.prepare import prepare_sequence

COMPACT = Path(__file__).parents[4] / "shared" / "data" / "compact"

TEXT = [
    "Decide which sentiment the text expresses. Answer with exactly one of the options.",
    "Option: good, bad, neutral, yes, no, True, False, World, Sports, Business",
    "Title: the quick brown fox jumps over the lazy dog near the river bank",
    "Text: a film of great warmth and wit, badly let down by its last half hour",
    "Answer: Output: Input: Definition: Task: Dataset: Now complete the following example -",
]


@pytest.fixture(scope="session")
def compact() -> Path:
    if not (COMPACT / "MANIFEST.json").is_file():
        pytest.skip(f"no real rows: {COMPACT} is absent")
    return COMPACT


def _pieces(**options: Any) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import T5Tokenizer

    sp = _pieces(vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    vocab = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)]
    folder = tmp_path_factory.mktemp("t5")
    T5Tokenizer(vocab=vocab).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaTokenizer

    options = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    sp = _pieces(vocab_size=420, model_type="bpe", byte_fallback=True, **options)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        if not piece.startswith("<")
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    folder = tmp_path_factory.mktemp("llama")
    LlamaTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte-level BPE with the space inside the word's token, as SmolLM2 and GPT-2 have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_rows() -> WriteRows:
    """Write rows as JSON lines, compressed as the name says."""

    def write(path: Path, rows: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        content = "".join(f"{line}\n" for line in lines).encode()
        if path.suffix == ".gz":
            content = gzip.compress(content)
        elif path.suffix == ".zst":
            import zstandard

            content = zstandard.ZstdCompressor().compress(content)
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def prepare(tmp_path: Path, write_rows: WriteRows, t5_folder: str) -> Prepare:
    """Prepare tasks whose files are made on demand; keyword arguments go to DataConfig."""

    def run(*tasks: TaskConfig, seed: int = 0, progress: Any = None, **data: Any) -> Any:
        for one in tasks:
            for split, name in (one.files or {}).items():
                path = tmp_path / str(name)
                if not path.exists():
                    start = 100 if split == "test" else 0
                    write_rows(path, rows_of(20 if split == "train" else 8, start=start))
        config = DataConfig(root=str(tmp_path), **data)
        cache = tmp_path / "cache"
        return prepare_sequence(list(tasks), config, t5_folder, True, cache, seed, progress)

    return run


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were tokenised from now on."""
    sizes: list[int] = []
    encode = Encoder.encode

    def watch(self: Encoder, prompts: Any, answers: Any) -> Any:
        sizes.append(len(prompts))
        return encode(self, prompts, answers)

    monkeypatch.setattr(Encoder, "encode", watch)
    return sizes
