"""A T5 of 3.6 million parameters for the encoder-decoder path on real rows.

It is made from the training rows of a compact collection, and only of tasks outside the standard
sequence (dbpedia, amazon, yahoo, agnews, yelp): a unigram vocabulary of 8 000 pieces, token
vectors from their co-occurrence (`word_vectors`), then a multi-task training with a fixed number of
steps. All of it took 160 s of one core of an AMD EPYC and 1.9 GB, once.

It learns real tasks only in part, and by LoRA hardly at all (docs/results.md): a model of this size
that starts from so few rows stays far below a pretrained one. It shows that code works and lets
runs be compared with each other; it carries no ranking of methods, and its scores are not worth
quoting. It has already seen the training rows of tasks that come from the long or the SuperNI
collection.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accrete.pipeline.errors import ModelError
from accrete.pipeline.models.cache import Progress, build_once, content_key

if TYPE_CHECKING:
    from accrete.pipeline.data.prompts import Prompt

STANDARD = ("dbpedia", "amazon", "yahoo", "agnews", "yelp")
"""Tasks that nothing is learned from."""
COLLECTIONS = ("long", "superni")


@dataclass(frozen=True, kw_only=True)
class SmallSettings:
    """Everything that the model depends on beside the rows."""

    width: int = 192
    layers: int = 2
    heads: int = 6
    inner: int = 512
    vocab_size: int = 8_000
    window: int = 5
    """Context of the token vectors, in tokens on each side."""
    rows_per_task: int = 400
    """Rows of a task in the multi-task training."""
    source_tokens: int = 96
    target_tokens: int = 16
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


def build_small_t5(
    builder_data: str | None,
    cache: Path,
    progress: Progress,
    settings: SmallSettings | None = None,
) -> Path:
    """Make the model, or find it in the cache.

    Args:
        builder_data: `model.builder_data`: root of a compact collection.
        cache: Cache folder.
        progress: Told how far it is.
        settings: Other sizes, for tests.

    Raises:
        ModelError: No folder is given, or it holds none of the tasks.
    """
    if builder_data is None:
        raise ModelError(
            "model.builder small_t5 learns its words from real rows: set model.builder_data to the "
            "folder of a compact collection (the one with `long` and `superni` in it; on the "
            "command line: model.builder_data=FOLDER)."
        )
    root = Path(builder_data).expanduser()
    tasks = outside_tasks(root)
    chosen = settings or SmallSettings()
    key = content_key(
        asdict(chosen),
        files=[*_sources(), *(_train_file(root, *task) for task in tasks)],
        packages=("sentencepiece", "tokenizers", "torch", "transformers"),
    )
    folder = cache / "models" / f"small_t5-{key}"
    return build_once(folder, partial(_build, chosen, root, tasks, progress), progress)


def outside_tasks(root: Path) -> list[tuple[str, str]]:
    """(collection, task) of every task that the standard sequence does not hold, sorted.

    Raises:
        ModelError: There is none.
    """
    found = [
        (collection, folder.name)
        for collection in COLLECTIONS
        if (root / collection).is_dir()
        for folder in sorted((root / collection).iterdir())
        if folder.name not in STANDARD and _train_file(root, collection, folder.name).is_file()
    ]
    if not found:
        raise ModelError(
            f"model.builder_data {root}: no rows there to learn from. Expected: folders "
            f"{' and '.join(COLLECTIONS)} with one folder a task and train.jsonl.gz in it."
        )
    return found


def _train_file(root: Path, collection: str, task: str) -> Path:
    return root / collection / task / "train.jsonl.gz"


def _sources() -> list[Path]:
    from accrete.pipeline.data import prompts
    from accrete.pipeline.models import build_tokenizer, new_models, pretrain, word_vectors

    modules = (prompts, build_tokenizer, new_models, pretrain, word_vectors)
    return [Path(__file__), *(Path(str(module.__file__)) for module in modules)]


def _build(
    settings: SmallSettings,
    root: Path,
    tasks: Sequence[tuple[str, str]],
    progress: Progress,
    folder: Path,
) -> None:
    import torch

    from accrete.pipeline.models.build_tokenizer import build_unigram
    from accrete.pipeline.models.new_models import Shape, new_t5
    from accrete.pipeline.models.pretrain import one_thread
    from accrete.pipeline.models.saving import save_model_folder
    from accrete.pipeline.models.word_vectors import ppmi_svd

    progress("Making small_t5 (once, then it is in the cache): vocabulary ...")
    pairs = [pair for task in tasks for pair in _prompts(root, *task)]
    lines = [" ".join(str(prompt).split()) for prompt, _ in pairs]
    tokenizer = build_unigram([*lines, *(answer for _, answer in pairs)], settings.vocab_size)
    ids = tokenizer(lines, add_special_tokens=False)["input_ids"]
    with one_thread(settings.seed):
        progress("Making small_t5: token vectors ...")
        shape = Shape(
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            inner=settings.inner,
        )
        model = new_t5(shape, len(tokenizer))
        vectors = ppmi_svd(ids, len(tokenizer), settings.width, settings.window, settings.seed)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(vectors)
        if settings.steps:
            _pretrain(model, tokenizer, settings, _choose(settings, root, tasks), progress)
    save_model_folder(model, tokenizer, folder)


def _choose(
    settings: SmallSettings, root: Path, tasks: Sequence[tuple[str, str]]
) -> list[tuple[Prompt, str]]:
    """The first rows of every task, mixed."""
    chosen = [
        pair for task in tasks for pair in list(_prompts(root, *task))[: settings.rows_per_task]
    ]
    random.Random(f"accrete small_t5 {settings.seed}").shuffle(chosen)
    return chosen


def _pretrain(
    model: Any,
    tokenizer: Any,
    settings: SmallSettings,
    pairs: Sequence[tuple[Prompt, str]],
    progress: Progress,
) -> None:
    from accrete.pipeline.models.pretrain import PretrainSettings, encode_pairs, pretrain

    rows, collator = encode_pairs(
        model, tokenizer, pairs, settings.source_tokens, settings.target_tokens
    )
    training = PretrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    pretrain(model, rows, collator, training, progress)


def _prompts(root: Path, collection: str, task: str) -> Iterator[tuple[Prompt, str]]:
    """Training rows of one task in the `plain` template, with their first answer."""
    from accrete.pipeline.data.config import DataConfig, TaskConfig
    from accrete.pipeline.data.prompts import frame_for
    from accrete.pipeline.data.sources import open_source, read_examples

    data = DataConfig(root=str(root), format="compact", benchmark=collection)
    wanted = TaskConfig(name=task)
    frame = frame_for("plain", open_source(wanted, data).info)
    for row in read_examples(wanted, data, "train"):
        yield frame.render(row.input), row.references[0]
