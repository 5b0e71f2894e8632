"""From prompt and answer to token ids, once per row.

The start and end tokens are written here and never left to a tokenizer's own template, which
differs between versions and classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accrete.pipeline.data.prompts import Prompt
from accrete.pipeline.errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as the model sees it."""

    id: str
    prompt: list[int]
    """Encoder-decoder: ends with the end token. Decoder: begins with the start token, if any."""
    answer: list[int]
    """Ends with the end token."""
    index: int
    """Number of the row in its prepared split."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What became of one prompt and its answer."""

    prompt: list[int]
    answer: list[int]
    cut: bool
    """Text was left out of the prompt."""
    answer_tokens: int
    """Length of the whole answer with its end token; `answer` may be shorter."""
    fits: bool
    """False: the prompt is too long even without its text."""
    unknown: bool
    """The tokenizer has no token for a part of the answer."""


def load_tokenizer(path: str, options: Mapping[str, str] | None = None) -> Any:
    """A tokenizer from a folder or the hub.

    Args:
        path: Folder or hub id.
        options: Further arguments of `AutoTokenizer.from_pretrained`: `revision`, `gguf_file`.

    Raises:
        ModelError: It cannot be loaded, or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        # Without a word about remote code transformers would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **(options or {}))
    except Exception as error:  # transformers raises ValueError, OSError, ImportError, ...
        raise ModelError(
            f"tokenizer {path}: cannot be loaded: {type(error).__name__}: {error}\n"
            "It needs tokenizer.json (or what AutoTokenizer accepts); set model.tokenizer."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer {path}: it has no end token, without which no answer would ever end. "
            "Set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything in a tokenizer that decides ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps([vocabulary, ends]).encode()).hexdigest()


class Encoder:
    """Tokenises prompts and answers of one model kind."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        seq2seq: bool,
        max_source_tokens: int,
        max_target_tokens: int,
        cut: str = "end",
    ) -> None:
        self._tokenizer = tokenizer
        self._seq2seq = seq2seq
        self._cap = max_source_tokens
        self._target_cap = max_target_tokens
        self._cut_start = cut == "start"
        bos = tokenizer.bos_token_id
        self._head = [] if seq2seq or bos is None else [int(bos)]
        self._eos = int(tokenizer.eos_token_id)
        self._unknown = tokenizer.unk_token_id
        self._tail = [self._eos] if seq2seq else []
        self._gap = "" if seq2seq else self._find_gap()

    def _find_gap(self) -> str:
        """What goes between cue and answer so that ids of the parts are ids of the whole.

        The space belongs to the answer: byte-level BPE keeps it in the word's token, so it must be
        given; tokenizers that mark word beginnings add it themselves.
        """
        cue, bare, spaced, whole = self._ids(["Answer:", "yes", " yes", "Answer: yes"])
        if cue + spaced != whole and cue + bare == whole:
            return ""
        return " "

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # transformers fails on an empty list
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return [list(map(int, ids)) for ids in found]

    def check_frame(self, prompt: Prompt) -> None:
        """Make sure that some text fits beside a prompt's fixed parts.

        Raises:
            DataError: It does not.
        """
        fixed = len(self._ids([prompt.prefix + prompt.suffix])[0]) + self._specials
        if fixed >= self._cap:
            raise DataError(
                f"instruction, options and answer cue alone take {fixed} tokens, "
                f"data.max_source_tokens is {self._cap}: no text fits. Raise it, or use a "
                "shorter instruction or template."
            )

    @property
    def _specials(self) -> int:
        return len(self._head) + len(self._tail)

    def encode(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Encoding]:
        """Tokenise a batch of rows.

        Only the text of a prompt is cut, at the side that was asked for, so that the prompt has at
        most `max_source_tokens` ids with start and end token. An answer longer than
        `max_target_tokens` keeps its beginning and its end token.
        """
        whole = self._ids([str(prompt) for prompt in prompts])
        room = self._cap - self._specials
        long = [i for i, ids in enumerate(whole) if len(ids) > room]
        cut = dict(zip(long, self._cut([prompts[i] for i in long], room), strict=True))
        said = self._ids(
            [self._gap + answer.strip() if answer.strip() else "" for answer in answers]
        )
        rows = []
        for i, (ids, answer) in enumerate(zip(whole, said, strict=True)):
            kept = cut.get(i, ids)
            rows.append(
                Encoding(
                    prompt=self._head + (kept or []) + self._tail,
                    answer=[*answer[: self._target_cap - 1], self._eos],
                    cut=i in cut,
                    answer_tokens=len(answer) + 1,
                    fits=kept is not None,
                    unknown=self._unknown in answer,
                )
            )
        return rows

    def _cut(self, prompts: Sequence[Prompt], room: int) -> list[list[int] | None]:
        """Ids of over-long prompts with a part of their text left out; None: still too long."""
        if not prompts:
            return []
        if not self._tokenizer.is_fast:
            return [self._cut_parts(prompt, room) for prompt in prompts]
        found = self._tokenizer(
            [str(prompt) for prompt in prompts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        return [
            _drop(list(ids), spans, prompt, room, self._cut_start)
            for ids, spans, prompt in zip(
                found["input_ids"], found["offset_mapping"], prompts, strict=True
            )
        ]

    def _cut_parts(self, prompt: Prompt, room: int) -> list[int] | None:
        """The same for tokenizers that do not say which characters a token stands for."""
        prefix, text, suffix = self._ids([prompt.prefix, prompt.text, prompt.suffix])
        left = room - len(prefix) - len(suffix)
        if left < 0:
            return None
        return prefix + (text[len(text) - left :] if self._cut_start else text[:left]) + suffix


def _drop(
    ids: list[int], spans: Sequence[tuple[int, int]], prompt: Prompt, room: int, at_start: bool
) -> list[int] | None:
    """Leave out the last (or first) tokens of the text, whole characters at a time.

    A token that reaches over an edge of the text belongs to the fixed part and stays.
    """
    start = len(prompt.prefix)
    end = start + len(prompt.text)
    inside = [i for i, (a, b) in enumerate(spans) if start <= a and b <= end and a < b]
    if not inside:
        return None
    # Among them, but without a span, are spaces where offsets are trimmed, as BART's are.
    if len(ids) - (inside[-1] + 1 - inside[0]) > room:
        return None
    if at_start:
        first = inside[0]
        last = first + (len(ids) - room)
        while last <= inside[-1] and spans[last][0] < spans[last - 1][1]:
            last += 1
        return ids[:first] + ids[last:]
    last = inside[-1] + 1
    first = last - (len(ids) - room)
    while first > inside[0] and spans[first][0] < spans[first - 1][1]:
        first -= 1  # a character of several byte tokens goes as a whole
    return ids[:first] + ids[last:]
