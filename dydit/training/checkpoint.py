"""Checkpoints on disk: folders that appear whole or not at all, with a checksum for every file.

``run/checkpoints/step-00000020/`` holds safetensors files, ``state.json`` and ``manifest.json`` (size and
sha256 of the others). It is written under a temporary name, flushed to the disk and then renamed;
``run/latest`` names the newest one. Nothing is pickled. (accelerate's ``save_state`` pickles optimiser and
generator states and writes in place, so a kill during a save would leave a broken checkpoint under its name.)
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit.errors import CheckpointError, OutputError
from dydit.files import new_folder, sha256_of, write_file

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_ANOTHER = "take another checkpoint, or --resume auto for the newest intact one"
# What is written in a run folder, under the names that it has before it is whole.
_SCRATCH = (
    f"{CHECKPOINTS}/.step-*", ".latest.*", ".config.yaml.*", ".metrics.jsonl.*", ".wandb_id.*", ".model.*",
)  # fmt: skip

log = logging.getLogger(__name__)


class BrokenCheckpointError(CheckpointError):
    """A checkpoint of which a part is missing or altered, so that an older one is better than none."""


@dataclass(frozen=True)
class Snapshot:
    """A whole training state.

    Args:
        step: optimiser steps done.
        tensors: file name without ending (``model``, ``ema``, …) -> name -> tensor.
        state: everything else, as JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(run: Path, snapshot: Snapshot, source: Path | None = None) -> Path:
    """Write ``snapshot`` into the run folder and point ``latest`` to it.

    Args:
        run: the run folder.
        snapshot: the state.
        source: the last checkpoint that the run was saved in or went on from, perhaps another run's; for the
            error's remedy.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: it cannot be written (the disk is full, say). What was there before is intact, and
            nothing half-written is left.
    """
    target = run / CHECKPOINTS / checkpoint_name(snapshot.step)
    try:
        with new_folder(target) as scratch:
            for name, tensors in snapshot.tensors.items():
                whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(whole, scratch / f"{name}.safetensors")
            (scratch / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
            _write_manifest(scratch, snapshot.step)
        write_file(run / LATEST, f"{CHECKPOINTS}/{target.name}\n")
    except OutputError as problem:
        cause = problem.__cause__ or problem
        reason = getattr(cause, "strerror", None) or cause
        raise OutputError(
            f"the checkpoint at step {snapshot.step} was not saved in {run}: {reason}",
            remedy=_remedy(run, source),
        ) from problem
    return target


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint back, after checking every byte of it.

    Raises:
        CheckpointError: something is missing, truncated or altered; names the file.
    """
    manifest = verify(folder)
    try:
        tensors = {
            name.removesuffix(".safetensors"): load_file(folder / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as problem:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {problem}") from problem
    return Snapshot(int(manifest["step"]), tensors, state)


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest, and return that.

    Raises:
        BrokenCheckpointError: names the checkpoint and the first file at fault.
        CheckpointError: a file cannot be read, or the format is another version's: it may well be intact.
    """
    try:
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                seen = "is missing" if size is None else f"has {size} bytes"
                raise BrokenCheckpointError(
                    f"checkpoint {folder}: {name} {seen}", expected=f"{entry['bytes']} bytes", remedy=_ANOTHER
                )
            if sha256_of(path) != entry["sha256"]:
                raise BrokenCheckpointError(
                    f"checkpoint {folder}: {name} is corrupt",
                    expected=f"sha256 {entry['sha256'][:12]}…",
                    remedy=_ANOTHER,
                )
    except OSError as problem:
        raise CheckpointError(
            f"checkpoint {folder}: {problem.filename or 'a file'} cannot be read ({problem.strerror})",
            remedy="make it readable, or move the checkpoint away to go on from the one before",
        ) from problem
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What ``_write_manifest`` wrote.

    Raises:
        BrokenCheckpointError: it is missing, or something else.
        CheckpointError: it has another format.
        OSError: it is there and cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
        if version == FORMAT:  # all that is read of it is there
            _ = int(manifest["step"]), files[STATE], [(e["bytes"], e["sha256"][:12]) for e in files.values()]
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as problem:
        raise BrokenCheckpointError(
            f"checkpoint {folder} has no readable {MANIFEST} ({type(problem).__name__})",
            expected="a folder checkpoints/step-…", remedy=_ANOTHER,
        ) from problem  # fmt: skip
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version}",
            expected=f"format {FORMAT}",
            remedy="continue with the dydit that wrote it",
        )
    return manifest


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint at ``step``."""
    return f"step-{step:08d}"


def list_checkpoints(run: Path) -> dict[int, Path]:
    """Step -> checkpoint folder of a run, oldest first; intact or not."""
    found = {}
    for path in (run / CHECKPOINTS).glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match.group(1))] = path
    return dict(sorted(found.items()))


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` means.

    Args:
        run: the run folder.
        resume: ``auto`` for the newest intact one in ``run`` (None if it has none at all), or the path of a
            checkpoint or of a run folder.

    Raises:
        CheckpointError: there is nothing at that path, no checkpoint of the run is intact, or the newest that
            is not broken cannot be read.
    """
    if resume == "auto":
        return _newest_intact(run)
    path = Path(resume)
    if (path / MANIFEST).is_file() or _NAME.fullmatch(path.name):
        return path
    if list_checkpoints(path):
        return _newest_intact(path)
    raise CheckpointError(
        f"no checkpoint at {resume}", expected="auto, a folder checkpoints/step-…, or a run folder with some"
    )


