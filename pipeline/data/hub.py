"""Rows of a Hugging Face hub data set, streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accrete.pipeline.data.config import TaskConfig
from accrete.pipeline.data.examples import Columns, Problem
from accrete.pipeline.data.files import Record
from accrete.pipeline.data.names import listing
from accrete.pipeline.errors import DataError

_COMMIT = re.compile("[0-9a-f]{40}")


def first_lines(error: Exception) -> str:
    """An error of `datasets` in one line; its second one lists the configurations there are."""
    return " ".join(str(error).split("\n")[:2]).strip()


class HubRows:
    """Rows of a hub id, or of a local folder in the hub's layout.

    Raises:
        DataError: The data set cannot be reached or has no such configuration.
    """

    def __init__(self, task: TaskConfig) -> None:
        self._task = task
        self._id = task.dataset or task.name
        self.columns = Columns(
            input=task.columns.input,
            output=task.columns.output,
            id=task.columns.id,
            id_required=task.columns.id is not None,
        )
        self._builder = self._load_builder()
        self._streams: dict[str, Any] = {}
        self._splits = self._find_splits()

    def splits(self) -> tuple[str, ...]:
        """Our names of the splits that exist."""
        return tuple(self._splits)

    def class_names(self) -> list[str] | None:
        """Label words that the data set itself declares for the output column."""
        features = self._builder.info.features
        if features is None and self._splits:
            features = self._stream(next(iter(self._splits))).features
        column = features.get(self.columns.output) if features is not None else None
        names = getattr(column, "names", None)
        return list(names) if names else None

    def records(self, split: str) -> Iterator[Record | Problem]:
        """Stream one split."""
        name = f"{self._id}[{self._splits[split]}]"
        number = 0
        try:
            for number, row in enumerate(self._stream(split), 1):
                yield Record(f"{name}:row {number}", row)
        except Exception as error:  # network, parser and schema errors share no base class
            yield Problem(
                f"{name}:row {number + 1}", f"cannot be read: {type(error).__name__}: {error}"
            )
            return
        if number == 0:
            yield Problem(name, "the split is empty: it has no rows")

    def identity(self, split: str, sha256: Any) -> list[str]:
        """The commit that `datasets` resolved; for a local folder, the hash of every file as well.

        Its own key of a folder whose README lists the files does not change with their rows.
        """
        task, theirs = self._task, self._splits[split]
        files = (Path(name) for name in (self._builder.config.data_files or {}).get(theirs, ()))
        content = [sha256(path) for path in files if path.is_file()]
        return [self._id, str(task.config), theirs, str(self._builder.hash), *content]

    def _options(self) -> dict[str, Any]:
        return {"path": self._id, "name": self._task.config, "revision": self._task.revision}

    def _load_builder(self) -> Any:
        import datasets

        try:
            builder = datasets.load_dataset_builder(**self._options())
        except Exception as error:  # offline, not found, gated, a script: no common base class
            raise DataError(self._unreachable(error)) from error
        # Without network `datasets` takes the newest rows of its cache, whatever is asked for.
        wanted, found = self._task.revision or "", str(builder.hash)
        if _COMMIT.fullmatch(wanted) and _COMMIT.fullmatch(found) and wanted != found:
            raise DataError(
                f"Task {self._task.name!r}: hub data set {self._id!r} is in the cache at revision "
                f"{found}, and the recipe asks for {wanted}. Run `accrete fetch RECIPE` where "
                "there is network."
            )
        return builder

    def _find_splits(self) -> dict[str, str]:
        import datasets

        options = self._options()
        try:
            there = datasets.get_dataset_split_names(
                options["path"], options["name"], revision=options["revision"]
            )
        except Exception as error:
            raise DataError(self._unreachable(error)) from error
        wanted = self._task.splits or {split: split for split in there}
        for ours, theirs in wanted.items():
            if theirs not in there:
                raise DataError(
                    f"Task {self._task.name!r}: hub data set {self._id!r} has no split "
                    f"{theirs!r} (for {ours!r}). There: {listing(there)}. Set the task's `splits`."
                )
        return dict(wanted)

    def _stream(self, split: str) -> Any:
        # Of the builder at hand: another `load_dataset` may find a newer commit than `identity`.
        return self._builder.as_streaming_dataset(split=self._splits[split])

    def _unreachable(self, error: Exception) -> str:
        config = f" ({self._task.config})" if self._task.config else ""
        return (
            f"Task {self._task.name!r}: hub data set {self._id!r}{config} cannot be opened: "
            f"{type(error).__name__}: {first_lines(error)}\n"
            "Check its name and `config`. For nodes without network: `accrete fetch RECIPE` on a "
            "machine that has it, with the same HF_HOME and ACCRETE_CACHE or a copy of them; or "
            "save the rows as JSON lines or Parquet and list them under the task's `files:`."
        )
