"""A tiny encoder-decoder with a vocabulary of whole words, for plans and short runs of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

COMPACT = Path(__file__).resolve().parents[3] / "shared" / "data" / "compact"


@pytest.fixture(scope="session")
def compact() -> Path:
    if not (COMPACT / "MANIFEST.json").is_file():
        pytest.skip(f"no real rows: {COMPACT} is absent")
    return COMPACT


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("recipe-t5")
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "A", "B", "yes", "no"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(vocab),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared rows for all recipes: orders of one benchmark share it."""
    return tmp_path_factory.mktemp("recipe-cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCRETE_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
