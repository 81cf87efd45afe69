"""Atomic file writes, and disk errors reported on one line."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ti_jax.errors import InputError
from ti_jax.interrupts import whole

Content = bytes | Callable[[BinaryIO], None]

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file exceeds the size limit; raise the limit (ulimit -f) or choose another place",
    errno.EACCES: "no permission; change the permissions or choose another place",
    errno.EPERM: "not permitted; change the permissions or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOTDIR: "a part of the path is a file and not a folder; choose another place",
    errno.EEXIST: "a file of that name is in the way; remove it or choose another name",
    errno.EISDIR: "a folder of that name is in the way; remove it or choose another name",
    errno.ENOENT: "there is no such folder; make it or choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "the path is a loop of symbolic links; choose another place",
}


def disk_fault(error: OSError) -> str:
    """A message for a disk error: what went wrong and what to do."""
    return _REMEDIES.get(error.errno or 0) or (error.strerror or str(error) or type(error).__name__)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Context that turns an `OSError` into an `InputError` naming ``path`` and a remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {disk_fault(error)}") from error


def as_url(path: Path | str) -> str | None:
    """The URL that a path is, such as ``gs://bucket/folder``, also after `Path` has taken a slash from it; else None.

    Letters before a colon are a kind of URL if there are two or more: one is a drive of Windows.
    """
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+([^/].*)", str(path), re.DOTALL)
    return None if found is None else f"{found[1]}://{'/' if found[1] == 'file' else ''}{found[2].rstrip('/')}"


def refuse_url(path: Path | str) -> None:
    """Raise `InputError` for a URL: only the folder of a run may be behind one."""
    if (url := as_url(path)) is not None:
        raise InputError(
            f"{url}: only --output_dir may be a URL; give a path of this machine, and copy the file from there"
        )


def write_atomically(path: Path | str, content: Content) -> None:
    """Write a file atomically: at any time ``path`` is the complete old file or the complete new one.

    Args:
      content: the bytes, or a function that writes them to an open binary file.

    Raises:
      InputError: the disk is full, or the path cannot be written. The old file is unchanged.
    """
    write_together({Path(path): content})


def write_together(contents: Mapping[Path, Content]) -> None:
    """As `write_atomically`, for files that belong together: none is replaced before all have been written to disk.

    A crash between the first and the last rename would still leave a mixture, which readers of pairs must detect.

    Raises:
      InputError: as `write_atomically`; the old files are unchanged, unless a rename after the first fails.
    """
    with whole():
        _write_together(contents)


def _write_together(contents: Mapping[Path, Content]) -> None:
    temporaries: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            refuse_url(path)
            with disk_errors(path):
                # A symbolic link stays: its target is replaced. In the same folder, or the rename would not be atomic.
                target = Path(os.path.realpath(path))
                temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
                temporaries.append((temporary, target))
                _write_to_disk(temporary, content)
        for temporary, target in temporaries:
            with disk_errors(target):
                os.replace(temporary, target)
    finally:
        for temporary, target in temporaries:
            with disk_errors(target):
                if os.path.lexists(temporary):
                    temporary.unlink()


def _write_to_disk(path: Path, content: Content) -> None:
    """Write a new file and fsync it: some file systems report a full disk only then."""
    # Not tempfile: its files can be read by their owner only. Here the umask applies, as for any other output.
    with open(path, "xb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """Add ``content`` to the end of a file, all of it or nothing: half a record would spoil the next one too.

    Raises:
      InputError: the disk is full, or the file cannot be written. It is as it was.
    """
    # Without a buffer, so that closing cannot fail over what a full disk has refused before.
    with whole(), disk_errors(path), path.open("ab", buffering=0) as file:
        end, rest = file.seek(0, os.SEEK_END), memoryview(content)
        try:
            while rest:  # on a disk that is nearly full, write stops early without an error
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def ensure_writable_folder(folder: Path | str) -> Path:
    """Create the folder with its parents if needed, and check that a file can be written there.

    Raises:
      InputError: it cannot be created or written.
    """
    refuse_url(folder)
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-{secrets.token_hex(8)}"
        try:
            # Not an empty file: creating one succeeds even on a full disk.
            _write_to_disk(probe, bytes(4096))
        finally:
            if os.path.lexists(probe):
                probe.unlink()
    return folder


@contextmanager
def writable_folder(folder: Path | str) -> Iterator[Path]:
    """Context within which a folder is there, see `ensure_writable_folder`.

    What it had to make, of the folder and its parents, is removed at the end if nothing is in it: a command that is
    refused leaves nothing.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        yield ensure_writable_folder(folder)
    finally:
        for each in made:
            with suppress(OSError):  # something is in it
                each.rmdir()
