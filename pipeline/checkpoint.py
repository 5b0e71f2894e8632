"""Checkpoints: whole tensors by name, checksummed, written aside and renamed.

`checkpoints/stage-<t>/` stands after stage t (its Fisher is in, its factors joined the past);
`checkpoints/stage-<t>-step-<k>/` stands after k steps of stage t. Both hold every trained
parameter and moment whole, so that a run can go on with another number of ranks or another ZeRO
stage. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accrete.pipeline.errors import CheckpointError
from accrete.pipeline.fence import Fence
from accrete.pipeline.run_dir import CHECKPOINT, sync_folder, write_json

FORMAT = 1
MANIFEST = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: `step` steps of stage `stage` are made; step None: the stage is done."""

    stage: int
    step: int | None = None

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder."""
        return (
            f"stage-{self.stage}" if self.step is None else f"stage-{self.stage}-step-{self.step}"
        )

    @property
    def order(self) -> tuple[int, float]:
        """Sort key: later positions are larger."""
        return (self.stage, float("inf") if self.step is None else self.step)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself."""

    position: Position
    optimizer_step: int
    files: dict[str, str] = field(default_factory=dict)
    """File name -> sha256."""
    past: dict[str, str] = field(default_factory=dict)
    """Files of adapters in the run folder that make up the past, in order -> sha256."""
    live: bool = False
    """Whether the live factors go on into the next stage (one adapter for all, or weights)."""
    format: int = FORMAT


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    run: Path,
    position: Position,
    tensors: dict[str, dict[str, torch.Tensor]],
    optimizer_step: int,
    past: list[Path],
    live: bool,
    fence: Fence | None = None,
) -> Path:
    """Write one checkpoint, reopen it and compare its checksums.

    Args:
        run: The run folder.
        position: Where the run stands.
        tensors: File stem (`state`, `method`) -> tensors by name, on the CPU.
        optimizer_step: AdamW's step count.
        past: Files of adapters in the run folder that make up the past, in order.
        live: Whether the live factors go on into the next stage.
        fence: Asked before the checkpoint takes its place.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: What was read back is not what was written.
        FencedError: Another attempt owns the run; the checkpoint was not put in place.

    Collective: no (rank 0 alone).
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    if fence is not None:
        fence.check()
    target = root / position.folder
    for left in root.glob(".stage-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: a second writer that is about to be fenced off must not meet it.
    aside = root / f".{position.folder}.{secrets.token_hex(4)}.part"
    aside.mkdir()
    files: dict[str, str] = {}
    for stem, content in tensors.items():
        path = aside / f"{stem}.safetensors"
        save_file({k: v.contiguous() for k, v in content.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = digest(path)
        _compare(path, content)
    manifest = Manifest(
        position=position,
        optimizer_step=optimizer_step,
        files=files,
        past={str(path.relative_to(run)): digest(path) for path in past},
        live=live,
    )
    write_json(aside / MANIFEST, asdict(manifest))
    if fence is not None:
        fence.check()
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    sync_folder(root)
    return target


def _compare(path: Path, content: dict[str, torch.Tensor]) -> None:
    """Reopen a file: same names, same shapes, same bits."""
    read = load_file(path)
    same = read.keys() == content.keys() and all(
        read[name].shape == value.shape and torch.equal(_bits(read[name]), _bits(value))
        for name, value in content.items()
    )
    if not same:
        raise CheckpointError(
            f"{path}: what was read back differs from what was written. Check the disk and its "
            "free space; earlier checkpoints are untouched."
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: a nan, such as in an unused row of a base's embedding, equals no number."""
    return tensor.contiguous().flatten().view(torch.uint8)


def read_manifest(folder: Path, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and check every file it names.

    Args:
        folder: The checkpoint.
        verify: False: trust the files (they were checked before).

    Raises:
        CheckpointError: It is missing, damaged, or a file's checksum is wrong.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {raw['format']}, this version reads format {FORMAT}. Resume with "
                "the version that wrote it (run.json names it)."
            )
        manifest = Manifest(**{**raw, "position": Position(**raw["position"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}).") from error
    run = folder.parent.parent
    if not verify:
        return manifest
    for name, expected in manifest.files.items():
        _check(folder / name, expected)
    for name, expected in manifest.past.items():
        _check(run / name, expected)
    return manifest


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing.")
    try:
        found = digest(path)
    except OSError as error:  # a bad disk, a stale handle: the checkpoint before may be sound
        raise CheckpointError(f"{path}: unreadable ({error}).") from error
    if found != expected:
        raise CheckpointError(f"{path}: its checksum is not the one recorded; it is damaged.")


def positions(run: Path) -> list[Position]:
    """Positions of all finished checkpoints of a run, oldest first; folders that somebody has put
    aside under another name are passed over.
    """
    found = []
    for folder in (run / "checkpoints").glob("stage-*"):
        name = CHECKPOINT.fullmatch(folder.name)
        if name is not None and (folder / MANIFEST).is_file():
            step = None if name[2] is None else int(name[2])
            found.append(Position(stage=int(name[1]), step=step))
    return sorted(found, key=lambda position: position.order)


def newest(run: Path) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint whose every byte is as recorded, and what is wrong with newer ones.

    In mid-task the boundary before it belongs to it: that one holds the method's state.
    """
    problems: list[str] = []
    for position in reversed(positions(run)):
        try:
            found = read_manifest(run / "checkpoints" / position.folder)
            if position.step is not None and position.stage:
                read_manifest(run / "checkpoints" / Position(stage=position.stage - 1).folder)
            return found, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def load(run: Path, position: Position, stem: str) -> dict[str, torch.Tensor]:
    """Tensors of one file of a checkpoint; empty if the checkpoint has no such file."""
    path = run / "checkpoints" / position.folder / f"{stem}.safetensors"
    return load_file(path) if path.is_file() else {}


def load_each(run: Path, position: Position, stem: str) -> Iterator[tuple[str, torch.Tensor]]:
    """As `load`, one tensor after another, for files that are as large as the model."""
    path = run / "checkpoints" / position.folder / f"{stem}.safetensors"
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def prune_steps(run: Path, keep: int, written: Position) -> None:
    """Delete step checkpoints that nothing goes on from.

    Those of finished stages; those later than the one just written, which a run that had to go back
    behind damage has left over; and all but the newest `keep` of the stage.
    """
    steps = [p for p in positions(run) if p.step is not None]
    same = [p for p in steps if p.stage == written.stage and p.order <= written.order]
    kept = same[-keep:] if written.step is not None else []
    for position in steps:
        if position not in kept:
            shutil.rmtree(run / "checkpoints" / position.folder, ignore_errors=True)
