"""The autoencoder between pictures and latents (Rombach et al. 2022, arXiv 2112.10752).

Held to diffusers' ``AutoencoderKL`` on PyTorch; attribute names are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ti_jax.errors import InputError
from ti_jax.models.layers import NO_PADDING, Conv2d, Dense, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from ti_jax.models.options import DIFFUSERS_METADATA, SILU, Options, is_number, is_positive
from ti_jax.ops.attention import dot_product_attention

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class VAEConfig(Options):
    """Sizes and options; defaults are diffusers'.

    The UNet's latents are ``(latents - shift_factor) * scaling_factor``, which the caller computes. Weights whose
    config has ``force_upcast`` overflow in float16, not in bfloat16 or float32. ``sample_size``, the side in pixels of
    its training pictures, determines the tile size (`tile_latent_size`).
    """

    FILE = "vae config.json"
    METADATA = DIFFUSERS_METADATA | {"force_upcast"}  # only matters in float16

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int | tuple[int, ...] = 32

    @property
    def tile_latent_size(self) -> int:
        """Side of a tile in latents for tiled decoding, ``tile_latent_min_size`` in diffusers.

        At least 4, so that a tile can share a quarter with the next one.
        """
        side = self.sample_size[0] if isinstance(self.sample_size, tuple) else self.sample_size
        return max(4, side // 2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """From the contents of an autoencoder's ``config.json``.

        Raises:
          InputError: an option or value that is not implemented, or inconsistent sizes; names option and value.
        """
        class_name = config.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            raise InputError(f"vae config.json: _class_name {class_name!r}; only AutoencoderKL is implemented")
        return cls.read(config)

    def check(self) -> None:
        """See `Options`."""
        self.require_positive("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        channels = self.block_out_channels
        if not isinstance(channels, tuple) or not channels or not all(map(is_positive, channels)):
            self.refuse("block_out_channels", "expected a list of positive integers")
        for option, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if getattr(self, option) != (kind,) * len(channels):
                self.refuse(option, f"implemented: {kind}, once for each of block_out_channels")
        if self.act_fn not in SILU:
            self.refuse("act_fn", f"implemented: {', '.join(SILU)}")
        sides = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,)
        if not sides or not all(map(is_positive, sides)):
            self.refuse("sample_size", "expected a positive integer, or one for each side")
        self.require_switches("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        if not is_number(self.scaling_factor) or self.scaling_factor <= 0:
            self.refuse("scaling_factor", "expected a positive number")
        if self.shift_factor is not None and not is_number(self.shift_factor):
            self.refuse("shift_factor", "expected a number or null")
        if any(number % self.norm_num_groups for number in channels):
            self.refuse("norm_num_groups", f"does not divide each of block_out_channels {list(channels)}")


class AutoencoderKL(nn.Module):
    """Pictures [B, H, W, 3] in [-1, 1] <-> latents [B, h, w, c], unscaled; h = H / 2 ** (number of levels - 1).

    Attributes:
      config: sizes and options.
      dtype: of activations; norms and softmax are always float32 inside.
    """

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Create the submodules."""
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * config.latent_channels, 1, padding=NO_PADDING, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(config.latent_channels, 1, padding=NO_PADDING, dtype=self.dtype)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, in_channels] -> mean and log-variance of the latents, [B, h, w, 2c].

        The log-variance is clipped to [-30, 20], as diffusers' ``DiagonalGaussianDistribution`` does.
        """
        moments = self.encoder(pixels.astype(self.dtype))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [B, h, w, c] -> pixels [B, H, W, out_channels], about [-1, 1]."""
        latents = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode, then decode the mean: initialises the parameters of both halves."""
        return self.decode(jnp.split(self.encode(pixels), 2, axis=-1)[0])


class Encoder(nn.Module):
    """Pixels -> moments before the quantisation convolution."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in_channels] -> [B, h, w, 2c]."""
        config = self.config
        x = Conv2d(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        last = len(config.block_out_channels) - 1
        for index, channels in enumerate(config.block_out_channels):
            x = DownEncoderBlock2D(config, channels, index < last, self.dtype, name=f"down_blocks_{index}")(x)
        x = MidBlock2D(config, self.dtype, name="mid_block")(x)
        x = GroupNorm(config.norm_num_groups, NORM_EPSILON, silu=True, dtype=self.dtype, name="conv_norm_out")(x)
        return Conv2d(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents after the quantisation convolution -> pixels."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, c] -> [B, H, W, out_channels]."""
        config = self.config
        x = Conv2d(config.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
        x = MidBlock2D(config, self.dtype, name="mid_block")(x)
        last = len(config.block_out_channels) - 1
        for index, channels in enumerate(reversed(config.block_out_channels)):
            x = UpDecoderBlock2D(config, channels, index < last, self.dtype, name=f"up_blocks_{index}")(x)
        x = GroupNorm(config.norm_num_groups, NORM_EPSILON, silu=True, dtype=self.dtype, name="conv_norm_out")(x)
        return Conv2d(config.out_channels, dtype=self.dtype, name="conv_out")(x)


class DownEncoderBlock2D(nn.Module):
    """Residual blocks, then optionally a downsampler: [B, H, W, C] -> [B, H / 2, W / 2, channels]."""

    config: VAEConfig
    channels: int
    downsample: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Run the block."""
        for index in range(self.config.layers_per_block):
            x = _resnet(self.config, self.channels, self.dtype, index)(x)
        return Downsample2D(0, self.dtype, name="downsamplers_0")(x) if self.downsample else x


class UpDecoderBlock2D(nn.Module):
    """Residual blocks, then optionally an upsampler: [B, H, W, C] -> [B, 2 H, 2 W, channels]."""

    config: VAEConfig
    channels: int
    upsample: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Run the block."""
        for index in range(self.config.layers_per_block + 1):
            x = _resnet(self.config, self.channels, self.dtype, index)(x)
        height, width = x.shape[1:3]
        return Upsample2D(self.dtype, name="upsamplers_0")(x, 2 * height, 2 * width) if self.upsample else x


class MidBlock2D(nn.Module):
    """Two residual blocks, optionally with attention in between: [B, h, w, C] -> [B, h, w, C]."""

    config: VAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Run the block."""
        channels = x.shape[-1]
        x = _resnet(self.config, channels, self.dtype, 0)(x)
        if self.config.mid_block_add_attention:
            x = AttentionBlock(self.config.norm_num_groups, self.dtype, name="attentions_0")(x)
        return _resnet(self.config, channels, self.dtype, 1)(x)


class AttentionBlock(nn.Module):
    """Group norm and single-head attention over all pixels, plus a shortcut: [B, h, w, C] -> [B, h, w, C]."""

    num_groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend."""
        hidden = GroupNorm(self.num_groups, NORM_EPSILON, dtype=self.dtype, name="group_norm")(x)
        hidden = hidden.reshape(x.shape[0], -1, 1, x.shape[-1])
        query, key, value = (
            Dense(x.shape[-1], dtype=self.dtype, name=name)(hidden) for name in ("to_q", "to_k", "to_v")
        )
        attended = dot_product_attention(query, key, value).reshape(x.shape)
        return x + Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(attended)


def _resnet(config: VAEConfig, channels: int, dtype: Any, index: int) -> ResnetBlock2D:
    return ResnetBlock2D(channels, config.norm_num_groups, NORM_EPSILON, dtype, name=f"resnets_{index}")
