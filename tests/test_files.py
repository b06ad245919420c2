from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dydit import files
from dydit.errors import OutputError
from dydit.files import check_replaceable, check_writable, new_folder, write_file


class Stop(BaseException):
    """What a signal raises: not an Exception."""


@pytest.mark.parametrize("data", [b"\x00\xff", "text, naïve"])
def test_write_file_makes_parents_and_replaces(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in ("before", data):
        write_file(path, content)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), Stop()])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "file"
    write_file(path, "before")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_file(path, "after")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_write_file_says_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/below cannot be written \(.+\); choose a folder"):
        write_file(tmp_path / "file" / "below", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be written"):
        write_file(tmp_path / "folder", "")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_in_safetensors_is_told_as_any_other(tmp_path: Path) -> None:
    message = r"folder cannot be written \(.*No space.*\); .*free space$"
    with pytest.raises(OutputError, match=message), new_folder(tmp_path / "folder"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert not os.listdir(tmp_path)


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    with new_folder(target) as scratch:
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_text("new")
        assert not target.exists() and scratch.parent == target.parent
    assert (target / "deep" / "file").read_text() == "new"
    assert os.listdir(target.parent) == ["target"]


def test_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("old", "new"):
        with new_folder(target) as scratch:
            (scratch / name).write_text("")
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), Stop()])
def test_an_error_inside_leaves_what_was_there(tmp_path: Path, before: bool, error: BaseException) -> None:
    target = tmp_path / "target"
    if before:
        write_file(target / "old", "old")
    with pytest.raises(type(error)), new_folder(target) as scratch:
        (scratch / "new").write_text("")
        raise error
    assert target.exists() == before
    assert os.listdir(tmp_path) == ["target"] * before
    assert not before or (target / "old").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "target"
    write_file(target / "old", "old")
    rename, calls = os.rename, []

    def fail_once(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(16, "Device or resource busy")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", fail_once)
    with pytest.raises(OutputError, match="Device or resource busy"), new_folder(target):
        pass
    assert os.listdir(tmp_path) == ["target"] and os.listdir(target) == ["old"]


def test_a_folder_that_cannot_be_put_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    write_file(target / "old", "the only copy")
    rename, calls = os.rename, []

    def fail_after_the_first(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", fail_after_the_first)
    with pytest.raises(OutputError), new_folder(target):
        pass
    assert [path.read_text() for path in tmp_path.rglob("old") if path.is_file()] == ["the only copy"]


def test_new_folder_refuses_a_file_and_a_place_under_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OutputError, match="file is a file; expected a folder to write"), new_folder(file):
        pytest.fail("entered")
    with pytest.raises(OutputError, match="cannot be written"), new_folder(file / "below"):
        pytest.fail("entered")
    assert file.read_text() == "kept" and os.listdir(tmp_path) == ["file"]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with new_folder(tmp_path / "link") as scratch:
        (scratch / "new").touch()
        assert scratch.parent == tmp_path / "disk"  # on the same file system
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk" / "real") == ["new"]


def test_what_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path, "/proc"):
        with pytest.raises(OutputError, match="mount point or the current folder; .*write to a folder in it"):
            check_replaceable(folder)
        with pytest.raises(OutputError, match="mount point"), new_folder(folder):
            pytest.fail("entered")
    check_replaceable(tmp_path / "new")


def test_results_are_as_open_as_the_umask_says(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "")
        with new_folder(tmp_path / "folder") as scratch:
            (scratch / "private").touch(mode=0o600)
        assert os.umask(0o027) == 0o027  # as it was
    finally:
        os.umask(mask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "folder": 0o750, "private": 0o640}


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert not os.listdir(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file cannot be written"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="below cannot be written"):
        check_writable(tmp_path / "file" / "below")
