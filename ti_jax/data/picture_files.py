"""The files of a folder: which are pictures, what they are called, and how often an epoch shows them."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ti_jax.data.formats import format_by_content, format_by_suffix, readable_suffixes, remedy
from ti_jax.data.masks import picture_of
from ti_jax.errors import InputError, listed

COMMON_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_in(folder: str | Path, recursive: bool = False, above: frozenset[str] = frozenset()) -> list[Path]:
    """Files of a folder, or also of its sub-folders, that are not hidden, and broken links; sorted by name.

    Args:
      above: where the folders that it is in really are; a link that leads back to one of them is not followed.

    Raises:
      InputError: no such folder, or it cannot be read.
    """
    folder = Path(folder)
    above |= {os.path.realpath(folder)}
    found: list[Path] = []
    try:
        for entry in os.scandir(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                found.append(Path(entry.path))
            elif recursive and entry.is_dir() and os.path.realpath(entry.path) not in above:
                found += files_in(entry.path, recursive, above)
        return sorted(found)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder; give the folder with the pictures") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder}: not a folder; give the folder with the pictures, not one of them") from error
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read ({error.strerror}); change its permissions") from error


def picture_paths(folder: str | Path, recursive: bool = False) -> list[Path]:
    """Files of ``folder``, or also of its sub-folders, that `load_images` reads, sorted by name.

    Raises:
      InputError: no such folder, a file instead of a folder, no permission, or no picture in it.
    """
    suffixes = readable_suffixes()
    # A broken link is kept, so that reading it is an error: it once pointed to a picture.
    paths = [
        path
        for path in files_in(folder, recursive)
        if path.suffix.lower() in suffixes and picture_of(path.name) is None
    ]
    if not paths:
        unread = unread_pictures(folder, recursive)
        if not recursive and (deeper := [path for path in files_in(folder, True) if path.suffix.lower() in suffixes]):
            raise InputError(f"{folder}: no pictures in this folder, but {len(deeper)} in sub-folders; add --recursive")
        raise InputError(
            f"{folder}: no pictures in this folder; looked for {', '.join(COMMON_SUFFIXES)} and "
            f"{len(suffixes.difference(COMMON_SUFFIXES))} rarer suffixes{', in sub-folders, too' if recursive else ''}"
            + (f". Not read: {unread}" if unread else "")
        )
    return paths


def unread_pictures(folder: str | Path, recursive: bool = False) -> str | None:
    """A message on the pictures in ``folder`` that cannot be read: how many, which, and what to do; None if none.

    They are recognised by their suffix or, if that is unknown, by their first bytes.

    Raises:
      InputError: as `picture_paths`, but for a folder without pictures.
    """
    suffixes = readable_suffixes()
    found: dict[str, list[str]] = {}
    for path in files_in(folder, recursive):
        if path.suffix.lower() in suffixes:
            continue
        name = format_by_suffix(path) or format_by_content(path)
        if name is not None:
            found.setdefault(name, []).append(path.name)
    if not found:
        return None
    parts = [f"{len(names)} {name} ({listed(names, 3)}): {remedy(name)}" for name, names in sorted(found.items())]
    total = sum(map(len, found.values()))
    return f"{total} of the pictures in {folder}: {'; '.join(parts)}"


def name_in(folder: str | Path, path: Path) -> str:
    """A file's name from ``folder`` on, with slashes, as `Pictures` has it."""
    return path.relative_to(folder).as_posix()


def repeats_of(name: str) -> int:
    """How often an epoch shows a picture: ten times in a sub-folder ``10_name``, as in kohya's scripts, else once.

    Raises:
      InputError: it is in a folder such as ``0_name``.
    """
    for folder in reversed(name.split("/")[:-1]):
        if (found := re.match(r"(\d+)_", folder)) is not None:
            if int(found[1]) == 0:
                raise InputError(f"{name}: its folder {folder} says to show it 0 times; move it away, or rename it")
            return int(found[1])
    return 1


def report_repeats(names: Sequence[str], report: Callable[[str], None]) -> None:
    """Report how often an epoch shows the pictures, unless each is shown once."""
    counts = collections.Counter(map(repeats_of, names))
    if set(counts) != {1}:
        parts = (f"{number} of the pictures {repeats} times" for repeats, number in sorted(counts.items()))
        report(f"folders: by their names an epoch shows {', '.join(parts)}")
