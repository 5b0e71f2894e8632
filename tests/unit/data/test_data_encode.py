"""Token ids: special tokens, the boundary of prompt and answer, and the cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from accrete.pipeline.data.encode import Encoder, load_tokenizer, tokenizer_hash
from accrete.pipeline.data.prompts import Prompt
from accrete.pipeline.errors import DataError, ModelError

PROMPT = Prompt("Decide.\nOption: good, bad\n", "Text: the quick brown fox " * 30, "\nAnswer:")
SHORT = Prompt(PROMPT.prefix, "Text: the fox", PROMPT.suffix)


@pytest.fixture(params=["t5", "llama", "bytes"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(kind: str, request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(request.getfixturevalue(f"{kind}_folder"))


def encoder(
    tokenizer: Any, kind: str, cap: int = 512, target: int = 50, cut: str = "end"
) -> Encoder:
    return Encoder(
        tokenizer,
        seq2seq=kind == "t5",
        max_source_tokens=cap,
        max_target_tokens=target,
        cut=cut,
    )


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_special_tokens_and_whole_text(kind: str, tokenizer: Any) -> None:
    (row,) = encoder(tokenizer, kind).encode([SHORT], ["good"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    body = plain(tokenizer, str(SHORT))
    assert row.prompt == ([*body, eos] if kind == "t5" else [bos, *body])
    assert row.answer[-1] == eos
    assert row.answer.count(eos) == 1
    assert (row.cut, row.fits, row.answer_tokens) == (False, True, len(row.answer))


def test_prompt_and_answer_join_as_the_whole_text_would(kind: str, tokenizer: Any) -> None:
    """`enc(prompt) + enc(answer) == enc(prompt + " " + answer)`: the space is the answer's."""
    (row,) = encoder(tokenizer, kind).encode([SHORT], ["good"])
    joined = row.prompt[:-1] if kind == "t5" else row.prompt[1:]
    assert joined + row.answer[:-1] == plain(tokenizer, f"{SHORT} good")


def test_answer_is_stripped_and_may_be_blank(kind: str, tokenizer: Any) -> None:
    rows = encoder(tokenizer, kind).encode([SHORT] * 3, ["good", "  good\n", " "])
    assert rows[0].answer == rows[1].answer
    assert rows[2].answer == [tokenizer.eos_token_id]


@pytest.mark.parametrize("cap", [60, 61, 62, 75])
def test_cut_keeps_options_and_cue_and_fills_the_cap(kind: str, tokenizer: Any, cap: int) -> None:
    (row,) = encoder(tokenizer, kind, cap).encode([PROMPT], ["good"])
    assert row.cut
    assert len(row.prompt) == cap
    body = row.prompt[:-1] if kind == "t5" else row.prompt[1:]
    text = tokenizer.decode(body, skip_special_tokens=True)
    assert text.replace("\n", " ").split()[:4] == ["Decide.", "Option:", "good,", "bad"]
    assert text.rstrip().endswith("Answer:")
    # the kept ids are the beginning and the end of the whole prompt's ids
    whole = plain(tokenizer, str(PROMPT))
    tail = len(plain(tokenizer, PROMPT.suffix))
    keep = next(i for i, (a, b) in enumerate(zip(body, whole, strict=False)) if a != b)
    assert body == whole[:keep] + whole[len(whole) - (len(body) - keep) :]
    assert len(body) - keep <= tail


def test_a_row_at_the_cap_is_not_cut(kind: str, tokenizer: Any) -> None:
    (row,) = encoder(tokenizer, kind).encode([SHORT], ["good"])
    (same,) = encoder(tokenizer, kind, len(row.prompt)).encode([SHORT], ["good"])
    (less,) = encoder(tokenizer, kind, len(row.prompt) - 1).encode([SHORT], ["good"])
    assert not same.cut
    assert same.prompt == row.prompt
    assert less.cut
    assert len(less.prompt) == len(row.prompt) - 1


def test_cut_in_a_batch_touches_only_long_rows(kind: str, tokenizer: Any) -> None:
    rows = encoder(tokenizer, kind, 80).encode([SHORT, PROMPT, SHORT], ["good", "bad", "good"])
    assert [row.cut for row in rows] == [False, True, False]
    assert rows[0] == rows[2]


def test_no_character_is_split(bytes_folder: str) -> None:
    tokenizer = load_tokenizer(bytes_folder)
    prompt = Prompt("Q: ", "漢字" * 40, "\nAnswer:")
    for cap in range(40, 52):
        (row,) = encoder(tokenizer, "bytes", cap).encode([prompt], ["good"])
        assert cap - 4 <= len(row.prompt) <= cap
        assert "\ufffd" not in tokenizer.decode(row.prompt)


