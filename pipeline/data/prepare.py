"""Preparation: every task is read, checked and tokenised before the first training step.

The result lies in a cache under a key of everything it depends on, so a second run, another rank or
another method finds it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accrete.pipeline.data.config import DataConfig, TaskConfig
from accrete.pipeline.data.encode import Encoder, load_tokenizer, tokenizer_hash
from accrete.pipeline.data.fingerprint import FORMAT_VERSION, FileHashes, digest, write_json
from accrete.pipeline.data.handle import SplitStats, TaskHandle, TaskStats
from accrete.pipeline.data.preflight import Problems, SplitPreflight
from accrete.pipeline.data.prompts import Frame, Prompt, frame_for
from accrete.pipeline.data.shards import Layout
from accrete.pipeline.data.sources import FileRows, Source, open_source
from accrete.pipeline.errors import DataError

__all__ = ["SplitStats", "TaskHandle", "TaskStats", "find_prepared", "prepare_sequence"]

HANDLE_FILE = "handle.json"
ABANDONED_SECONDS = 24 * 3600


def prepare_sequence(
    tasks: Sequence[TaskConfig],
    data: DataConfig,
    tokenizer_path: str,
    seq2seq: bool,
    cache: Path,
    seed: int,
    progress: Callable[[str], None] | None = None,
    tokenizer_options: Mapping[str, str] | None = None,
) -> list[TaskHandle]:
    """Check and tokenise every row of every task, or find that done.

    May run in several processes at once over one cache: each entry is written aside and renamed,
    and the first one to finish wins.

    Args:
        tasks: The sequence.
        data: Where rows come from and how they become tokens.
        tokenizer_path: Folder or hub id of the tokenizer.
        seq2seq: Encoder-decoder prompts; else decoder prompts.
        cache: Folder of prepared tasks; made if absent.
        seed: Seed of generated rows. The order of rows does not depend on preparation.
        progress: Called with a line of text now and then.
        tokenizer_options: `revision` or `gguf_file` of the tokenizer.

    Returns:
        One handle per task, in order.

    Raises:
        DataError: Anything wrong with any row of any task; one message for all of it.
        ModelError: The tokenizer cannot be used.

    Collective: no
    """
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    tokenizer = load_tokenizer(tokenizer_path, tokenizer_options)
    preparer = _Preparer(data, tokenizer, seq2seq, cache, seed, progress)
    problems = Problems()
    handles = []
    names: set[str] = set()
    for task in tasks:
        if task.name in names:
            problems.add("", f"task name {task.name!r} is used twice; names must be unique")
        names.add(task.name)
        try:
            handle = preparer.prepare(task, problems)
        except DataError as error:
            problems.add("", str(error))
        else:
            handles += [handle] if handle is not None else []
    preparer.hashes.save()
    if len(problems):
        raise DataError(problems.report())
    return handles


def find_prepared(
    tasks: Sequence[TaskConfig],
    data: DataConfig,
    tokenizer_path: str,
    seq2seq: bool,
    cache: Path,
    seed: int,
    tokenizer_options: Mapping[str, str] | None = None,
) -> dict[str, TaskHandle | DataError | None]:
    """Look for every task in the cache, as `prepare_sequence` would; nothing is written.

    Returns:
        Task name -> its handle; None: its rows are there and not prepared yet; an error: they
        cannot be found.

    Raises:
        ModelError: The tokenizer cannot be used.

    Collective: no
    """
    tokenizer = load_tokenizer(tokenizer_path, tokenizer_options)
    preparer = _Preparer(data, tokenizer, seq2seq, cache, seed, None)
    found: dict[str, TaskHandle | DataError | None] = {}
    for task in tasks:
        try:
            place = preparer.find(task)
            found[task.name] = place.open() or place.missing_rows()
        except DataError as error:
            found[task.name] = error
    return found


@dataclasses.dataclass(frozen=True)
class _Place:
    """A task, and where it belongs in the cache."""

    source: Source
    frame: Frame
    key: str
    folder: Path

    def open(self) -> TaskHandle | None:
        """The task if it has been prepared."""
        return _open(self.folder, self.key)

    def missing_rows(self) -> DataError | None:
        """What to say of files that a layout or a recipe names and that are not there."""
        rows = self.source.rows
        files = rows.located.splits.values() if isinstance(rows, FileRows) else ()
        missing = [str(path) for paths in files for path in paths if not path.is_file()]
        if not missing:
            return None
        return DataError(f"Task {self.source.task.name!r}: no such file: {', '.join(missing)}")


class _Preparer:
    """Prepares tasks with one tokenizer and one set of limits."""

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Any,
        seq2seq: bool,
        cache: Path,
        seed: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._data = data
        self._seq2seq = seq2seq
        self._cache = cache
        self._seed = seed
        self._progress = progress
        self._tokenizer = tokenizer_hash(tokenizer)
        self._encoder = Encoder(
            tokenizer,
            seq2seq=seq2seq,
            max_source_tokens=data.max_source_tokens,
            max_target_tokens=data.max_target_tokens,
            cut=data.cut,
        )
        self.hashes = FileHashes(cache / "sources.json")

    def find(self, task: TaskConfig) -> _Place:
        """Where a task belongs in the cache; nothing is written.

        Raises:
            DataError: The task cannot be found or asked for at all.
        """
        source = open_source(task, self._data, self._seed)
        frame = frame_for(self._data.template, source.info)
        if not frame.raw:
            try:
                self._encoder.check_frame(Prompt(frame.prefix, "", frame.suffix))
            except DataError as error:
                raise DataError(f"Task {task.name!r}: {error}") from None
        splits = ("train", self._data.eval_split)
        for split in splits:
            source.split(split)
        key = digest(self._key(source, frame, splits))
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", task.name)[:60]
        return _Place(source, frame, key, self._cache / f"{slug}-{key[:20]}")

    def prepare(self, task: TaskConfig, problems: Problems) -> TaskHandle | None:
        """One task; None if problems were found.

        Raises:
            DataError: The task cannot be found or asked for at all.
        """
        place = self.find(task)
        source, frame, key, folder = place.source, place.frame, place.key, place.folder
        found = place.open()
        if found is not None:
            self._say(f"{task.name}: prepared before")
            return found
        aside = Path(tempfile.mkdtemp(dir=self._cache, prefix=".writing-"))
        try:
            handle = self._write(source, frame, key, aside, problems)
            if handle is None:
                return None
            _publish(aside, folder, key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return _located(handle, folder)

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)

    def _key(self, source: Source, frame: Frame, splits: Sequence[str]) -> dict[str, Any]:
        """Everything the token ids and the row numbers depend on."""
        data, task = self._data, source.task
        limits = (data.max_train_examples, data.max_eval_examples)
        # Named only where it counts, so that all other keys are what they were before it did.
        balanced = [
            split
            for split, limit in zip(splits, limits, strict=True)
            if limit is not None and split in task.per_label
        ]
        return {
            "version": FORMAT_VERSION,
            "layout": dataclasses.asdict(Layout()),
            "name": task.name,
            "rows": [source.rows.identity(source.split(s), self.hashes) for s in splits],
            "splits": list(splits),
            "info": dataclasses.asdict(source.info),
            "frame": dataclasses.asdict(frame),
            "columns": dataclasses.asdict(source.rows.columns),
            "label_names": task.label_names,
            "limits": [
                data.max_source_tokens,
                data.max_target_tokens,
                *limits,
                data.cut,
                task.per_label,
                *balanced,
            ],
            "stream": [data.streaming, data.stream_above_rows],
            "tokenizer": self._tokenizer,
            "seq2seq": self._seq2seq,
        }

    def _write(
        self, source: Source, frame: Frame, key: str, folder: Path, problems: Problems
    ) -> TaskHandle | None:
        """Prepare a task into a fresh folder; None if any row is bad."""
        data, before = self._data, len(problems)
        train = self._preflight(source, "train", frame, data.max_train_examples, problems)
        layout = train.write(
            folder / "train", Layout(streamed=data.streaming), data.stream_above_rows
        )
        scored = self._preflight(source, data.eval_split, frame, data.max_eval_examples, problems)
        rows = scored.write(folder / "eval", Layout(), None).rows
        if len(problems) > before:
            return None
        stats = TaskStats(
            train=train.counts.stats(),
            eval=scored.counts.stats(),
            warnings=tuple(train.warnings() + scored.warnings() + self._same_split(source)),
        )
        handle = TaskHandle(
            name=source.task.name,
            metric=source.info.metric,
            labels=source.info.labels,
            train_dir="train",
            eval_dir="eval",
            num_train=layout.rows,
            num_eval=rows,
            streamed=layout.streamed,
            stats=stats,
            fingerprint=key,
        )
        write_json(folder / HANDLE_FILE, handle.to_json())
        return handle

    def _preflight(
        self, source: Source, split: str, frame: Frame, limit: int | None, problems: Problems
    ) -> SplitPreflight:
        return SplitPreflight(
            source,
            split,
            frame,
            self._encoder,
            limit=limit,
            training=split == "train",
            problems=problems,
            progress=self._progress,
        )

    def _same_split(self, source: Source) -> list[str]:
        """Published collections ship a `dev` that is their `test`."""
        if self._data.eval_split != "dev" or "test" not in source.info.splits:
            return []
        dev, test = (source.rows.identity(source.split(s), self.hashes) for s in ("dev", "test"))
        if dev != test:
            return []
        return ["the dev split is a copy of the test split: a search on it selects on test"]


def _open(folder: Path, key: str) -> TaskHandle | None:
    """The prepared task in a folder; None if there is none or it is damaged."""
    try:
        handle = TaskHandle.from_json(json.loads((folder / HANDLE_FILE).read_text("utf-8")))
        whole = handle.fingerprint == key
        for part in (folder / "train", folder / "eval"):
            whole = whole and Layout.read(part).complete(part)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not whole:
        return None
    return _located(handle, folder)


def _located(handle: TaskHandle, folder: Path) -> TaskHandle:
    """The handle with the folders of its rows; the file keeps none, so that a cache may move."""
    folder = folder.resolve()
    return dataclasses.replace(
        handle, train_dir=str(folder / "train"), eval_dir=str(folder / "eval")
    )


def _publish(aside: Path, folder: Path, key: str) -> None:
    """Rename a finished folder to its place, unless another process was first."""
    for _ in range(2):
        try:
            os.rename(aside, folder)
            return
        except OSError:
            if _open(folder, key) is not None:
                return
            # A damaged entry: move it out of the way in one step, so that nobody reads half of it.
            trash = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-"))
            with contextlib.suppress(OSError):
                os.rename(folder, trash / folder.name)
            shutil.rmtree(trash, ignore_errors=True)
    raise DataError(
        f"cache {folder}: cannot be written. Check its permissions and the space on its disk."
    )


def _sweep(cache: Path) -> None:
    """Remove what a killed process left half written a day ago or earlier."""
    for path in (*cache.glob(".writing-*"), *cache.glob(".damaged-*")):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
