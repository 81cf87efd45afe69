"""What is published of the devices that people train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

TERA = 1e12


@dataclass(frozen=True)
class Chip:
    """A device's published specification: name, memory in bytes, and peak FLOP/s in bfloat16."""

    name: str
    memory: float
    peak: float


# By JAX's `device_kind`. https://cloud.google.com/tpu/docs, https://www.nvidia.com/en-us/data-center/h100/ and so on;
# of GeForce and RTX cards NVIDIA's white papers of Ampere and Ada, with float32 sums and without sparsity.
CHIPS = {
    "TPU v5 lite": Chip("TPU v5e", 16 * 2**30, 197 * TERA),
    "TPU v5": Chip("TPU v5p", 95 * 2**30, 459 * TERA),
    "TPU v6 lite": Chip("TPU v6e", 32 * 2**30, 918 * TERA),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 40e9, 312 * TERA),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 80e9, 312 * TERA),
    "NVIDIA H100 80GB HBM3": Chip("H100", 80e9, 989 * TERA),
    "NVIDIA H200": Chip("H200", 141e9, 989 * TERA),
    "NVIDIA RTX A6000": Chip("RTX A6000", 48e9, 155 * TERA),
    "NVIDIA GeForce RTX 3090": Chip("RTX 3090", 24e9, 71 * TERA),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 24e9, 165 * TERA),
    "NVIDIA L4": Chip("L4", 24e9, 121 * TERA),
    "NVIDIA L40S": Chip("L40S", 48e9, 362 * TERA),
}


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """The published peak of a device in FLOP/s, by JAX's ``device_kind``.

    None if it is unknown, or the weights are not bfloat16: for other dtypes it depends on settings and generations.
    """
    chip = CHIPS.get(device_kind)
    return chip.peak if chip is not None and jnp.dtype(dtype) == jnp.bfloat16 else None
