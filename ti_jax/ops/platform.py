"""The kind of device that a program is compiled for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

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
