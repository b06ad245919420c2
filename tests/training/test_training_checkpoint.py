"""Checkpoints on disk: whole or not at all, checked byte by byte, found and pruned."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dydit.errors import CheckpointError, OutputError
from dydit.training import checkpoint
from dydit.training.checkpoint import (
    Snapshot,
    find_checkpoint,
    identity,
    leave_behind,
    list_checkpoints,
    load_checkpoint,
    prune,
    remove_scratch,
    save_checkpoint,
)


def snapshot(step: int) -> Snapshot:
    tensors = {"model": {"weight": torch.full((64, 4), float(step))}, "optimizer": {}}
    return Snapshot(step, tensors, {"progress": {"step": step}, "text": "λ"})


def names(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, snapshot(7))
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert (tmp_path / "latest").read_text() == "checkpoints/step-00000007\n"
    loaded = load_checkpoint(folder)
    assert loaded.step == 7 and loaded.state == snapshot(7).state
    assert torch.equal(loaded.tensors["model"]["weight"], snapshot(7).tensors["model"]["weight"])
    assert loaded.tensors["optimizer"] == {}


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(7))
    (tmp_path / "checkpoints" / "step-00000007" / "model.safetensors").write_bytes(b"broken")
    assert load_checkpoint(save_checkpoint(tmp_path, snapshot(7))).step == 7


def full_disk(*_args: Any, **_options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*_args: Any, **_options: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("dydit.training.checkpoint.save_file", full_disk_in_safetensors),
        ("dydit.training.checkpoint.json.dumps", full_disk),
        ("dydit.training.checkpoint._write_manifest", full_disk),
        ("os.fsync", full_disk),
        ("os.rename", full_disk),
    ],
)
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, fault: Callable[..., Any]
) -> None:
    save_checkpoint(tmp_path, snapshot(10))
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(where, fault)
        with pytest.raises(
            OutputError, match=r"step 20 was not saved .*No space left on device.*step 10 is intact"
        ):
            save_checkpoint(tmp_path, snapshot(20))
    assert names(tmp_path) == before
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "checkpoints" / "step-00000010"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_text('{"format": 1, "step": 20, "files": {}}')


def without_sizes(path: Path) -> None:
    path.write_text('{"format": 1, "step": 20, "files": {"state.json": null}}')


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", truncate, r"model\.safetensors has \d+ bytes; expected \d+ bytes"),
        ("model.safetensors", flip, r"model\.safetensors is corrupt"),
        ("model.safetensors", Path.unlink, r"model\.safetensors is missing"),
        ("state.json", flip, r"state\.json is corrupt"),
        ("manifest.json", Path.unlink, r"no readable manifest\.json"),
        ("manifest.json", truncate, r"no readable manifest\.json"),
        ("manifest.json", emptied, r"no readable manifest\.json \(KeyError\)"),
        ("manifest.json", without_sizes, r"no readable manifest\.json \(TypeError\)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_auto(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    good, bad = save_checkpoint(tmp_path, snapshot(10)), save_checkpoint(tmp_path, snapshot(20))
    damage(bad / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(bad)
    assert str(bad) in str(caught.value) and "--resume auto" in str(caught.value)
    assert find_checkpoint(tmp_path, "auto") == good


def test_what_a_full_disk_leaves_is_named_only_if_it_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, snapshot(10))
    truncate(save_checkpoint(tmp_path, snapshot(20)) / "model.safetensors")
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OutputError, match=r"step 30 was not saved .*the checkpoint at step 10 is intact"):
        save_checkpoint(tmp_path, snapshot(30))
    truncate(tmp_path / "checkpoints" / "step-00000010" / "model.safetensors")
    with pytest.raises(OutputError, match="step 30 was not saved") as caught:
        save_checkpoint(tmp_path, snapshot(30))
    assert "intact" not in str(caught.value)


def test_auto_finds_nothing_in_a_new_folder_and_refuses_one_with_only_damage(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None
    truncate(save_checkpoint(tmp_path, snapshot(10)) / "state.json")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        find_checkpoint(tmp_path, "auto")


def test_resume_takes_a_checkpoint_or_a_run_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(10))
    newest = save_checkpoint(tmp_path, snapshot(20))
    assert find_checkpoint(tmp_path / "other", str(tmp_path)) == newest
    older = tmp_path / "checkpoints" / "step-00000010"
    assert find_checkpoint(tmp_path, str(older)) == older
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        save_checkpoint(tmp_path, snapshot(step))
    prune(tmp_path, 25, keep_last=2, keep_every=10)
    assert list(list_checkpoints(tmp_path)) == [10, 20, 25]  # 30 lies in a future given up by resuming


def test_checkpoints_after_the_one_to_go_on_from_are_left_behind(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, snapshot(step))
    before = tmp_path / "checkpoints" / "step-00000010"
    assert leave_behind(tmp_path, before) == [20, 15]
    assert list(list_checkpoints(tmp_path)) == [5, 10] and find_checkpoint(tmp_path, "auto") == before
    assert (tmp_path / "latest").read_text() == "checkpoints/step-00000010\n"
    assert leave_behind(tmp_path, before) == []
    assert leave_behind(tmp_path / "other", before) == []  # of another run: nothing here comes after it


def test_a_checkpoint_that_cannot_be_left_behind_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_checkpoint(tmp_path, snapshot(5))
    save_checkpoint(tmp_path, snapshot(10))

    def refuse(*_args: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint, "_discard", refuse)
    with pytest.raises(OutputError, match=r"step-00000010 cannot be deleted: Permission denied; delete it"):
        leave_behind(tmp_path, first)


def test_only_copies_of_a_checkpoint_have_its_identity(tmp_path: Path) -> None:
    one, other = save_checkpoint(tmp_path / "a", snapshot(5)), save_checkpoint(tmp_path / "b", snapshot(5))
    assert identity(one) == identity(other) and identity(one).startswith("step-00000005 (")
    different = Snapshot(5, snapshot(6).tensors, snapshot(5).state)
    assert identity(save_checkpoint(tmp_path / "b", different)) != identity(one)


def test_what_a_kill_left_behind_is_not_a_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, snapshot(10))
    before = names(tmp_path)
    (tmp_path / "checkpoints" / ".step-00000020.abc").mkdir()
    (tmp_path / "checkpoints" / ".step-00000020.abc" / "model.safetensors").write_bytes(b"half")
    for name in (".latest.xyz", ".metrics.jsonl.xyz", ".wandb_id.xyz"):
        (tmp_path / name).write_text("half")
    assert list(list_checkpoints(tmp_path)) == [10]
    remove_scratch(tmp_path)
    assert names(tmp_path) == before


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    folder = save_checkpoint(tmp_path, snapshot(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; expected format 1"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_what_cannot_be_read_just_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Else the run would go on from an older checkpoint, and its next save delete this one."""
    save_checkpoint(tmp_path, snapshot(10))
    newest = save_checkpoint(tmp_path, snapshot(20))
    opened = Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if path == newest / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    message = (
        rf"step-00000020/{re.escape(name)} cannot be read \(Input/output error\); make it readable, or move"
    )
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path, "auto")


def test_a_checkpoint_of_a_newer_format_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, snapshot(10))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(tmp_path, snapshot(20))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; expected format 1"):
        find_checkpoint(tmp_path, "auto")
