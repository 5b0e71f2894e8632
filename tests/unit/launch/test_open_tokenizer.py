"""What preparation reads of a model: its configuration and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accrete.launch.prepare import is_seq2seq, open_tokenizer
from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.config import ModelConfig
from accrete.pipeline.run_dir import RunDir, write_json


def test_a_tokenizer_that_is_gone_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    gone = tmp_path / "gone"
    write_json(run.prepared, {"model_path": str(tmp_path), "tokenizer_path": str(gone)})
    config: Any = SimpleNamespace(model=ModelConfig(path=str(tmp_path), tokenizer=str(gone)))
    with pytest.raises(ModelError, match=f"tokenizer {gone}: cannot be loaded"):
        open_tokenizer(run, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "llama", "hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"model_type": "llama", "num_attention_heads": 0}, "ZeroDivisionError"),
        ({"model_type": "llama", "torch_dtype": "float17"}, "no attribute 'float17'"),
        ({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}, "runs no code"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    write_json(tmp_path / "config.json", settings)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    with pytest.raises(ModelError) as caught:
        is_seq2seq(str(tmp_path), None)
    assert f"model.path {tmp_path}: its configuration cannot be read" in str(caught.value)
    assert said in str(caught.value)
    assert asked == []
