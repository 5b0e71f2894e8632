"""A run on disk: the names of everything in its folder, atomic writes and the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accrete.pipeline.errors import RunFolderError
from accrete.pipeline.records import Event, json_safe, read_events

CHECKPOINT = re.compile(r"stage-(\d+)(?:-step-(\d+))?")
"""Name of a checkpoint's folder; one that somebody has put aside is called otherwise."""


def write_text(path: Path, text: str) -> None:
    """Write a whole file at once: a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with aside.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; non-finite numbers become null."""
    write_text(
        path, json.dumps(json_safe(value), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run folder.

    Raises:
        RunFolderError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: this file of the run is missing.") from None
    except ValueError as error:
        raise RunFolderError(
            f"{path}: not valid JSON ({error}); it was edited or damaged."
        ) from None


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (new and renamed files) onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StageDir:
    """What one stage leaves behind: `stages/<t>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        """peft folder of the factors trained at this stage."""
        self.predictions = path / "predictions.jsonl"
        """One line for each row scored after this stage."""
        self.score = path / "score.json"
        """The stage's row of the matrix and what belongs to it."""


class RunDir:
    """One run's folder. Making the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        """The resolved recipe."""
        self.run = self.path / "run.json"
        """Name, command, versions, hardware, origin of every value."""
        self.lineage = self.path / "lineage.json"
        """Of a branch: where it comes from, and what its first stages were learned with."""
        self.prepared = self.path / "prepared.json"
        """Where the model and the tokenised tasks are."""
        self.events = self.path / "events.jsonl"
        self.untrained = self.path / "untrained.json"
        """Scores of the model as it came."""
        self.matrix = self.path / "matrix.json"
        self.report = self.path / "report.html"
        self.stages = self.path / "stages"
        self.partial = self.path / "partial"
        """Scores of a scoring that is under way: it goes on after what is here."""
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.launch = self.path / "launch"
        """What `accrete launch` rendered, and the markers that its attempts leave."""
        self.owner = self.launch / "owner"
        """Token of the attempt that may write, see `fence`."""
        self.tensorboard = self.path / "tensorboard"
        self.lock_file = self.path / ".lock"
        self._made: set[Path] = set()
        """What `create` has made."""

    def stage(self, index: int) -> StageDir:
        """Names inside `stages/<index>/`."""
        return StageDir(self.stages / str(index))

    def rank_log(self, rank: int) -> Path:
        """What a rank printed."""
        return self.logs / f"rank-{rank}.log"

    def error_file(self, rank: int) -> Path:
        """Why a rank failed."""
        return self.logs / f"error-{rank}.json"

    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.recipe.is_file() and self.run.is_file()

    def require_run(self) -> None:
        """Make sure that the folder holds a run.

        Raises:
            RunFolderError: It does not.
        """
        if not self.is_run():
            what = "is not a run folder" if self.path.exists() else "does not exist"
            raise RunFolderError(
                f"{self.path}: {what} (a run has recipe.yaml and run.json). "
                "Start one with `accrete run RECIPE --run-dir DIR`."
            )

    def check_free(self) -> None:
        """Make sure that a new run can be written here.

        What a launcher rendered, and the logs of attempts that never got as far as a run, may stay.

        Raises:
            RunFolderError: The folder holds a run or anything else.
        """
        if self.is_run():
            raise RunFolderError(
                f"{self.path}: this folder already holds a run. Continue it with "
                f"`accrete resume {self.path}`, or give another --run-dir."
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(
                f"{self.path}: a file of this name exists; give another --run-dir."
            )
        if self.path.is_dir() and set(self.path.iterdir()) - {self.launch, self.logs}:
            raise RunFolderError(
                f"{self.path}: the folder is not empty and is not a run; give another --run-dir."
            )

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: It is taken, or cannot be made.
        """
        self.check_free()
        folders = (self.path, self.stages, self.checkpoints, self.logs)
        self._made = {folder for folder in folders if not folder.exists()}
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot make the run folder: {error.strerror}."
            ) from None

    def remove_if_empty_run(self) -> bool:
        """Remove what `create` made if no stage has started; returns whether it was removed."""
        work = (self.stages, self.checkpoints, self.partial)
        if not self.path.is_dir() or any(entry for folder in work for entry in folder.glob("*")):
            return False
        started = (Event.STAGE_STARTED, Event.STEP)
        if self.events.exists() and any(e["event"] in started for e in read_events(self.events)):
            return False
        self.discard()
        return True

    def discard(self) -> None:
        """Remove what `create` made; what a launcher rendered or logged before stays."""
        if self.path in self._made:
            shutil.rmtree(self.path)
            return
        for entry in set(self.path.iterdir()) - ({self.launch, self.logs} - self._made):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the folder alone; yields the lock's file descriptor.

        A worker that inherits the descriptor keeps the folder locked for as long as it lives, even
        when the launcher is gone.

        Raises:
            RunFolderError: Another process works in this folder, and the message names it; or the
                folder cannot be written to.
        """
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"{self.path}: cannot open {self.lock_file.name} for writing "
                f"({error.strerror}). A run goes on only where its folder can be written to: copy "
                "it, or change its permissions."
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
                raise RunFolderError(
                    f"{self.path}: another process works in this run folder "
                    f"({holder or 'it has not said which'}). Wait until it ends, or stop it."
                ) from None
            except OSError as error:
                # Some cluster file systems are mounted without flock: then there is no guard.
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield descriptor
        finally:
            os.close(descriptor)
