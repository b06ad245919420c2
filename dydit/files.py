"""Files and folders that appear whole or not at all, and what tells that they are the ones written."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dydit.errors import OutputError

_READ_BYTES = 1 << 20


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write a file under a temporary name, sync it and rename it into place.

    Raises:
        OutputError: the place cannot be written.
    """
    path = Path(path)
    with _output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block ends without an error.

    Everything in it is synced first. A folder that was there before is replaced whole; of a link to one, the
    folder that it leads to.

    Raises:
        OutputError: the place, or what the block writes there, cannot be written, or it is a file.
    """
    check_replaceable(folder)
    folder = Path(os.path.realpath(folder))
    with _output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield temporary
            for path in (temporary, *temporary.rglob("*")):
                # Some writers make private files; a folder's content is as open as the user's umask says.
                os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())
                _sync(path)
            _swap(temporary, folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_replaceable(folder: str | Path) -> None:
    """Make sure, before hours of work, that another folder can take the place of ``folder``.

    Raises:
        OutputError: it is a file, a file system begins there, or it is where the process works.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", expected="a folder to write", remedy="choose another --out")
    if os.path.ismount(os.path.realpath(folder)) or (folder.is_dir() and folder.samefile(Path.cwd())):
        raise OutputError(
            f"{folder} is a mount point or the current folder",
            expected="a folder that can be replaced",
            remedy=f"write to a folder in it, such as {folder / 'export'}",
        )


def check_writable(folder: str | Path) -> None:
    """Make sure, before hours of work, that ``folder`` can be made and written.

    Raises:
        OutputError: it cannot.
    """
    folder = Path(folder)
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _swap(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``; what was there leaves only once the new one is in place."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    was = old / "was"
    try:
        os.rename(folder, was)
        os.rename(temporary, folder)
    except BaseException:
        if was.exists():
            os.rename(was, folder)
        old.rmdir()  # not before its content is back in place
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk in its own way
        raise OutputError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error})",
            remedy="choose a folder that exists and is yours, or free space",
        ) from error
