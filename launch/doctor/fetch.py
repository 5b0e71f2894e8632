"""`accrete fetch`: put everything that a recipe reads into the caches, where there is network.

What is downloaded is then read once more by a process that is offline: it tokenises the tasks, and
so shows that a run on a node without network will find everything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from accrete.launch.doctor import model_files
from accrete.launch.doctor.offline import SWITCHES, go_offline, switched_on
from accrete.pipeline.errors import AccreteError, DataError, InputError, ModelError

if TYPE_CHECKING:
    from accrete.pipeline.config.load import LoadedRecipe
    from accrete.pipeline.config.run import RunConfig
    from accrete.pipeline.data.config import TaskConfig

Say = Callable[[str], None]


def fetch(recipe: LoadedRecipe, words: str, say: Say) -> None:
    """Download, convert and tokenise.

    Args:
        recipe: The recipe.
        words: How the user names it, with its overrides.
        say: Called with a line of text now and then.

    Raises:
        InputError: Something cannot be fetched, or not be used.
    """
    from accrete.pipeline.config.checks import require_data_root
    from accrete.pipeline.models.cache import cache_root

    _require_network()
    config = recipe.config
    require_data_root(config)
    _fetch_model(config, cache_root(), say)
    for task in config.tasks:
        if config.data.format == "hub" and task.files is None:
            _fetch_rows(task, say)
    _prepare_offline(recipe, words)


def _require_network() -> None:
    switched = switched_on()
    if switched:
        raise InputError(
            f"{', '.join(switched)} is set, and so nothing can be downloaded. Unset it for this "
            "command, on a machine with network."
        )


def _fetch_model(config: RunConfig, cache: Path, say: Say) -> None:
    """The snapshots of model and tokenizer, or the conversion of a GGUF file."""
    model = config.model
    if model.path is not None and model.gguf_file is not None:
        from accrete.pipeline.models.tiny import materialize

        materialize(model, cache, say)
    elif model.path is not None:
        _fetch_snapshot(model.path, model.revision, cache, "model.path", say)
    if model.tokenizer is not None:
        _fetch_snapshot(model.tokenizer, None, cache, "model.tokenizer", say)


def _fetch_snapshot(path: str, revision: str | None, cache: Path, key: str, say: Say) -> None:
    """The files of a hub repository that transformers reads; nothing if `path` is a folder."""
    repo = model_files.hub_id(path, cache)
    if repo is None:
        return
    from huggingface_hub import HfApi, snapshot_download

    say(f"{repo}: fetching ...")
    try:
        files = HfApi().list_repo_files(repo, revision=revision)
        allow, ignore = model_files.wanted_patterns(files)
        if key == "model.tokenizer":
            ignore = [*ignore, "*.safetensors", "*.bin"]
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore
        )
    except Exception as error:  # not found, gated, no network, no space: no common base class
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{key} {repo}{f' at {revision}' if revision else ''} cannot be fetched: "
            f"{type(error).__name__}: {first}\nCheck the name and the network; for a gated model "
            "accept its licence on the hub and log in first (`hf auth login`)."
        ) from error
    say(f"{repo}: {folder}")


def _fetch_rows(task: TaskConfig, say: Say) -> None:
    """All splits of a hub data set, in the cache of the `datasets` library."""
    import datasets

    from accrete.pipeline.data.hub import first_lines

    repo = task.dataset or task.name
    say(f"{repo}{f' ({task.config})' if task.config else ''}: fetching ...")
    try:
        datasets.load_dataset(repo, task.config, revision=task.revision)
    except Exception as error:  # not found, gated, a script, no network: no common base class
        raise DataError(
            f"Task {task.name!r}: hub data set {repo!r} cannot be fetched: "
            f"{type(error).__name__}: {first_lines(error)}\nCheck its name, `config` and "
            "`revision`, and the network; for a gated data set accept its terms on the hub and log "
            "in first (`hf auth login`)."
        ) from error


def _prepare_offline(recipe: LoadedRecipe, words: str) -> None:
    """Tokenise in another process, which is offline from its start.

    Raises:
        InputError: It does not find everything, or the rows are wrong.
    """
    command = [sys.executable, "-m", __name__, "--recipe", str(recipe.file)]
    done = subprocess.run(
        [*command, "--", *recipe.overrides],
        env={**os.environ, **dict.fromkeys(SWITCHES, "1"), "TQDM_DISABLE": "1"},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode != 0:
        raise InputError(
            f"not everything that {words} reads is in the caches now; see above. Mend it, and "
            "fetch again: what is there already is not downloaded twice."
        )


def main() -> None:
    """The process without network: prepare the recipe as a run would, and look at its model."""
    go_offline()
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    from accrete.launch.doctor.checks import Status
    from accrete.launch.doctor.offline import CacheCheck
    from accrete.launch.prepare import prepare
    from accrete.pipeline.config.load import load_recipe
    from accrete.pipeline.models.cache import cache_root

    try:
        recipe = load_recipe(options.recipe, options.overrides)
        prepare(
            recipe.config, lambda line: print(line, file=sys.stderr, flush=True), elsewhere=True
        )
    except AccreteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    check = CacheCheck(config=recipe.config, cache=cache_root(), recipe=recipe.name, offline=True)
    [model, *_] = check.model().checks
    if model.status is not Status.OK:
        print(f"error: {model.found}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
