"""A GGUF file, written here by the `gguf` package, becomes an ordinary model folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.gguf import convert_gguf

VOCAB, WIDTH, HEADS, INNER, BLOCKS = 16, 32, 2, 64, 1
WORDS = ["<s>", "</s>", *[chr(ord("a") + i) for i in range(VOCAB - 3)], "ab"]


def tensors():
    draw = np.random.default_rng(0)

    def matrix(*shape):
        return draw.normal(0, 0.05, shape).astype(np.float32)

    found = {"token_embd.weight": matrix(VOCAB, WIDTH), "output_norm.weight": np.ones(WIDTH, "f4")}
    for block in range(BLOCKS):
        name = f"blk.{block}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"{name}{part}.weight"] = matrix(WIDTH, WIDTH)
        found[f"{name}ffn_gate.weight"] = matrix(INNER, WIDTH)
        found[f"{name}ffn_up.weight"] = matrix(INNER, WIDTH)
        found[f"{name}ffn_down.weight"] = matrix(WIDTH, INNER)
        found[f"{name}attn_norm.weight"] = np.ones(WIDTH, "f4")
        found[f"{name}ffn_norm.weight"] = np.full(WIDTH, 0.5, "f4")
    return found


@pytest.fixture
def folder(tmp_path):
    """A folder with `tiny.gguf`: the LLaMA architecture, a byte-pair vocabulary, fp32 weights."""
    import gguf

    path = tmp_path / "model"
    path.mkdir()
    writer = gguf.GGUFWriter(str(path / "tiny.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in tensors().items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_becomes_an_ordinary_folder(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    made = convert_gguf(str(folder), "tiny.gguf", None, tmp_path / "cache", said.append)
    assert any("tiny.gguf" in line for line in said)
    assert list(made.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(made)
    weights = tensors()
    state = model.state_dict()
    assert model.dtype == torch.float32
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ):
        assert torch.equal(state[ours], torch.from_numpy(weights[theirs])), ours
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [
        WORDS.index("ab"),
        WORDS.index("c"),
    ]
    # Made once: the second call finds it.
    again = convert_gguf(str(folder), "tiny.gguf", None, tmp_path / "cache", said.append)
    assert again == made
    assert len([line for line in said if "Converting" in line]) == 1


def test_says_which_files_there_are(folder, tmp_path):
    with pytest.raises(ModelError, match=r"GGUF files there: tiny\.gguf"):
        convert_gguf(str(folder), "other.gguf", None, tmp_path / "cache", print)


def test_says_that_a_file_is_none(folder, tmp_path):
    (folder / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot read it"):
        convert_gguf(str(folder), "broken.gguf", None, tmp_path / "cache", print)
