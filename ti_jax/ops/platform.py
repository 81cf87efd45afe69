"""The kind of device that a program is compiled for, and by which operations choose their form.

While a program is traced, `compiling_for` says for which platform; `current` asks. So a form is a plain ``if``, and
modules need not hand the platform down to each layer.
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
    """What an operation may choose its form by.

    Attributes:
      name: "cpu", "tpu", "cuda" (NVIDIA), "rocm" (AMD), or what else JAX calls it.
      compute_capability: of an NVIDIA GPU, its first digits: 8 for Ampere and Ada, 9 for Hopper, 10 and 12 for
        Blackwell; 0 for anything else.
    """

    name: str
    compute_capability: int = 0

    @classmethod
    def of(cls, device: Any) -> Platform:
        """The platform of a device of JAX, which need not be there (a device of a topology)."""
        name, capability = device.platform, str(getattr(device, "compute_capability", ""))
        if name not in ("gpu", "cuda", "rocm"):
            return cls(name)
        # AMD's are called gfx90a and the like.
        digits = re.fullmatch(r"(\d+)\.\d+", capability)
        return cls("cuda", int(digits[1])) if digits else cls("rocm")

    @property
    def dtype(self) -> Any:
        """The precision to compute in where none is asked for: bfloat16 where the hardware has it, but on a CPU."""
        slow = self.name == "cpu" or (self.name == "cuda" and self.compute_capability < BFLOAT16_SINCE)
        return jnp.float32 if slow else jnp.bfloat16


PLAIN = Platform("plain")
"""No platform in particular: every operation in the form in which it is written down, products and convolutions."""

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
    """While tracing: operations take the forms of this platform. With None nothing changes.

    To be used inside a function that `jax.jit` traces, with a platform that is among its static arguments: the choice
    is no part of what JAX knows a compiled program by.
    """
    token = _chosen.set(_chosen.get() if platform is None else platform)
    try:
        yield
    finally:
        _chosen.reset(token)
