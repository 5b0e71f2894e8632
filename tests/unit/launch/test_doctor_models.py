"""Which files of a model are missing, which are downloaded, and how large a run becomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from accrete.launch.doctor.model_files import hub_id, missing_files, wanted_patterns
from accrete.launch.doctor.space import FLOOR, bytes_needed, count_parameters
from accrete.pipeline.config.load import load_recipe


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


def test_space_grows_with_what_is_trained(tmp_path: Path) -> None:
    assert count_parameters(tmp_path) is None
    weights = {"a": np.zeros((1000, 300), np.float16), "b": np.zeros(7, np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    assert count_parameters(tmp_path) == 300_007
    config = load_recipe("quickstart").config
    few = bytes_needed(config, tmp_path)
    whole = load_recipe("quickstart", ["method=full"]).config
    many = bytes_needed(whole, tmp_path)
    more = bytes_needed(replace(whole, tasks=whole.tasks * 3), tmp_path)
    assert few is not None
    assert many is not None
    assert more is not None
    assert FLOOR < few < many < more
    # Two moments and the weights, in fp32, three times while a step checkpoint is written.
    assert many - FLOOR > 300_007 * 4 * 3 * 3
    assert bytes_needed(config, None) is None
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    assert count_parameters(tmp_path) is None
