"""Where a step's time goes, by kernel and by the operation of the program that it comes from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# An instruction of a compiled program and the operation of the model that it was made from.
_INSTRUCTION = re.compile(r'%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')
_NUMBER = re.compile(r"[._]\d+")


def sources(program: str) -> dict[str, str]:
    """By an instruction's name, the operation that it was made from (``op_name``), in a compiled program's text."""
    return {match[1]: match[2] for line in program.splitlines() if (match := _INSTRUCTION.search(line))}


def events(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Kernels in JAX's newest trace in a folder: name, HLO instruction ("" if there is none), and nanoseconds.

    Of GPUs: all that ran in their streams. Of a CPU: whatever has an HLO instruction.
    """
    from jax.profiler import ProfileData

    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(ProfileData.from_file(str(newest)).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                instruction = str(dict(event.stats).get("hlo_op", ""))
                if gpus or instruction:
                    yield event.name, instruction, event.duration_ns


def table(kernels: Iterable[tuple[str, str, float]], steps: int, program: str = "") -> dict[str, Any]:
    """Sum kernels up.

    Args:
      kernels: name, HLO instruction and nanoseconds of each launch. program: the compiled program's text.

    Returns:
      "busy_ms" and "launches" a step; "kinds" [name without numbers, ms a step, launches a step]; and "kernels"
      [name, instruction, its source, ms a step, launches a step]; both lists from the longest down.
    """
    time: Counter[tuple[str, str]] = Counter()
    launches: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    kinds_launches: Counter[str] = Counter()
    for name, instruction, nanoseconds in kernels:
        time[name, instruction] += nanoseconds / 1e6 / steps
        launches[name, instruction] += 1
        kinds[_NUMBER.sub("", name)] += nanoseconds / 1e6 / steps
        kinds_launches[_NUMBER.sub("", name)] += 1
    origin = sources(program)
    return {
        "busy_ms": round(sum(time.values()), 3),
        "launches": round(sum(launches.values()) / steps, 1),
        "kinds": [[name, round(ms, 4), round(kinds_launches[name] / steps, 1)] for name, ms in kinds.most_common()],
        "kernels": [
            [*key, origin.get(key[1], ""), round(ms, 4), round(launches[key] / steps, 1)]
            for key, ms in time.most_common()
        ],
    }
