"""``ti-jax doctor``: is everything there that a run needs, and is it used? Each check by itself, with advice."""

from __future__ import annotations

import functools
import glob
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ti_jax import __version__
from ti_jax.config import PlanConfig, resolve_plan
from ti_jax.errors import InputError, one_line
from ti_jax.startup import has_tpu, version_of

Level = Literal["ok", "note", "problem"]

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy", "pillow")
OPTIONAL = ("diffusers", "torch")
# What makes JAX use an accelerator, and the extra that installs it.
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
GIGA = 1e9
# Of the disk: a run needs megabytes, downloading a Stable Diffusion 4 to 7 GB.
LEAST_DISK, MODEL_DISK = 1 * GIGA, 10 * GIGA


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
      level: problem: runs fail, or do not use what is there; note: worth knowing. says: one line.
      advice: what to do, one line; empty: nothing. values: the same for programs.
    """

    check: str
    level: Level
    says: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings."""

    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """There is no problem."""
        return all(each.level != "problem" for each in self.findings)

    def lines(self) -> Iterator[str]:
        """Lines to print."""
        marks = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
        for each in self.findings:
            yield f"{marks[each.level]:9}{each.check:15}{each.says}"
            if each.advice:
                yield f"{'':24}-> {each.advice}"
        problems = sum(each.level == "problem" for each in self.findings)
        yield "all is well" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"

    def as_json(self) -> str:
        """The same for programs."""
        checks = [
            {"check": each.check, "level": each.level, "says": each.says, "advice": each.advice, **each.values}
            for each in self.findings
        ]
        return json.dumps({"ok": self.ok, "checks": checks}, indent=2)


def examine() -> Report:
    """Run all checks; one that fails is a finding."""
    return Report([_by_itself(name, check) for name, check in CHECKS.items()])


def _by_itself(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    # Whatever fails is what the user wants to know, and the other checks still say their part.
    except Exception as error:
        advice = "put this line into a bug report" if not isinstance(error, InputError) else ""
        return Finding(name, "problem", f"{type(error).__name__}: {one_line(error)}", advice)


def versions() -> Finding:
    """Versions of Python and of the packages; one that is missing or too old is a problem."""
    found = {name: version_of(name) for name in (*REQUIRED, *OPTIONAL)}
    faults = [f"{name} is missing" for name in REQUIRED if found[name] is None] + _unmet()
    shown = ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)
    return Finding(
        "versions", "problem" if faults else "ok",
        f"ti_jax {__version__}, Python {platform.python_version()}, {shown}" + "".join(f"; {each}" for each in faults),
        "pip install --upgrade ti_jax" if faults else "",
        {"ti_jax": __version__, "python": platform.python_version(), "system": platform.platform(), **found},
    )  # fmt: skip


def _unmet() -> list[str]:
    """What the installed ti_jax asks for and has not."""
    from packaging.requirements import Requirement

    if version_of("ti_jax") is None:  # run from its source
        return []
    wanted = [Requirement(line) for line in importlib.metadata.requires("ti_jax") or []]
    present = [(each, version_of(each.name)) for each in wanted if each.marker is None or each.marker.evaluate()]
    return [
        f"{each.name} {version} is not {each.specifier}"
        for each, version in present
        if version is not None and not each.specifier.contains(version, prereleases=True)
    ]


