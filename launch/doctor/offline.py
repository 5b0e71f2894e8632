"""Whether everything that a recipe reads lies on this machine: model, tokenizer, rows, tokens.

The libraries must be offline (`go_offline`) before they are imported; nothing is downloaded, made
or written here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accrete.launch.doctor import model_files
from accrete.launch.doctor.checks import Check, failure, ok, warning
from accrete.pipeline.errors import AccreteError, DataError, ModelError

if TYPE_CHECKING:
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.handle import TaskHandle

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
SHOWN = 8
"""Names listed in one line."""


def switched_on() -> list[str]:
    """The switches that are on in this process's environment, by what the libraries take for it."""
    return [
        name for name in SWITCHES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
    ]


def go_offline() -> bool:
    """Keep the Hugging Face libraries, which are imported later, from asking the network.

    Returns:
        Whether the user had already done so.
    """
    before = bool(switched_on())
    os.environ.update(dict.fromkeys(SWITCHES, "1"))
    # It would say for every task that it takes rows from its cache.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    return before


class Found(NamedTuple):
    """The model as the cache has it."""

    checks: list[Check]
    folder: Path | None
    """Where its files are; None if something is missing."""
    path: str | None
    """What a run would load: the folder, or the hub id."""


@dataclass(frozen=True, kw_only=True)
class CacheCheck:
    """Looks for what one recipe needs."""

    config: RunConfig
    cache: Path
    """accrete's own cache."""
    recipe: str
    """How the user names the recipe, with its overrides."""
    offline: bool
    """Nothing can be fetched later: what is missing fails."""
    where: str = ""
    """Added to the checks' names, such as ` on node 1`."""

    def _absent(self, name: str, found: str, allowed: str) -> Check:
        """Something that only the network has."""
        tell = failure if self.offline else warning
        return tell(
            f"{name}{self.where}",
            found,
            allowed,
            f"accrete fetch {self.recipe} (where there is network; it fills the same caches)",
        )

    def model(self) -> Found:
        """Configuration and weights of the base model."""
        model = self.config.model
        name = f"model{self.where}"
        if model.path is not None and model.gguf_file is None:
            return self._files(model.path, model.revision)
        from accrete.pipeline.models.cache import NotInCacheError, only_looking
        from accrete.pipeline.models.tiny import materialize

        if model.builder == "small_t5" and model.builder_data is None:
            model = replace(model, builder_data=self.config.data.root)
        try:
            with only_looking():
                folder = materialize(model, self.cache, lambda line: None)
        except NotInCacheError:
            if model.gguf_file is not None:
                found = f"{model.gguf_file} of {model.path}: not converted yet"
                return Found([self._absent("model", found, "in the cache")], None, None)
            check = warning(
                name,
                f"{model.builder}: not made yet",
                "in the cache",
                "nothing: the run makes it first, without network",
            )
            return Found([check], None, None)
        except AccreteError as error:
            return Found([_unusable(name, error)], None, None)
        return Found(
            [ok(name, f"{model.builder or model.gguf_file}: {folder}")], folder, str(folder)
        )

    def _files(self, path: str, revision: str | None) -> Found:
        """A folder, or a repository of the hub."""
        name = f"model{self.where}"
        repo = model_files.hub_id(path, self.cache)
        if repo is None:
            from accrete.pipeline.models.cache import in_cache

            folder: Path | None = in_cache(path, self.cache)
        else:
            folder = model_files.snapshot_folder(repo, revision)
        label = path + (f" at {revision}" if revision else "")
        if folder is None:
            found = f"{label}: not in the hub's cache ({_hub_cache()})"
            return Found([self._absent("model", found, "a snapshot in the cache")], None, None)
        missing = model_files.missing_files(folder)
        if not missing:
            return Found([ok(name, f"{label}: {folder}")], folder, repo or str(folder))
        found = f"{label}: {folder} lacks {_listed(missing)}"
        if repo is not None:
            return Found([self._absent("model", found, "every file of the snapshot")], None, None)
        check = failure(
            name, found, "a whole model folder", "copy the missing files, or set model.path"
        )
        return Found([check], None, None)

    def rows(self, model_path: str) -> list[Check]:
        """Tokenizer, data sets, tokenised tasks.

        Args:
            model_path: Folder or hub id of the model.
        """
        from accrete.launch.prepare import is_seq2seq, tokenizer_options
        from accrete.pipeline.data.prepare import find_prepared

        config = self.config
        tokenizer = config.model.tokenizer or model_path
        try:
            found = find_prepared(
                config.tasks,
                config.data,
                tokenizer,
                is_seq2seq(model_path, config.model.revision),
                self.cache / "tasks",
                config.seed,
                tokenizer_options(config),
            )
        except ModelError as error:
            text = str(error).partition("\n")[0]
            if model_files.hub_id(tokenizer, self.cache) is None:
                return [_unusable(f"tokenizer{self.where}", error)]
            return [self._absent("tokenizer", text, "a snapshot in the cache")]
        return [ok(f"tokenizer{self.where}", tokenizer), *self._tasks(found)]

    def _tasks(self, found: dict[str, TaskHandle | DataError | None]) -> list[Check]:
        """One check for rows that cannot be read, each; one for tasks without tokens, together."""
        checks = []
        for task in self.config.tasks:
            error = found[task.name]
            if isinstance(error, DataError):
                checks.append(self._no_rows(task.name, error))
        bare = [name for name, handle in found.items() if handle is None]
        if bare:
            checks.append(
                warning(
                    f"tokens{self.where}",
                    f"rows are here, not tokenised yet: {_listed(bare)}",
                    "tokenised tasks in the cache",
                    f"nothing, the run does it first; or accrete fetch {self.recipe}",
                )
            )
        ready = len(found) - len(bare) - len(checks) + bool(bare)
        if ready:
            checks.append(ok(f"tasks{self.where}", f"{ready} of {len(found)} tokenised"))
        return checks

    def _no_rows(self, task: str, error: DataError) -> Check:
        text = str(error).partition("\n")[0]
        if self.config.data.format == "hub":
            return self._absent(f"rows of {task}", text, "the data set in the hub's cache")
        return failure(
            f"rows of {task}{self.where}",
            text,
            "readable files",
            "set data.root (or the task's files) to where they are",
        )


def examine_cache(check: CacheCheck, *, rows: bool = True) -> tuple[list[Check], Path | None]:
    """Everything that a recipe reads.

    Args:
        check: The recipe and its cache.
        rows: Also look for rows and tokens, which are shared by all nodes.

    Returns:
        The checks, and the folder of the model if it is whole.
    """
    from accrete.pipeline.config.checks import require_data_root
    from accrete.pipeline.errors import ConfigError

    found = check.model()
    checks = list(found.checks)
    if not rows:
        return checks, found.folder
    try:
        require_data_root(check.config)
    except ConfigError as error:
        text = str(error).partition("\n")[0]
        return [
            *checks,
            failure("data.root", text, "a folder with the tasks", "add data.root=FOLDER"),
        ], found.folder
    if found.path is None:
        checks.append(
            warning(
                f"tasks{check.where}",
                "not looked for: their tokens depend on the model's tokenizer",
                "tokenised tasks in the cache",
                "see `model` above",
            )
        )
        return checks, found.folder
    return [*checks, *check.rows(found.path)], found.folder


def _unusable(name: str, error: AccreteError) -> Check:
    return failure(name, str(error).partition("\n")[0], "a usable one", "see accrete plan")


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
