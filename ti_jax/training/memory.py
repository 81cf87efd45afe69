"""How much the training step keeps for its backward pass: as told, or as much as the device's memory takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ..config import Checkpointing

# Each keeps less, and computes more again, than the one before; see `ti_jax.models.checkpointing`.
WAYS: tuple[Checkpointing, ...] = ("none", "policy", "full")

# Share of a device's memory that is left alone: allocators lose some between blocks, and libraries take some.
SPARE = 0.05


@dataclass(frozen=True)
class CompiledStep:
    """A compiled program, and what of the device's memory it takes.

    Attributes:
      gradient_checkpointing: what it was compiled for.
      program: what came out.
      arguments, temporary, code: bytes on each device: weights, data and results; activations; the program itself.
      fits: in the memory that there was to be; True where that is not known.
    """

    gradient_checkpointing: Checkpointing
    program: jax.stages.Compiled
    arguments: int
    temporary: int
    code: int
    fits: bool

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.arguments + self.temporary + self.code


def compile_step(
    lower: Callable[[Checkpointing], jax.stages.Lowered],
    gradient_checkpointing: Checkpointing | None,
    memory: float | None,
) -> CompiledStep | None:
    """Compile the training step as told, or in the first of `WAYS` that fits; in the last if none does.

    Args:
      lower: the step, lowered for a value of ``--gradient_checkpointing``.
      gradient_checkpointing: that value; None: the first that fits. Where the first does, nothing else is compiled.
      memory: bytes that a device has for the step, its arguments among them; None: not known, and everything fits.

    Returns:
      None if the compiler itself finds that the device has too little memory.
    """
    found = None
    for way in WAYS if gradient_checkpointing is None else (gradient_checkpointing,):
        found = None  # programs are large: not two at a time
        found = _compile(way, lower(way), memory)
        if found is not None and found.fits:
            break
    return found


def _compile(way: Checkpointing, lowered: jax.stages.Lowered, memory: float | None) -> CompiledStep | None:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    sizes = program.memory_analysis()
    assert sizes is not None, "every backend that compiles has it"
    # Where a result takes the place of an argument, it is counted with both.
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporary, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
    fits = memory is None or arguments + temporary + code <= memory
    return CompiledStep(way, program, arguments, temporary, code, fits)


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
