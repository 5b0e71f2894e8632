"""Which files of a model are missing, which are downloaded, and how large a run becomes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from accrete.launch.doctor.fetch import _require_network
from accrete.launch.doctor.model_files import hub_id, missing_files, wanted_patterns
from accrete.launch.doctor.offline import SWITCHES
from accrete.launch.doctor.space import FLOOR, bytes_needed
from accrete.pipeline.config.load import load_recipe
from accrete.pipeline.errors import InputError


def test_a_whole_model_and_what_it_may_lack(tmp_path: Path) -> None:
    assert missing_files(tmp_path) == ["config.json", "model.safetensors"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert missing_files(tmp_path) == []
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "nowhere")
    assert missing_files(tmp_path) == ["model.safetensors"]


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (tmp_path / shards["a"]).touch()
    assert missing_files(tmp_path) == [shards["b"]]
    (tmp_path / shards["b"]).touch()
    assert missing_files(tmp_path) == []
    index.write_text("{")
    assert missing_files(tmp_path) == ["model.safetensors.index.json (damaged)"]


def test_one_format_of_weights_is_downloaded() -> None:
    files = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors"]
    allowed, ignored = wanted_patterns(files)
    assert "*.safetensors" in allowed
    assert "pytorch_model*.bin" not in allowed
    assert "*/*" in ignored
    allowed, _ = wanted_patterns(["config.json", "pytorch_model.bin"])
    assert "pytorch_model*.bin" in allowed


def test_hub_ids(tmp_path: Path) -> None:
    assert hub_id("google-t5/t5-large", tmp_path) == "google-t5/t5-large"
    for folder in (str(tmp_path), "./here", "~/there"):
        assert hub_id(folder, tmp_path) is None


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("TRUE", True), ("false", False)])
def test_who_is_offline_cannot_fetch(
    monkeypatch: pytest.MonkeyPatch, value: str, refused: bool
) -> None:
    """As the libraries themselves read it."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") if refused else nullcontext():
        _require_network()


def test_space_grows_with_what_is_written(tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
    ).save_pretrained(tmp_path)

    def needed(*overrides: str, copies: int = 1) -> int:
        config = load_recipe("quickstart", overrides).config
        found = bytes_needed(replace(config, tasks=config.tasks * copies), tmp_path)
        assert found is not None
        return found - FLOOR

    steps = "checkpoint.every_steps=5"
    few, many = needed("method=sequential"), needed("method=full")
    assert 0 < few < needed("method=ewc_lora") < many < needed("method=gpm")
    assert few < needed("method=sequential", copies=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    # Two moments and the weights in fp32, once more while a step checkpoint is written.
    assert needed("method=full", steps, "checkpoint.keep=2") - many == 3 * 3 * weights


def test_space_is_unknown_without_a_configuration(tmp_path: Path) -> None:
    config = load_recipe("quickstart").config
    assert bytes_needed(config, None) is None
    assert bytes_needed(config, tmp_path) is None
