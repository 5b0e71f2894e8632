"""Models that accrete makes itself, and the one door to any model folder: `materialize`.

The tiny models are a T5 and a LLaMA of about a quarter of a million parameters that know the
language of `data.generated`: its words, to heed an instruction, to answer with an option, to copy.
They are pre-trained from seed 0 on `data.pretraining` (a fixed number of steps, 35 to 55 s of one
CPU core) and know none of the tasks that they are later tuned on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.cache import Progress, build_once, content_key, in_cache

if TYPE_CHECKING:
    from accrete.pipeline.data.prompts import Prompt
    from accrete.pipeline.models.config import ModelConfig

PACKAGES = ("sentencepiece", "tokenizers", "torch", "transformers")
"""Distributions whose versions may change the bytes of a built model."""


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """Everything that a tiny model depends on beside the generated text."""

    kind: Literal["t5", "llama"]
    width: int = 64
    layers: int = 2
    heads: int = 4
    inner: int = 160
    vocab_size: int
    """Most pieces of the vocabulary."""
    examples: int = 19_200
    """Pre-training examples, passed over three times."""
    steps: int = 1_800
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


TINY = {
    "tiny_t5": TinySettings(kind="t5", vocab_size=512, learning_rate=2e-3),
    "tiny_llama": TinySettings(kind="llama", vocab_size=800),
}


def materialize(model: ModelConfig, cache: Path, progress: Progress) -> Path:
    """The folder of an ordinary Hugging Face model; made or converted first if need be.

    Args:
        model: The recipe's model. A builder's model is made once and kept in the cache; a folder
            is checked; a hub id is given back unchanged; a GGUF file is converted once.
        cache: Cache folder, as `cache_root()` gives it.
        progress: Told what takes time.

    Returns:
        Folder with config.json, model.safetensors and the tokenizer's files, or a hub id.

    Raises:
        ModelError: A folder that is not there, or a model that cannot be made from what is given.
    """
    if model.builder in TINY:
        return build_tiny(model.builder, TINY[model.builder], cache, progress)
    if model.builder is not None:
        from accrete.pipeline.models.small_t5 import build_small_t5

        return build_small_t5(model.builder_data, cache, progress)
    if model.path is None:
        raise ModelError("The recipe names no model: set model.path or model.builder.")
    folder = in_cache(model.path, cache)
    if model.gguf_file is not None:
        from accrete.pipeline.models.gguf import convert_gguf

        source = str(folder) if folder.is_dir() else model.path
        return convert_gguf(source, model.gguf_file, model.revision, cache, progress)
    if folder.is_dir():
        return folder
    if model.path.startswith((".", "/", "~")):
        hint = " Fetch it with `make smollm2`." if "smollm2" in folder.name else ""
        raise ModelError(
            f"model.path {model.path}: there is no such folder.{hint} Give the folder of a Hugging "
            "Face model, or a hub id."
        )
    return Path(model.path)


def build_tiny(name: str, settings: TinySettings, cache: Path, progress: Progress) -> Path:
    """Make a tiny model, or find it in the cache.

    Args:
        name: First part of its folder's name.
        settings: Its sizes and its pre-training.
        cache: Cache folder.
        progress: Told how far it is.
    """
    from accrete.pipeline.data import generated, pretraining, prompts
    from accrete.pipeline.models import build_tokenizer, new_models, pretrain

    lines = _lines(settings)
    sources = [generated, pretraining, prompts, build_tokenizer, new_models, pretrain]
    key = content_key(
        asdict(settings),
        texts=lines,
        files=[Path(__file__), *(Path(str(module.__file__)) for module in sources)],
        packages=PACKAGES,
    )
    folder = cache / "models" / f"{name}-{key}"
    return build_once(folder, partial(_build, settings, lines, progress), progress)


def _build(settings: TinySettings, lines: Sequence[str], progress: Progress, folder: Path) -> None:
    from accrete.pipeline.models.build_tokenizer import build_bpe, build_unigram, frequent_words
    from accrete.pipeline.models.new_models import Shape, new_llama, new_t5
    from accrete.pipeline.models.pretrain import one_thread
    from accrete.pipeline.models.saving import save_model_folder

    progress("Making a tiny model (once, then it is in the cache) ...")
    if settings.kind == "t5":
        tokenizer = build_unigram(lines, settings.vocab_size, frequent_words(lines, least=20))
    else:
        tokenizer = build_bpe(lines, settings.vocab_size)
    shape = Shape(
        width=settings.width, layers=settings.layers, heads=settings.heads, inner=settings.inner
    )
    with one_thread(settings.seed):
        model = (new_t5 if settings.kind == "t5" else new_llama)(shape, len(tokenizer))
        _pretrain(model, tokenizer, settings, progress)
    save_model_folder(model, tokenizer, folder)


def _prompts(count: int, seed: int) -> list[tuple[Prompt, str]]:
    """Pre-training prompts in the `plain` template, with their answers."""
    from accrete.pipeline.data.examples import TaskInfo
    from accrete.pipeline.data.pretraining import pretraining_examples
    from accrete.pipeline.data.prompts import frame_for

    pairs = []
    for example in itertools.islice(pretraining_examples(seed), count):
        info = TaskInfo(
            dataset="pretraining",
            instruction=example.instruction,
            labels=example.labels,
            family=None,
            metric="exact_match",
            splits=(),
        )
        pairs.append((frame_for("plain", info).render(example.input), example.output))
    return pairs


def _lines(settings: TinySettings) -> list[str]:
    """Text for the vocabulary: pre-training examples, and what the tasks say beside them.

    Of the tasks only instructions, options and words are shown, no answers.
    """
    from accrete.pipeline.data.generated import WORDS, describe, names

    lines = [f"{prompt} {answer}".replace("\n", " ") for prompt, answer in _prompts(6_000, 1)]
    for name in names():
        task = describe(name)
        labels = f" Option: {', '.join(task['labels'])}" if task["labels"] else ""
        lines += [f"{task['instruction']}{labels}"] * 40
    return lines + [word for word in WORDS for _ in range(20)]


def _pretrain(model: Any, tokenizer: Any, settings: TinySettings, progress: Progress) -> None:
    from accrete.pipeline.models.pretrain import PretrainSettings, encode_pairs, pretrain

    pairs = _prompts(settings.examples, settings.seed)
    rows, collator = encode_pairs(model, tokenizer, pairs, 128, 16)
    training = PretrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    pretrain(model, rows, collator, training, progress)
