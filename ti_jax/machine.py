"""What a program takes from its machine: memory, which may be too little, and a folder for compiled programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ti_jax.errors import InputError

# Share of a device's memory that is left alone: allocators lose some between blocks, and libraries take some.
SPARE = 0.05


def free_memory(devices: Sequence[Any]) -> float | None:
    """Bytes that each of this machine's devices has left to use, `SPARE` taken off; None where nothing says so.

    Args:
      devices: those that will be used, all of one kind. CPU devices share the machine's memory.
    """
    device = devices[0]
    if device.platform == "cpu":
        left = [free for free in (_available(), _left_in_groups()) if free is not None]
        return min(left) * (1 - SPARE) / len(devices) if left else None
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] * (1 - SPARE) - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _available(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """Bytes that Linux can give without swapping."""
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None


# Files of a control group, of the system's version 2 and 1: limit, use, and which part of that is files' copies.
_GROUP_2 = ("memory.max", "memory.current", "inactive_file")
_GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_in_groups(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes that the control groups of this process, as containers and batch systems set them up, leave it."""
    left = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, _GROUP_2
        elif "memory" in controllers.split(","):
            top, names = root / "memory", _GROUP_1
        else:
            continue
        group = top / path.lstrip("/")
        # A group's limit holds for all within it. In a container the path may be the host's, and only the top is there.
        left += [_left_in_group(each, *names) for each in (group, *group.parents) if each.is_relative_to(top)]
    return min((free for free in left if free is not None), default=None)


def _left_in_group(group: Path, limit: str, used: str, files: str) -> float | None:
    sizes = [_text(group / name).strip() for name in (limit, used)]
    if not all(size.isdecimal() for size in sizes):  # "max" is no limit
        return None
    counts = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines())
    # The system takes back what it holds of files.
    return float(sizes[0]) - float(sizes[1]) + float(counts.get(files, 0))


def _text(path: Path) -> str:
    return path.read_text() if os.access(path, os.R_OK) else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had too little memory for something."""
    if isinstance(error, MemoryError):
        return True
    # XLA raises one class for everything; its allocators say the first, CUDA and its libraries the others.
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")
    )


@contextlib.contextmanager
def explaining_out_of_memory(remedy: str) -> Iterator[None]:
    """Within it, or within a function that it decorates, too little memory is an `InputError` that ends in `remedy`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"out of memory ({first[:200]}): {remedy}") from error


# Thousands of programs of the embedded model, dozens of Stable Diffusion XL's.
CACHE_BYTES = 8 * 1000**3


def enable_compilation_cache() -> None:
    """Keep compiled programs in ``~/.cache/ti_jax/xla``, which is cut to `CACHE_BYTES` here, at the start of a program.

    Where the caller has chosen a folder (JAX_COMPILATION_CACHE_DIR, or ``jax.config``) nothing is changed, so a second
    call changes nothing either. To be called after `ti_jax.training.multihost.join`.
    """
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None:
        return
    joined = jax.distributed.is_initialized()
    if not may_cache(jax.process_count() if joined else 1, jax.default_backend() if joined else None):
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        remove_oldest(folder, CACHE_BYTES)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: then without
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def may_cache(processes: int, platform: str | None) -> bool:
    """Whether a folder of this host's own may be used by one of several processes.

    JAX fills it from the first process alone. In the next run that process finds its programs there and the others
    compile; on GPUs XLA shares out the tuning of kernels among all processes of a program, and these would wait for the
    share of the first for ever.
    """
    return processes == 1 or platform not in ("gpu", "cuda", "rocm")


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest, until the rest takes at most `limit` bytes.

    JAX can do so itself (jax_compilation_cache_max_size), but reads a file for each program that is there whenever it
    keeps another one: 0.06 s at 500 programs, as many as a few configs make.
    """
    files = [(entry, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
    total = sum(stat.st_size for _, stat in files)
    # Where the time of the last use is not kept up (noatime), that of writing counts.
    for entry, stat in sorted(files, key=lambda file: max(file[1].st_atime, file[1].st_mtime)):
        if total <= limit:
            break
        Path(entry).unlink(missing_ok=True)
        total -= stat.st_size