def _newest_intact(run: Path) -> Path | None:
    found = list_checkpoints(run)
    problems = []
    for folder in reversed(found.values()):
        try:
            verify(folder)
        except BrokenCheckpointError as problem:
            problems.append(str(problem))
            log.warning("skipped: %s", problem)
        else:
            return folder
    if found:
        raise CheckpointError(
            f"no intact checkpoint in {run} ({problems[0]})",
            remedy="restore one, or start in another output_dir",
        )
    return None


def identity(folder: Path) -> str:
    """Name and hash of an intact checkpoint, for people; equal only for copies of one."""
    return f"{folder.name} ({sha256_of(folder / MANIFEST)[:8]})"


def leave_behind(run: Path, checkpoint: Path) -> list[int]:
    """Delete the checkpoints of a run after one of its own, and point ``latest`` to that.

    The run goes on from there, so they belong to a past that did not happen; ``auto`` would return to them.

    Returns:
        Their steps, newest first: a kill in between leaves a run that ends earlier, without gaps.

    Raises:
        OutputError: one cannot be deleted.
    """
    found = list_checkpoints(run)
    step = next((number for number, folder in found.items() if folder.name == checkpoint.name), None)
    later = [] if step is None else [number for number in reversed(found) if number > step]
    if later:
        write_file(run / LATEST, f"{CHECKPOINTS}/{checkpoint.name}\n")
    for number in later:
        try:
            _discard(found[number])
        except OSError as problem:
            raise OutputError(
                f"{found[number]} cannot be deleted: {problem.strerror or problem}",
                remedy=f"delete it, or continue from it with --resume {found[number]}",
            ) from problem
    return later


def prune(run: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Delete checkpoints that are no longer wanted, now that ``step`` is safely on the disk.

    Kept are the newest ``keep_last`` and the multiples of ``keep_every``. Checkpoints after ``step`` go too:
    the run was resumed before them, as they were broken.
    """
    found = list_checkpoints(run)
    past = [s for s in found if s <= step]
    keep = set(past[-keep_last:]) | {s for s in past if keep_every and s % keep_every == 0}
    for folder in (folder for number, folder in found.items() if number not in keep):
        try:
            _discard(folder)
        except OSError as problem:  # an old checkpoint too many is no reason to end a run
            log.warning("%s cannot be deleted: %s", folder, problem)


def remove_scratch(run: Path) -> None:
    """Delete what a killed process left half-written in a run folder; all of it has hidden names."""
    for pattern in _SCRATCH:
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _remedy(run: Path, source: Path | None) -> str:
    try:
        newest = _newest_intact(run)
    except CheckpointError:
        newest = None
    if newest is None:  # auto would find none either
        return f"free space and use --resume {source or 'auto'}"
    kept = f"the checkpoint at step {int(newest.name.removeprefix('step-'))} is intact"
    return f"{kept}: free space and use --resume auto"


def _discard(folder: Path) -> None:
    """Delete a folder under a hidden name, so that a kill halfway leaves no half of it under its own."""
    doomed = folder.parent / f".{folder.name}.old"
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
