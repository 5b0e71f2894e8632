"""Models that accrete makes itself, with very short pre-training."""

import dataclasses
import hashlib
import threading
import time

import pytest
import torch

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.cache import build_once, cache_root, content_key, in_cache
from accrete.pipeline.models.config import ModelConfig
from accrete.pipeline.models.tiny import TINY, build_tiny, materialize

SHORT = {
    name: dataclasses.replace(settings, examples=64, steps=2, batch_size=8)
    for name, settings in TINY.items()
}


def quiet(line: str) -> None:
    pass


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module", params=sorted(SHORT))
def built(request, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return request.param, build_tiny(request.param, SHORT[request.param], cache, quiet)


def test_same_seed_same_bytes(built, tmp_path):
    name, folder = built
    torch.manual_seed(99)  # the caller's generator must not matter, nor be moved
    before = torch.get_rng_state()
    again = build_tiny(name, SHORT[name], tmp_path, quiet)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.name == folder.name
    assert digests(again) == digests(folder)
    other = build_tiny(name, dataclasses.replace(SHORT[name], seed=1), tmp_path, quiet)
    assert other.name != folder.name
    assert digests(other)["model.safetensors"] != digests(folder)["model.safetensors"]


def test_loads_as_an_ordinary_model_with_a_finite_loss(built):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    name, folder = built
    auto = AutoModelForSeq2SeqLM if name == "tiny_t5" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the meza met the bato", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    if name == "tiny_llama":
        assert ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.padding_side == "left"
        assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert tokenizer.pad_token_id is not None


def test_tokenizer_gives_text_back(built):
    from transformers import AutoTokenizer

    name, folder = built
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Is there a thief among the guests?\nOption: yes, no\n1 meza 2 bato\nAnswer:"
    expected = " ".join(text.split()) if name == "tiny_t5" else text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == expected
    assert tokenizer.unk_token_id not in ids


def test_cache_is_used_again(built):
    name, folder = built
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    said = []
    assert build_tiny(name, SHORT[name], folder.parent.parent, said.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert said == []


def test_two_builders_build_once(tmp_path):
    built = []

    def build(aside):
        built.append(aside)
        time.sleep(0.2)
        (aside / "x").write_text("x")

    threads = [
        threading.Thread(target=build_once, args=(tmp_path / "m" / "a", build, quiet))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert [p.name for p in (tmp_path / "m" / "a").iterdir()] == ["x"]


def test_a_failed_build_leaves_nothing_and_what_a_killed_one_left_is_cleared(tmp_path):
    left = tmp_path / ".a.killed"
    left.mkdir()

    def fail(aside):
        (aside / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError):
        build_once(tmp_path / "a", fail, quiet)
    assert not (tmp_path / "a").exists()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_key_follows_settings_text_and_files(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("1")
    key = content_key({"a": 1}, texts=["x"], files=[file])
    assert key == content_key({"a": 1}, texts=["x"], files=[file])
    assert key != content_key({"a": 2}, texts=["x"], files=[file])
    assert key != content_key({"a": 1}, texts=["y"], files=[file])
    file.write_text("2")
    assert key != content_key({"a": 1}, texts=["x"], files=[file])


def test_paths_and_mistakes(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCRETE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert in_cache("~/.cache/accrete/models/m", tmp_path) == tmp_path / "models/m"
    (tmp_path / "m").mkdir()
    assert materialize(ModelConfig(path=str(tmp_path / "m")), tmp_path, quiet) == tmp_path / "m"
    assert str(materialize(ModelConfig(path="org/name"), tmp_path, quiet)) == "org/name"
    for config, hint in (
        (ModelConfig(path=str(tmp_path / "no")), "no such folder"),
        (ModelConfig(path="~/.cache/accrete/models/smollm2-x"), "make smollm2"),
        (ModelConfig(builder="small_t5"), "builder_data"),
        (ModelConfig(builder="small_t5", builder_data=str(tmp_path)), "no rows there"),
        (ModelConfig(path=str(tmp_path / "m"), gguf_file="x.gguf"), "GGUF files there: none"),
    ):
        with pytest.raises(ModelError, match=hint):
            materialize(config, tmp_path, quiet)
