"""Whether a model is on this machine, whole: a folder, or a snapshot in the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

from accrete.pipeline.models.cache import in_cache

CONFIG = "config.json"
WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""In the order in which transformers looks for them: one file, or an index of several."""
SKIPPED = ("onnx/*", "openvino/*", "original/*", "gguf/*", "coreml/*", "*.gguf", "*.onnx")
"""Weights in formats that are not used here."""


def hub_id(path: str, cache: Path) -> str | None:
    """The hub id that a recipe's `model.path` or `model.tokenizer` means; None for a folder."""
    looks_local = path.startswith((".", "/", "~"))
    return None if looks_local or in_cache(path, cache).is_dir() else path


def snapshot_folder(repo: str, revision: str | None, file: str = CONFIG) -> Path | None:
    """The folder of a hub repository in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:
        return None
    # A file that the hub is known not to have is a marker object instead of a path.
    return Path(found).parent if isinstance(found, str) else None


def missing_files(folder: Path) -> list[str]:
    """Files of a model that are not in its folder; of a hub's cache also links to nowhere."""
    missing = [] if (folder / CONFIG).is_file() else [CONFIG]
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return missing
        if (folder / index).is_file():
            shards = _shards(folder / index)
            if not shards:
                return [*missing, f"{index} (damaged)"]
            return [*missing, *(name for name in shards if not (folder / name).is_file())]
    return [*missing, WEIGHTS[0][0]]


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    return sorted(set(names))


def wanted_patterns(files: list[str]) -> tuple[list[str], list[str]]:
    """What to download of a model's repository: patterns to allow and to ignore.

    Weights come in one format: safetensors, or PyTorch's own where there is nothing else.
    """
    top = [name for name in files if "/" not in name]
    safe = any(name.endswith(".safetensors") for name in top)
    weights = ["*.safetensors", "*.safetensors.index.json"]
    if not safe:
        weights = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
    return [*weights, "*.json", "*.model", "*.txt", "*.jinja"], [*SKIPPED, "*/*"]