def devices() -> Finding:
    """The devices that JAX finds, and how much memory each has free."""
    from ti_jax.machine import free_memory

    _, found, _ = _of_the_demo()
    free, first = free_memory(found), found[0]
    memory = "memory unknown" if free is None else f"{free / GIGA:.1f} GB free on each"
    return Finding(
        "devices", "ok", f"{len(found)} x {first.device_kind} ({first.platform}), {memory}",
        values={"platform": first.platform, "kind": first.device_kind, "count": len(found), "free_bytes": free},
    )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What there is to compute with, and what JAX makes of it.

    Attributes:
      backend: JAX's: cpu, gpu, tpu. nvidia, tpu: whether the machine has such devices.
      plugins: packages of JAX's for accelerators, with their versions. jax: its version.
      platforms, visible: JAX_PLATFORMS and CUDA_VISIBLE_DEVICES; None: not set.
      refusal: why JAX does not use the GPU that it was asked for; empty: not asked, or it does.
    """

    backend: str
    nvidia: bool
    tpu: bool
    plugins: dict[str, str]
    jax: str
    platforms: str | None = None
    visible: str | None = None
    refusal: str = ""


def accelerator() -> Finding:
    """Whether an accelerator that is there is used."""
    import jax

    _of_the_demo()
    backend, nvidia = jax.default_backend(), _has_nvidia()
    names = (*CUDA_PLUGINS, "libtpu", "jax-rocm7-plugin", "jax-metal")
    plugins = {name: version for name in names if (version := version_of(name)) is not None}
    refusal = ""
    if backend == "cpu" and nvidia and plugins.keys() & set(CUDA_PLUGINS):
        try:
            jax.devices("cuda")
        except RuntimeError as error:
            refusal = one_line(error)
    return judge(
        Machine(
            backend, nvidia, has_tpu(), plugins, jax.__version__, os.environ.get("JAX_PLATFORMS"),
            os.environ.get("CUDA_VISIBLE_DEVICES"), refusal,
        )
    )  # fmt: skip


def judge(machine: Machine) -> Finding:
    """`accelerator` for a machine."""
    cuda = [name for name in CUDA_PLUGINS if name in machine.plugins]
    others = [f"{name} {version}" for name, version in machine.plugins.items()]
    values = {"nvidia": machine.nvidia, "tpu": machine.tpu, "plugins": machine.plugins, "backend": machine.backend}

    def found(level: Level, says: str, advice: str = "") -> Finding:
        return Finding("accelerator", level, says, advice, values)

    if len(cuda) > 1:
        return found("problem", f"{' and '.join(cuda)} are both installed", "uninstall the one that you do not want")
    wrong = [name for name in cuda if _release(machine.plugins[name]) != _release(machine.jax)]
    if wrong:
        says = f"{wrong[0]} is {machine.plugins[wrong[0]]} and JAX {machine.jax}: they do not go together"
        extra = "cuda13" if "cuda13" in wrong[0] else "cuda12"
        return found("problem", says, f"pip install --upgrade 'jax[{extra}]=={machine.jax}'")
    if machine.backend != "cpu":
        return found("ok", f"used: {machine.backend}" + (f", by {', '.join(others)}" if others else ""))
    if machine.nvidia and not cuda:
        advice = "pip install 'ti_jax[cuda13]' (driver 580 or newer; else cuda12)"
        return found("problem", "an NVIDIA GPU that JAX does not use: its CUDA plug-in is not installed", advice)
    if machine.tpu and "libtpu" not in machine.plugins:
        return found("problem", "a TPU that JAX does not use: libtpu is not installed", "pip install 'ti_jax[tpu]'")
    if machine.nvidia or machine.tpu:
        what = "an NVIDIA GPU" if machine.nvidia else "a TPU"
        if machine.platforms:
            says = f"{what} that JAX does not use: JAX_PLATFORMS is {machine.platforms}"
            return found("problem", says, "unset JAX_PLATFORMS")
        if machine.nvidia and machine.visible in ("", "-1"):
            return found("note", f"{what} that is hidden by CUDA_VISIBLE_DEVICES", "unset it to use the GPU")
        why = machine.refusal or "another process may hold it"
        advice = "check nvidia-smi and the driver" if machine.nvidia else "end other programs that use the TPU"
        return found("problem", f"{what} that JAX does not use: {why}", advice)
    if others:
        says = f"none; {', '.join(others)} {'is' if len(others) == 1 else 'are'} there for ti-jax plan"
        if not cuda:
            return found("ok", says)
        return found(
            "note", says, "to train on this machine's GPU: its driver, and in a container docker run --gpus all"
        )
    return found("ok", "none: the CPU is used")


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])


def _has_nvidia() -> bool:
    """Whether the driver shows a GPU: device files of Linux, or of Windows' Linux."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or (
        os.path.exists("/dev/dxg") and shutil.which("nvidia-smi") is not None
    )


