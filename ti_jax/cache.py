"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``~/.cache/ti_jax``, or where TI_JAX_CACHE says; ``~/.cache`` is another folder where XDG_CACHE_HOME says so.

    Raises:
      RuntimeError: there is no home folder.
    """
    if chosen := os.environ.get("TI_JAX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti_jax"


def cache_folder(name: str, limit: int) -> Path | None:
    """The folder NAME in `cache_root`, reduced to ``limit`` bytes; None if it cannot be written."""
    try:
        folder = cache_root() / name
        folder.mkdir(parents=True, exist_ok=True)
        remove_oldest(folder, limit)
    except (OSError, RuntimeError):  # no home folder, or another process removes the same files: no cache
        return None
    return folder if os.access(folder, os.W_OK) else None


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the least recently used files until the rest takes at most `limit` bytes.

    JAX can do so itself (jax_compilation_cache_max_size), but then reads a file for each cached program whenever it
    adds one: 0.06 s with 500 programs, as many as a few configs need.
    """
    files = [(entry, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
    total = sum(stat.st_size for _, stat in files)
    # On file systems without access times (noatime) the time of writing is used.
    for entry, stat in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
        if total <= limit:
            break
        Path(entry).unlink(missing_ok=True)
        total -= stat.st_size
