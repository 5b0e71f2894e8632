"""The tokenizer of a prepared run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accrete.launch.prepare import open_tokenizer
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
