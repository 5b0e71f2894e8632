"""Where models that accrete makes or converts are kept, and how they get there once.

Nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path

from accrete.pipeline.errors import ModelError

Progress = Callable[[str], None]
"""Called with a line of text now and then."""


DEFAULT = "~/.cache/accrete"
_looking = ContextVar("looking", default=False)


class NotInCacheError(ModelError):
    """A model that accrete would have to make first, and was told not to."""


@contextmanager
def only_looking() -> Iterator[None]:
    """Inside, `build_once` makes nothing: it finds a model in the cache or raises."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def cache_root() -> Path:
    """The cache folder: `$ACCRETE_CACHE`, or `~/.cache/accrete`."""
    chosen = os.environ.get("ACCRETE_CACHE")
    return Path(chosen or DEFAULT).expanduser().absolute()


def in_cache(path: str, cache: Path) -> Path:
    """A path of a recipe; `~/.cache/accrete/...` means the cache, wherever that is."""
    if path.startswith(DEFAULT + "/"):
        return cache / path.removeprefix(DEFAULT + "/")
    return Path(path).expanduser()


def content_key(
    settings: Mapping[str, object],
    *,
    texts: Iterable[str] = (),
    files: Iterable[Path] = (),
    packages: Iterable[str] = (),
) -> str:
    """Twelve hexadecimal digits that change with anything a model is made from.

    Args:
        settings: JSON-able settings.
        texts: Text that the model learns from.
        files: Files whose content counts, such as the code that makes the model.
        packages: Distributions whose versions count.
    """
    versions = {name: metadata.version(name) for name in sorted(packages)}
    digest = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:12]


def build_once(folder: Path, build: Callable[[Path], None], progress: Progress) -> Path:
    """Make `folder` unless it is there; of several processes one builds and the others wait.

    Args:
        folder: Where the result belongs. It appears at once and whole, or not at all.
        build: Fills the empty folder that it is given.
        progress: Told when another process is waited for.

    Returns:
        `folder`.

    Raises:
        ModelError: The cache cannot be written.
        NotInCacheError: It is not there, and nothing is to be made (`only_looking`).
    """
    if folder.is_dir():
        return folder
    if _looking.get():
        raise NotInCacheError(f"{folder}: not made yet.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock"), progress):
            if folder.is_dir():
                return folder
            # What a killed build left; nobody else works here while the lock is held.
            for left in folder.parent.glob(f".{folder.name}.*/"):
                shutil.rmtree(left, ignore_errors=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                build(aside)
                _finish(aside)
                aside.rename(folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise ModelError(
            f"{folder}: the model cache cannot be written ({error}). Free some space, or set "
            "ACCRETE_CACHE to a folder that you may write to."
        ) from error
    return folder


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock file; it is released with the process, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Waiting for another process that makes {path.name[1:-5]} ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _finish(folder: Path) -> None:
    """Make every file readable for others and force it onto the disk, before it gets its name."""
    folder.chmod(0o755)
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_file():
            path.chmod(0o644)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