def compile_cache() -> Finding:
    """Where compiled programs are kept, and how many."""
    import jax

    from ti_jax.machine import CACHE_BYTES

    _of_the_demo()
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None:
        advice = "make ~/.cache writable, or set JAX_COMPILATION_CACHE_DIR"
        return Finding("compile cache", "note", "none: every run compiles all of its programs", advice)
    if "://" in folder:
        return Finding("compile cache", "ok", folder, values={"folder": folder})
    sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()] if os.path.isdir(folder) else []
    own = "JAX_COMPILATION_CACHE_DIR" not in os.environ
    limit = f" of at most {CACHE_BYTES / GIGA:.0f}" if own else ""
    return Finding(
        "compile cache", "ok", f"{folder}: {len(sizes)} files, {sum(sizes) / GIGA:.2f} GB{limit}",
        values={"folder": folder, "bytes": sum(sizes), "limit": CACHE_BYTES if own else None},
    )  # fmt: skip


def disk() -> Finding:
    """Free space here and where models are downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return judge_disk({str(Path.cwd()): _free_at(Path.cwd()), HF_HUB_CACHE: _free_at(Path(HF_HUB_CACHE))})


def _free_at(folder: Path) -> int:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def judge_disk(free: dict[str, int]) -> Finding:
    """`disk` for folders with their free bytes."""
    says = ", ".join(f"{size / GIGA:.1f} GB free in {folder}" for folder, size in free.items())
    least = min(free.values())
    level: Level = "problem" if least < LEAST_DISK else "note" if least < MODEL_DISK else "ok"
    advice = {
        "problem": "free some space: a run could not save its word",
        "note": "a Stable Diffusion takes 4 to 7 GB; HF_HOME says where downloads go",
        "ok": "",
    }
    return Finding("disk", level, says, advice[level], {"free_bytes": free})


def hub() -> Finding:
    """Whether there is a token for the hub; it is not shown, and nobody is asked."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE

    there = get_token() is not None
    says = "a token is there (not checked)" if there else "no token"
    says += "; HF_HUB_OFFLINE is set: nothing is downloaded" if HF_HUB_OFFLINE else ""
    advice = "" if there else "hf auth login, for gated models and --push_to_hub; others need none"
    return Finding(
        "hub login", "ok" if there else "note", says, advice, {"token": there, "offline": bool(HF_HUB_OFFLINE)}
    )


def training_step() -> Finding:
    """The time of a training step of the embedded model, as the demo has it."""
    from ti_jax.ops.platform import Platform
    from ti_jax.training.plan import Planner

    config, found, sharing = _of_the_demo()
    assert config.train_batch_size is not None, "the config is resolved"
    planner = Planner(config, Platform.of(found[0]).dtype, found)
    batch = config.train_batch_size // sharing
    compiling, seconds = planner.timed(batch)
    samples = batch * len(found) / seconds
    demo = config.max_train_steps or 1
    return Finding(
        "training step",
        "ok",
        f"{seconds * 1e3:.0f} ms ({samples:.0f} samples/s) for the embedded model, {compiling:.1f} s to compile; the "
        f"demo's {demo} steps take {demo * seconds:.0f} s",
        values={"seconds": seconds, "compile_seconds": compiling, "samples_per_second": samples},
    )


@functools.cache
def _of_the_demo() -> tuple[PlanConfig, list[Any], int]:
    """The demo's settings, the devices that it would train on, and how many of them share its batch.

    Call it before anything else asks for devices, as `train` does.
    """
    import jax

    from ti_jax.machine import enable_compilation_cache
    from ti_jax.training.cpu_devices import use_cores

    config = resolve_plan(PlanConfig())
    cores = use_cores(config)
    enable_compilation_cache()
    if jax.default_backend() == "cpu":
        return config, jax.devices()[: cores or 1], cores or 1
    return config, jax.local_devices(), 1


CHECKS: dict[str, Callable[[], Finding]] = {
    "versions": versions,
    "devices": devices,
    "accelerator": accelerator,
    "compile cache": compile_cache,
    "disk": disk,
    "hub login": hub,
    "training step": training_step,
}
