"""Train a sentencepiece vocabulary and wrap it as a Hugging Face tokenizer.

The tokenizers are built from the pieces: transformers 5 silently ignores a sentencepiece model
file that is given to its T5 and LLaMA classes.
"""

from __future__ import annotations

import io
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

MARK = "\u2581"
"""What sentencepiece writes for the space before a word."""
_ASCII = "".join(c for c in string.printable if not c.isspace())


def frequent_words(lines: Iterable[str], least: int) -> list[str]:
    """Words of two letters or more that occur `least` times, without punctuation at their end."""
    counts = Counter(word.rstrip(",.?") for line in lines for word in line.split())
    return sorted(word for word, count in counts.items() if count >= least and len(word) > 1)


def build_unigram(lines: Sequence[str], vocab_size: int, words: Sequence[str] = ()) -> Any:
    """A T5 tokenizer (unigram, pad 0, eos 1, unk 2, no sentinels).

    Args:
        lines: Training text.
        vocab_size: Most pieces; fewer if the text does not give so many.
        words: Words that must be one piece each.

    Returns:
        A `T5Tokenizer`. It maps every run of white space to one space.
    """
    from transformers import T5Tokenizer

    processor = _train(
        lines,
        vocab_size=vocab_size,
        model_type="unigram",
        user_defined_symbols=[MARK + word for word in words],
        required_chars=_ASCII,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    pieces = [
        (processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_bpe(lines: Sequence[str], vocab_size: int) -> Any:
    """A LLaMA tokenizer (byte-level fallback BPE, unk 0 as padding, bos 1, eos 2, left padding).

    Args:
        lines: Training text; spaces and line breaks are kept as they are.
        vocab_size: Pieces, of which 256 are single bytes.

    Returns:
        A `LlamaTokenizer` that writes the start token in front and no end token.
    """
    from transformers import LlamaTokenizer

    processor = _train(
        lines,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    size = processor.vocab_size()
    vocab = {processor.id_to_piece(i): i for i in range(size)}
    merges = [
        (piece[:cut], piece[cut:])
        for i in range(size)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
        for piece in [processor.id_to_piece(i)]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        add_eos_token=False,
        pad_token="<unk>",
        padding_side="left",
    )


def _train(lines: Sequence[str], **settings: Any) -> Any:
    """Train in memory. One thread: another number gives other ids for the same text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