def test_too_long_without_any_text(kind: str, tokenizer: Any) -> None:
    tight = encoder(tokenizer, kind, 8)
    with pytest.raises(DataError, match=r"alone take \d+ tokens, data\.max_source_tokens is 8"):
        tight.check_frame(Prompt(PROMPT.prefix, "", PROMPT.suffix))
    (row,) = tight.encode([PROMPT], ["good"])
    assert not row.fits
    encoder(tokenizer, kind, 100).check_frame(Prompt(PROMPT.prefix, "", PROMPT.suffix))


def test_long_answers_keep_their_end_token(kind: str, tokenizer: Any) -> None:
    (row,) = encoder(tokenizer, kind, target=4).encode([SHORT], ["the quick brown fox jumps"])
    assert len(row.answer) == 4
    assert row.answer[-1] == tokenizer.eos_token_id
    assert row.answer_tokens > 4


def test_slow_tokenizers_are_cut_by_parts(bytes_folder: str) -> None:
    class Slow:
        """The same tokenizer, without character positions."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.bos_token_id, self.eos_token_id = inner.bos_token_id, inner.eos_token_id
            self.unk_token_id = inner.unk_token_id

        def __call__(self, texts: list[str], **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.inner(texts, **options)

    fast = load_tokenizer(bytes_folder)
    for cap, cut in ((50, "end"), (70, "end"), (50, "start"), (70, "start")):
        makers = [encoder(t, "bytes", cap, cut=cut) for t in (fast, Slow(fast))]
        rows = [maker.encode([PROMPT], ["good"])[0] for maker in makers]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("cap", [60, 61, 75])
def test_cut_at_the_start_keeps_the_end_of_the_text(kind: str, tokenizer: Any, cap: int) -> None:
    words = " ".join(f"fox {i}" for i in range(60))
    prompt = Prompt("Decide.\nOption: good, bad\n", words, "\nAnswer:")
    (row,) = encoder(tokenizer, kind, cap, cut="start").encode([prompt], ["good"])
    (other,) = encoder(tokenizer, kind, cap).encode([prompt], ["good"])
    assert row.cut
    assert {len(row.prompt), len(other.prompt)} <= {cap - 1, cap}  # whole characters
    body = row.prompt[:-1] if kind == "t5" else row.prompt[1:]
    whole = plain(tokenizer, str(prompt))
    kept = next(n for n in range(len(body)) if body[n] != whole[n])
    # From the first cut token on it is the end of the whole prompt, text and cue.
    assert body[kept:] == whole[len(whole) - (len(body) - kept) :]
    assert row.answer == other.answer


def test_cut_at_the_start_leaves_no_half_characters(bytes_folder: str) -> None:
    tokenizer = load_tokenizer(bytes_folder)
    prompt = Prompt("Decide: ", "жаба " * 40, "\nAnswer:")
    for cap in range(40, 52):
        (row,) = encoder(tokenizer, "bytes", cap, cut="start").encode([prompt], ["good"])
        said = tokenizer.decode(row.prompt[1:])
        assert "\ufffd" not in said
        assert len(row.prompt) <= cap
        assert said.endswith("\nAnswer:")


def test_spaces_without_offsets_can_be_cut(tmp_path: Path, bytes_folder: str) -> None:
    """Trimmed offsets, as BART has them, give a token of spaces no character of the text."""
    settings = json.loads((Path(bytes_folder) / "tokenizer.json").read_text())
    settings["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    shutil.copytree(bytes_folder, tmp_path / "trimmed")
    (tmp_path / "trimmed" / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path / "trimmed"))
    text = "|       yes       | no |\n" * 60
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert sum(a == b for a, b in spans) > len(spans) / 3
    prompt = Prompt("Decide.\n", text, "\nAnswer:")
    for cut in ("end", "start"):
        (row,) = encoder(tokenizer, "bytes", 100, cut=cut).encode([prompt], ["good"])
        said = tokenizer.decode(row.prompt[1:])
        assert (row.fits, row.cut, len(row.prompt)) == (True, True, 100)
        assert said.startswith("Decide.\n")
        assert said.endswith("\nAnswer:")


def test_code_that_comes_with_a_tokenizer_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "odd"}')
    settings = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "odd.py").write_text("raise AssertionError('was run')\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    with pytest.raises(ModelError, match="custom code"):
        load_tokenizer(str(tmp_path))
    assert asked == []


def test_bad_tokenizers(tmp_path: Any, bytes_folder: str) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer = load_tokenizer(bytes_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_tokenizer_hash_depends_on_what_decides_ids(t5_folder: str, llama_folder: str) -> None:
    one, other = load_tokenizer(t5_folder), load_tokenizer(llama_folder)
    assert tokenizer_hash(one) == tokenizer_hash(load_tokenizer(t5_folder))
    assert tokenizer_hash(one) != tokenizer_hash(other)
    before = tokenizer_hash(one)
    one.add_tokens(["newword"])
    assert tokenizer_hash(one) != before
