"""Write a model folder without drawing progress bars over the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_model_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        folder: Existing folder.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
