"""The machine's resources: free memory, out-of-memory errors, and the cache of compiled programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from ti_jax.cache import cache_folder
from ti_jax.errors import InputError

# Share of a device's memory kept free, for fragmentation and for libraries.
SPARE = 0.05


def free_memory(devices: Sequence[Any]) -> float | None:
    """Free bytes on each of this machine's devices, less `SPARE`; None if unknown.

    Args:
      devices: the devices to use, all of one kind. CPU devices share the machine's memory.
    """
    device = devices[0]
    if device.platform == "cpu":
        left = [free for free in (_available(), _left_in_groups()) if free is not None]
        return min(left) * (1 - SPARE) / len(devices) if left else None
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] * (1 - SPARE) - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _available(meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """Bytes that Linux can allocate without swapping."""
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return None


# Files of a control group (cgroup version 2 and 1): limit, usage, and the usage's part that is page cache.
_GROUP_2 = ("memory.max", "memory.current", "inactive_file")
_GROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_in_groups(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Bytes left by the limits of this process's control groups, which containers and batch systems set."""
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
        # A limit also applies to all child groups. In a container the path may be the host's; only the top exists then.
        left += [_left_in_group(each, *names) for each in (group, *group.parents) if each.is_relative_to(top)]
    return min((free for free in left if free is not None), default=None)


def _left_in_group(group: Path, limit: str, used: str, files: str) -> float | None:
    sizes = [_text(group / name).strip() for name in (limit, used)]
    if not all(size.isdecimal() for size in sizes):  # "max" is no limit
        return None
    counts = dict(line.split(maxsplit=1) for line in _text(group / "memory.stat").splitlines())
    # Page cache can be reclaimed.
    return float(sizes[0]) - float(sizes[1]) + float(counts.get(files, 0))


def _text(path: Path) -> str:
    return path.read_text() if os.access(path, os.R_OK) else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception means that a device or the machine ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    # XLA raises one class for everything; the first message is its allocators', the others CUDA's and its libraries'.
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")
    )


@contextlib.contextmanager
def explaining_out_of_memory(remedy: str) -> Iterator[None]:
    """Context or decorator that turns running out of memory into an `InputError` ending in `remedy`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"out of memory ({first[:200]}): {remedy}") from error


# Enough for thousands of programs of the embedded model, or dozens of Stable Diffusion XL's.
CACHE_BYTES = 8 * 1000**3


def enable_compilation_cache() -> None:
    """Cache compiled programs in ``~/.cache/ti_jax/xla``, and reduce it to `CACHE_BYTES`, at the start of a program.

    Does nothing if a cache folder is already set (JAX_COMPILATION_CACHE_DIR, ``jax.config``, or an earlier call). Call
    it after `ti_jax.training.multihost.join`.
    """
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None:
        return
    joined = jax.distributed.is_initialized()
    if not may_cache(jax.process_count() if joined else 1, jax.default_backend() if joined else None):
        return
    folder = cache_folder("xla", CACHE_BYTES)
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def may_cache(processes: int, platform: str | None) -> bool:
    """Whether a cache folder on this host's own disk may be used by one of several processes.

    Only the leader process writes it. In the next run the leader would load its programs while the others compile; on
    GPUs XLA shards kernel autotuning over all processes of a program, so that the others would wait for the leader's
    shard for ever.
    """
    return processes == 1 or platform not in ("gpu", "cuda", "rocm")
