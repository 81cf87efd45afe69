"""What a program takes from its machine: the memory that the devices have left, and a folder for compiled programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

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


def enable_compilation_cache() -> None:
    """Keep compiled programs in ``~/.cache/ti_jax/xla``, unless JAX_COMPILATION_CACHE_DIR names another place.

    For programs only (the command line calls it): a library has no business in its caller's JAX settings.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ti_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
