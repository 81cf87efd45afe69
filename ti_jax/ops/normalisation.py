"""Group normalisation (Wu & He 2018), with the fastest implementation for each platform; held to PyTorch's."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ti_jax.ops.activations import silu as silu_of
from ti_jax.ops.platform import current

# XLA's Triton knows no older NVIDIA GPU than Ampere.
KERNELS_SINCE = 8
# "0": XLA's form on NVIDIA GPUs, too; to compare with, and where the kernels fail.
SWITCH = "TI_JAX_KERNELS"


def group_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    num_groups: int,
    epsilon: float,
    silu: bool = False,
    dtype: Any = jnp.float32,
    shift: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Normalise groups of channels over the picture, then scale and shift each channel.

    Statistics are always float32, and SiLU is applied before the result is rounded.

    Args:
      x: [B, ..., C], C a multiple of `num_groups`.
      scale, bias: [C], of any dtype.
      num_groups, epsilon: as in PyTorch.
      silu: whether to apply SiLU to the result.
      dtype: of the result.
      shift: [B, C], added to all pixels of a picture before it is normalised; none by default.

    Returns:
      [B, ..., C] in `dtype`; and `x`. A residual connection should add this `x`: its gradient is then added by the
      kernel that computes the norm's.
    """
    kernels = _kernels()
    if kernels is not None and x.dtype in (jnp.bfloat16, jnp.float16):
        picture = x.reshape(x.shape[0], -1, x.shape[-1])
        if kernels.suits(picture.shape, num_groups):
            norm = kernels.Norm(num_groups, epsilon, silu, dtype)
            normed, picture = kernels.normalise(norm, picture, shift, scale, bias)
            return normed.reshape(x.shape), picture.reshape(x.shape)
    shifted = x if shift is None else x + jnp.expand_dims(shift, tuple(range(1, x.ndim - 1)))
    normed = _group_norm(shifted, scale.astype(jnp.float32), bias.astype(jnp.float32), num_groups, epsilon)
    return (silu_of(normed) if silu else normed).astype(dtype).reshape(x.shape), x


def _kernels() -> ModuleType | None:
    """`ti_jax.ops.group_norm_kernels`, or None where they are not to be used."""
    platform = current()
    if platform.name != "cuda" or platform.compute_capability < KERNELS_SINCE or os.environ.get(SWITCH) == "0":
        return None
    try:
        from ti_jax.ops import group_norm_kernels
    except ImportError:  # a JAX without this backend of Pallas
        return None
    return group_norm_kernels if group_norm_kernels.can_lower() else None


def _group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int, epsilon: float) -> jax.Array:
    """The norm in XLA's operations: [B, ..., C] -> float32 [B, P, C].

    The sums are taken per channel first and then per group, and normalising is one multiply-add over the picture: fewer
    and simpler passes than over a [B, H, W, G, C / G] view.
    """
    channels = x.shape[-1]
    picture = x.reshape(x.shape[0], -1, channels).astype(jnp.float32)

    def group_mean(of_channels: jax.Array) -> jax.Array:
        """[B, C] -> [B, C]: each channel gets the mean of its group."""
        grouped = of_channels.reshape(-1, num_groups, channels // num_groups)
        return jnp.broadcast_to(grouped.mean(axis=-1, keepdims=True), grouped.shape).reshape(-1, channels)

    # E[d^2] - E[d]^2 cancels if the mean is far from 0. So subtract the first pixel's mean over the group, which is
    # about one standard deviation from the group's mean. The result, and so the gradient, do not depend on it.
    deviation = picture - jax.lax.stop_gradient(group_mean(picture[:, 0]))[:, None]
    mean = group_mean(jnp.mean(deviation, axis=1))
    variance = group_mean(jnp.mean(jnp.square(deviation), axis=1)) - jnp.square(mean)
    # Rounding can make the variance of a constant group negative.
    factor = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon) * scale
    return deviation * factor[:, None] + (bias - mean * factor)[:, None]
