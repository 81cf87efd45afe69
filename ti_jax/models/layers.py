"""Layers that the UNet and the VAE share: convolution, group norm, time embedding, residual block, resampling.

Pictures are [B, H, W, C]. Held to diffusers' ``models/resnet.py``, ``upsampling.py``, ``downsampling.py`` and
``embeddings.py`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.ops.activations import silu
from ti_jax.ops.convolution import Padding, conv2d
from ti_jax.ops.matmul import dot_general
from ti_jax.ops.normalisation import group_norm
from ti_jax.ops.rematerialisation import product

SAME_3X3: Padding = ((1, 1), (1, 1))
NO_PADDING: Padding = ((0, 0), (0, 0))


class Conv2d(nn.Module):
    """2-D convolution with bias: [B, H, W, C] -> [B, H', W', features]."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = SAME_3X3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
        return product(conv2d(x, kernel, self.stride, self.padding) + bias)


class Dense(nn.Dense):
    """Dense layer whose output the ``policy`` of gradient checkpointing saves: [..., C] -> [..., features]."""

    dot_general: Any = dot_general

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer."""
        return product(super().__call__(inputs))


class GroupNorm(nn.Module):
    """Normalise groups of channels over the picture, then SiLU if asked: see `ti_jax.ops.normalisation.group_norm`."""

    num_groups: int
    epsilon: float
    silu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def beside(self, x: jax.Array, shift: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """[B, ..., C] and maybe [B, C] -> [B, ..., C], in `dtype`; and `x`, to be added by a residual connection."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, self.num_groups, self.epsilon, self.silu, self.dtype, shift)

    def __call__(self, x: jax.Array, shift: jax.Array | None = None) -> jax.Array:
        """[B, ..., C] and maybe [B, C] -> [B, ..., C], in `dtype`."""
        return self.beside(x, shift)[0]


def timestep_embedding(
    timesteps: jax.Array, dimension: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Sines and cosines of timesteps [N] at `dimension // 2` frequencies from 1 to 1/10000 (Ho et al. 2020).

    Returns:
      float32 [N, dimension]: sines then cosines, or cosines then sines with `flip_sin_to_cos`; an odd dimension ends
      with a zero.
    """
    half = dimension // 2
    exponents = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponents)
    waves = [jnp.sin(angles), jnp.cos(angles)]
    if flip_sin_to_cos:
        waves.reverse()
    embedding = jnp.concatenate(waves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dimension - 2 * half)))


class TimestepEmbedding(nn.Module):
    """Dense, SiLU, dense: [B, C] -> [B, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        """Embed."""
        hidden = silu(Dense(self.features, dtype=self.dtype, name="linear_1")(embedding))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(hidden)


class ResnetBlock2D(nn.Module):
    """Norm, SiLU, convolution, twice, plus a shortcut; the time embedding is added in between.

    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    features: int
    num_groups: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] and time embedding [B, T] (None in the VAE, which has none) -> [B, H, W, features]."""
        hidden, x = GroupNorm(self.num_groups, self.epsilon, silu=True, dtype=self.dtype, name="norm1").beside(x)
        hidden = Conv2d(self.features, dtype=self.dtype, name="conv1")(hidden)
        shift = None
        if time is not None:
            shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(silu(time))
        hidden = GroupNorm(self.num_groups, self.epsilon, silu=True, dtype=self.dtype, name="norm2")(hidden, shift)
        hidden = Conv2d(self.features, dtype=self.dtype, name="conv2")(hidden)
        if x.shape[-1] != self.features:
            x = Conv2d(self.features, 1, padding=NO_PADDING, dtype=self.dtype, name="conv_shortcut")(x)
        return x.astype(self.dtype) + hidden


class Downsample2D(nn.Module):
    """3x3 convolution of stride 2: [B, H, W, C] -> about [B, H / 2, W / 2, C].

    `padding` 0 means one row and column of zeros at the bottom and right only, as in diffusers.
    """

    padding: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Halve height and width."""
        side = (0, 1) if self.padding == 0 else (self.padding, self.padding)
        return Conv2d(x.shape[-1], stride=2, padding=(side, side), dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution: [B, H, W, C] -> [B, height, width, C]."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """Resize to `height` x `width`."""
        x = upsample_nearest(upsample_nearest(x, height, axis=1), width, axis=2)
        return Conv2d(x.shape[-1], dtype=self.dtype, name="conv")(x)


def upsample_nearest(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Resize one axis to `size`: position i gets element ``i * old_size // size``, as PyTorch's ``nearest``."""
    old_size = x.shape[axis]
    if size == 2 * old_size:
        # A broadcast is far cheaper than a gather, whose gradient is a scatter.
        doubled = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], 2, *x.shape[axis + 1 :]))
        return doubled.reshape(*x.shape[:axis], size, *x.shape[axis + 1 :])
    return jnp.take(x, jnp.arange(size) * old_size // size, axis=axis)
