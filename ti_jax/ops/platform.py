"""The platform that a program is compiled for; operations choose their implementation by it.

`compiling_for` sets the platform while a program is traced, `current` reads it. So the choice is a plain ``if``, and
modules need not pass the platform to each layer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

BFLOAT16_SINCE = 8  # Ampere: older GPUs have no bfloat16 units, and XLA emulates them, slower than float32


@dataclass(frozen=True)
class Platform:
    """What an operation may choose its implementation by.

    Attributes:
      name: "cpu", "tpu", "cuda" (NVIDIA), "rocm" (AMD), or another name that JAX has.
      compute_capability: major compute capability of an NVIDIA GPU: 8 for Ampere and Ada, 9 for Hopper, 10 and 12 for
        Blackwell; 0 for anything else.
      deterministic: results must be the same to the bit each time, at some cost.
    """

    name: str
    compute_capability: int = 0
    deterministic: bool = False

    @classmethod
    def of(cls, device: Any, deterministic: bool = False) -> Platform:
        """The platform of a JAX device; it may be a device of a topology, which is only compiled for."""
        name, capability = device.platform, str(getattr(device, "compute_capability", ""))
        if name not in ("gpu", "cuda", "rocm"):
            return cls(name, deterministic=deterministic)
        # AMD GPUs have gfx90a and the like.
        digits = re.fullmatch(r"(\d+)\.\d+", capability)
        return cls("cuda", int(digits[1]), deterministic) if digits else cls("rocm", deterministic=deterministic)

    @property
    def compiler_options(self) -> dict[str, bool] | None:
        """What XLA must be told of a deterministic program; None: nothing.

        On a GPU it then leaves out kernels that add atomically, its own, cuBLAS' and cuDNN's (attention's gradient,
        too), and takes the first of several kernels, not the fastest by a measurement, which has another winner each
        time; it refuses to compile what has no deterministic kernel.
        """
        on_gpu = self.name in ("cuda", "rocm")
        return {"xla_gpu_exclude_nondeterministic_ops": True} if self.deterministic and on_gpu else None

    @property
    def dtype(self) -> Any:
        """The default dtype to compute in: bfloat16 on TPUs and on GPUs that have it, float32 on a CPU."""
        slow = self.name == "cpu" or (self.name == "cuda" and self.compute_capability < BFLOAT16_SINCE)
        return jnp.float32 if slow else jnp.bfloat16


PLAIN = Platform("plain")
"""No particular platform: every operation in its plain form, one matmul or convolution."""

_chosen: ContextVar[Platform | None] = ContextVar("platform", default=None)


def current() -> Platform:
    """The platform of the innermost `compiling_for`; outside of any, that of JAX's default device."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return Platform.of(jax.local_devices()[0] if default is None or isinstance(default, str) else default)


@contextlib.contextmanager
def compiling_for(platform: Platform | None) -> Iterator[None]:
    """While tracing, operations use the implementations for this platform. None changes nothing.

    Use it inside a function that `jax.jit` traces, and make the platform one of its static arguments: JAX's cache key
    of a compiled program does not contain this choice.
    """
    token = _chosen.set(_chosen.get() if platform is None else platform)
    try:
        yield
    finally:
        _chosen.reset(token)
